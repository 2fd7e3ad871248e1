"""Large weights lie in one file beside both graphs, each once; small graphs are one file as they always were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from streams import serialized

import lhcompile.lower.external as external
from lhcompile.artifacts import Lowered
from lhcompile.assemble import graph_files
from lhcompile.errors import DestinationError
from lhcompile.lower import weight_places, write_graphs
from lhcompile.package import Link, size_of

DRAW = np.random.default_rng(0)
SHARED, OTHER = (DRAW.standard_normal((48, 32), np.float32) for _ in range(2))
"""6 KiB each."""
SMALL = DRAW.standard_normal((32,), np.float32)
FILES = ["step.onnx", "prefill.onnx"]


def product(*weights: tuple[str, np.ndarray]) -> ir.Model:
    """y = x · W₁ + x · W₂ + … + bias for x [batch, 48] and W [48, 32]"""
    x, y = (
        ir.Value(name=name, shape=ir.Shape(["batch", size]), type=ir.TensorType(ir.DataType.FLOAT))
        for name, size in (("x", 48), ("y", 32))
    )
    held = [ir.Value(name=name, const_value=ir.tensor(array, name=name)) for name, array in (*weights, ("bias", SMALL))]
    nodes = [ir.node("MatMul", [x, weight]) for weight in held[:-1]]
    nodes.append(ir.node("Sum", [*(node.outputs[0] for node in nodes), held[-1]], outputs=[y]))
    graph = ir.Graph([x], [y], nodes=nodes, initializers=held, opset_imports={"": 20}, name="product")
    return ir.Model(graph, ir_version=8)


@pytest.fixture
def models() -> dict[str, ir.Model]:
    """Two graphs with a weight in common, that of the second turned in memory, and a weight that one holds twice."""
    step = product(("shared", SHARED), ("first", OTHER), ("again", OTHER.copy()))
    turned = np.ascontiguousarray(SHARED.T).T
    assert not turned.flags.c_contiguous
    return dict(zip(FILES, (step, product(("turned", turned))), strict=True))


@pytest.fixture
def all_external(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "MOST_INLINE", 0)


def places(path: Path) -> dict[str, tuple[int, int]]:
    """name → (offset, length) of the initializers that lie in weights.bin"""
    found = {}
    for tensor in onnx.load(path, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {each.key: each.value for each in tensor.external_data}
            assert entry["location"] == "weights.bin"
            found[tensor.name] = int(entry["offset"]), int(entry["length"])
    return found


def test_small_graphs_are_one_file_each(models: dict[str, ir.Model], tmp_path: Path) -> None:
    assert write_graphs(models, tmp_path) == [tmp_path / name for name in FILES]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name, model in models.items():
        assert (tmp_path / name).read_bytes() == serialized(model)


def test_the_size_of_the_larger_graph_decides(
    models: dict[str, ir.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = 3 * SHARED.nbytes + SMALL.nbytes
    for limit, files in ((largest, 2), (largest - 1, 3)):
        monkeypatch.setattr(external, "MOST_INLINE", limit)
        place = tmp_path / str(limit)
        place.mkdir()
        assert len(write_graphs(models, place)) == len(list(place.iterdir())) == files


@pytest.mark.usefixtures("all_external")
def test_each_distinct_tensor_lies_in_the_file_once_on_a_page_of_its_own(
    models: dict[str, ir.Model], tmp_path: Path
) -> None:
    assert write_graphs(models, tmp_path) == [*(tmp_path / name for name in FILES), tmp_path / "weights.bin"]
    step, prefill = (places(tmp_path / name) for name in FILES)
    assert set(step) == {"shared", "first", "again"}
    assert prefill == {"turned": step["shared"]}
    assert step["first"] == step["again"] != step["shared"]
    assert {length for _, length in step.values()} == {SHARED.nbytes}
    assert {offset % 4096 for offset, _ in step.values()} == {0}
    data = (tmp_path / "weights.bin").read_bytes()
    assert len(data) == 8192 + OTHER.nbytes
    assert data[step["shared"][0] :][: SHARED.nbytes] == SHARED.tobytes()
    assert data[step["first"][0] :][: OTHER.nbytes] == OTHER.tobytes()


@pytest.mark.usefixtures("all_external")
def test_the_graphs_run_and_the_models_hold_weights_no_longer(models: dict[str, ir.Model], tmp_path: Path) -> None:
    before = {name: serialized(model) for name, model in models.items()}
    write_graphs(models, tmp_path)
    for model in models.values():
        held = {value.name for value in model.graph.initializers.values() if isinstance(value.const_value, ir.Tensor)}
        assert held == {"bias"}
    x = DRAW.standard_normal((3, 48), np.float32)
    for name, whole in before.items():
        onnx.checker.check_model(tmp_path / name, full_check=True)
        alone, beside = (
            onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
            for source in (whole, tmp_path / name)
        )
        np.testing.assert_array_equal(beside, alone)


@pytest.mark.usefixtures("all_external")
def test_places_say_where_a_runtime_finds_each_tensor(models: dict[str, ir.Model], tmp_path: Path) -> None:
    assert weight_places(models["step.onnx"]) == {}
    write_graphs(models, tmp_path)
    found = weight_places(models["step.onnx"])
    assert found.keys() == {"shared", "first", "again"}
    for name, array in (("shared", SHARED), ("again", OTHER)):
        mapped = np.memmap(tmp_path / "weights.bin", found[name].dtype, "r", found[name].offset, found[name].shape)
        np.testing.assert_array_equal(mapped, array)


@pytest.mark.usefixtures("all_external")
def test_a_full_disk_is_said(models: dict[str, ir.Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, model: ir.Model) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(external, "_write", full)
    lowered = Lowered(*models.values(), target="portable", states=())
    with pytest.raises(DestinationError, match=f"^cannot write into {tmp_path.parent}: No space left on device$"):
        graph_files([lowered], tmp_path)


@pytest.mark.usefixtures("all_external")
def test_both_graphs_and_their_weights_become_files_to_link(models: dict[str, ir.Model], tmp_path: Path) -> None:
    files = graph_files([Lowered(*models.values(), target="portable", states=())], tmp_path)
    assert files == {name: Link(tmp_path / name) for name in (*FILES, "weights.bin")}
    assert {name: size_of(file) for name, file in files.items()} == {
        path.name: path.stat().st_size for path in tmp_path.iterdir()
    }
