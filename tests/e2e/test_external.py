"""A build with its weights in weights.bin is the build whose graphs hold them: same outputs, verbs and checks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import striped_checkpoints
from commands import done, refused, run
from lhruntime import FormatError, Session

import lhcompile.lower.external as external

CONTEXT, VOCAB = 32, 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    weights, config = striped_checkpoints.write(
        striped_checkpoints.published("sh-7b", num_layers=2), tmp_path_factory.mktemp("striped")
    )
    return [weights, "--config", config, "--context", CONTEXT]


@pytest.fixture(scope="module")
def inline(model: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("inline") / "out"
    done("build", *model, "-o", out, "--exact", "--sequences", 2)
    return out


@pytest.fixture(scope="module")
def beside(model: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("beside") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external, "MOST_INLINE", 100_000)
        rows = done("build", *model, "-o", out, "--exact", "--sequences", 2).rows
    assert "weights.bin" in rows["files"]
    return out


def test_the_files_of_both(inline: Path, beside: Path) -> None:
    graphs = {"step.onnx", "prefill.onnx", "report.json", "report.html"}
    graphs |= {"genai_config.json", "genai_pack.onnx", "genai_unpack.onnx"}
    for out, files in ((inline, graphs), (beside, graphs | {"weights.bin"})):
        listed = json.loads((out / "manifest.json").read_text())["files"]
        assert set(listed) == files
        assert {path.name for path in out.iterdir()} == files | {"manifest.json"}
        assert [path.name for path in out.parent.iterdir()] == ["out"]
        assert all((out / name).stat().st_nlink == 1 for name in files)
    sizes = json.loads((beside / "report.json").read_text())["files"]
    assert sizes == {name: (beside / name).stat().st_size for name in ("step.onnx", "prefill.onnx", "weights.bin")}


def _large(graph: Path) -> list[tuple[int, bytes]]:
    """(offset, bytes) of the tensors of a graph that lie in weights.bin; of the others none has a KiB."""
    tensors = onnx.load(graph, load_external_data=False).graph.initializer
    data, found = (graph.parent / "weights.bin").read_bytes(), []
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entry = {each.key: each.value for each in tensor.external_data}
            start = int(entry["offset"])
            found.append((start, data[start : start + int(entry["length"])]))
        else:
            assert len(tensor.raw_data) < 1024
    return found


def test_each_weight_is_there_once(beside: Path) -> None:
    step, prefill = (_large(beside / name) for name in ("step.onnx", "prefill.onnx"))
    placed = dict(step + prefill)
    assert len(placed) == len(set(placed.values()))
    matrices = [data for _, data in step if len(data) == 4 * 32 * 56]
    assert len(matrices) == 6  # of the MLPs of two layers
    assert set(matrices) <= {data for _, data in prefill}
    ends = [start + len(data) for start, data in sorted(placed.items())]
    assert all(before <= start for before, start in zip(ends, sorted(placed)[1:], strict=False))
    assert ends[-1] == (beside / "weights.bin").stat().st_size


@pytest.mark.parametrize("cuts", [[CONTEXT], [1] * CONTEXT, [5, 1, 1, CONTEXT - 7]], ids=["whole", "steps", "both"])
def test_the_same_outputs_bit_for_bit(inline: Path, beside: Path, cuts: list[int]) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (2, CONTEXT))
    pieces = np.split(tokens, np.cumsum(cuts)[:-1], axis=1)
    logits, states = [], []
    for out in (inline, beside):
        session = Session.load(out, batch=2, threads=1)
        logits.append(np.concatenate([session.prefill(piece) for piece in pieces], axis=1))
        states.append(session.states())
    assert 0.1 < logits[0].std() < 10
    np.testing.assert_array_equal(logits[0], logits[1])
    assert all(np.array_equal(states[1][name], state) for name, state in states[0].items())


def test_verbs(beside: Path, model: list[object]) -> None:
    rows = done("verify", beside, "--against", *model).rows
    assert rows["files"] == "8 checksums match"
    assert rows["loss, compiled"].endswith("(+0.000%)")
    assert "weights.bin" in done("inspect", beside).rows["files"]
    assert "weights.bin" in done("bench", beside, "--steps", 20, "--threads", 1).rows["files"]
    assert len(done("generate", beside, "--prompt", "1 2 3", "-n", 8).out.split()) == 11


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:], "does not match the sha256 in the manifest"),
        (lambda data: data[:-1], r"has \d+ bytes, not \d+ as listed"),
    ],
    ids=["one bit", "one byte less"],
)
def test_damaged_weights_are_named(beside: Path, tmp_path: Path, damage: object, message: str) -> None:
    out = shutil.copytree(beside, tmp_path / "out")
    data = (out / "weights.bin").read_bytes()
    (out / "weights.bin").write_bytes(damage(data))  # type: ignore[operator]
    refused(run("verify", out), f"weights.bin {message}")
    with pytest.raises(FormatError, match=r"weights\.bin: (sha256 is|has)"):
        Session.load(out)


def test_both_graphs_read_mapped_weights_in_one_place(beside: Path) -> None:
    ids = np.random.default_rng(1).integers(0, VOCAB, (2, 20))
    own, mapped = (Session.load(beside, batch=2, share_weights=shared) for shared in (False, True))
    np.testing.assert_allclose(mapped.prefill(ids), own.prefill(ids), atol=1e-5)
    np.testing.assert_allclose(mapped.step(ids[:, 0]), own.step(ids[:, 0]), atol=1e-5)
    model = mapped._model
    pair = model.manifest.graphs["cpu"]
    listed = {*pair.step.weights, *pair.prefill.weights}
    assert 0 < len(model.weights) < 2 * len(listed)
    assert sum(weight.shape().count(VOCAB) for weight in model.weights) == 2  # the embedding and the head, each once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": -4}, r"graphs\.step\.weights\.tensors\..*\.offset and shape are -4 and"),
        ({"offset": 10**9}, "offset is 1000000000: the tensor ends behind the end of weights.bin"),
        ({"dtype": "float31"}, "dtype is 'float31', expected one of float32"),
        ({"shape": "all"}, "shape is 'all', expected a list"),
    ],
)
def test_wrong_places_are_said(beside: Path, tmp_path: Path, change: dict[str, object], message: str) -> None:
    copy = Path(shutil.copytree(beside, tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    next(iter(manifest["graphs"]["step"]["weights"]["tensors"].values())).update(change)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=message):
        Session.load(copy)
