"""What a built directory must hold, and one clear line for each way it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from lhruntime import ArgumentError, FormatError, Session
from onnx import parser
from toy_models import Toy, manifest_of, save, toy, write_manifest

Manifest = dict[str, Any]


@pytest.fixture
def copy(model: Toy, tmp_path: Path) -> Path:
    return save(model, tmp_path / "copy")


def edit(directory: Path, change: Callable[[Manifest], Any]) -> None:
    path = directory / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def state_shape(shape: list[Any]) -> Callable[[Manifest], Any]:
    return lambda manifest: manifest["states"][1].update(shape=shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format="other"), "format is 'other', expected 'lhcompile'"),
        (lambda m: m.pop("format"), "format is None, expected 'lhcompile'"),
        (lambda m: m.update(format_version=2), "format_version is 2, this runtime reads 1"),
        (lambda m: m.update(format_version="1"), "format_version is '1', expected a whole number"),
        (lambda m: m.pop("states"), "states is missing"),
        (lambda m: m.pop("files"), "files is missing"),
        (lambda m: m.pop("model"), "model is missing"),
        (lambda m: m["model"].pop("vocab_size"), r"model\.vocab_size is missing"),
        (lambda m: m["model"].update(vocab_size=0), r"model\.vocab_size is 0, expected at least 1"),
        (lambda m: m["graphs"].pop("prefill"), r"graphs\.prefill is missing"),
        (lambda m: m["graphs"]["step"].update(file="x.onnx"), "'x.onnx', which files does not list"),
        (lambda m: m.update(graphs=[]), r"graphs is \[\], expected an object"),
        (lambda m: m.update(inputs={}), r"inputs has \[\], expected one of 'tokens', 'features'"),
        (lambda m: m.update(outputs={"values": "logits"}), r"outputs\.logits is missing"),
        (lambda m: m.update(tokenizer={}), r"tokenizer\.kind is missing"),
        (lambda m: m["states"].append(m["states"][0]), "two entries with input 'past_key_values.0.conv_s"),
        (lambda m: m["states"].append(3), r"states\[4\] is 3, expected an object"),
        (lambda m: m["states"][2].pop("output"), r"states\[2\]\.output is missing"),
        (lambda m: m["states"][2].update(dtype="bfloat16"), r"states\[2\]\.dtype is 'bfloat16', expected"),
        (lambda m: m["states"][2].update(capacity=0), r"states\[2\]\.capacity is 0, expected at least 1"),
        (lambda m: m["states"][2].update(capacity="all"), r"states\[2\]\.capacity is 'all', expected a whole"),
        (state_shape(["batch", "past", 3]), r"states\[1\]\.shape is \['batch', 'past', 3\], expected sizes"),
        (state_shape(["batch", -1, 3]), "expected sizes and one 'batch'"),
        (lambda m: m["files"].update({"../up": {}}), "files names '../up', expected a plain file name"),
        (lambda m: m["files"]["step.onnx"].pop("sha256"), r"files\.step\.onnx\.sha256 is missing"),
    ],
)
def test_manifest_mistakes(copy: Path, change: Callable[[Manifest], Any], message: str) -> None:
    edit(copy, change)
    with pytest.raises(FormatError, match=f"^manifest.json: .*{message}"):
        Session.load(copy)


def test_not_a_built_directory(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"manifest\.json: cannot be read .*: not a built directory"):
        Session.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(FormatError, match="not valid JSON"):
        Session.load(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(FormatError, match="holds list, expected an object"):
        Session.load(tmp_path)


@pytest.mark.parametrize("name", ["step.onnx", "prefill.onnx"])
def test_altered_files_are_named(copy: Path, name: str) -> None:
    path = copy / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"^{name}: sha256 is [0-9a-f]+, manifest.json says"):
        Session.load(copy)
    path.write_bytes(data + b"x")
    with pytest.raises(FormatError, match=f"^{name}: has .* bytes, manifest.json says"):
        Session.load(copy)
    path.unlink()
    with pytest.raises(FormatError, match=f"^{name}: listed in manifest.json but not in"):
        Session.load(copy)
    with pytest.raises(FormatError, match=f"^{name}: not in"):
        Session.load(copy, verify=False)


def test_verify_can_be_left_out(copy: Path) -> None:
    edit(copy, lambda manifest: manifest["files"]["step.onnx"].update(sha256="0" * 64))
    with pytest.raises(FormatError, match=r"^step\.onnx: sha256"):
        Session.load(copy)
    assert Session.load(copy, verify=False).prefill([1, 2]).shape == (1, 2, 256)


def test_external_data(model: Toy, tmp_path: Path) -> None:
    directory = save(model, tmp_path / "external", external=True)
    tokens = np.arange(8)[None]
    logits = Session.load(directory).prefill(tokens)
    np.testing.assert_allclose(logits, model.reference(tokens)[0], rtol=1e-5, atol=1e-5)
    weights = directory / "step.onnx.data"
    data = bytearray(weights.read_bytes())
    data[0] ^= 1
    weights.write_bytes(data)
    with pytest.raises(FormatError, match=r"^step\.onnx\.data: sha256 is"):
        Session.load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(inputs={"tokens": "ids"}), r"inputs are \['input_ids', .* says \['ids'"),
        (lambda m: m.update(outputs={"logits": "out"}), r"outputs are \['logits', .* says \['out'"),
        (lambda m: m["states"].reverse(), "inputs are .*, manifest.json says"),
        (lambda m: m["states"].pop(), "inputs are .*, manifest.json says"),
        (lambda m: m["model"].update(vocab_size=99), "axis 2 of logits has size 256, manifest.json says 99"),
        (lambda m: m["states"][0].update(dtype="int8"), r"conv_state is tensor\(float\), .* says int8"),
        (state_shape(["batch", 8, 4]), "axis 2 of .*recurrent_state has size 3, manifest.json says 4"),
        (state_shape(["batch", 8]), r"recurrent_state has shape \['batch', 8, 3\], manifest.json says"),
        (state_shape([1, 8, 3]), "axis 0 of .*recurrent_state has no fixed size, manifest.json says 1"),
    ],
)
def test_graphs_that_contradict_the_manifest(
    copy: Path, change: Callable[[Manifest], Any], message: str
) -> None:
    edit(copy, change)
    with pytest.raises(FormatError, match=rf"^step\.onnx: .*({message})"):
        Session.load(copy)


def test_the_prefill_graph_is_checked_too(copy: Path) -> None:
    save(toy(layers=1), copy.parent / "smaller")
    (copy / "prefill.onnx").write_bytes((copy.parent / "smaller" / "prefill.onnx").read_bytes())
    write_manifest(copy, manifest_of(toy()))
    with pytest.raises(FormatError, match=r"^prefill\.onnx: inputs are"):
        Session.load(copy)


def test_a_directory_may_have_one_graph_of_one_position(built: Path, copy: Path) -> None:
    edit(copy, lambda manifest: manifest["graphs"]["prefill"].update(file="step.onnx"))
    alone, both = Session.load(copy), Session.load(built)
    tokens = [3, 1, 4, 1, 5]
    np.testing.assert_allclose(alone.prefill(tokens), both.prefill(tokens), atol=1e-5)
    np.testing.assert_allclose(alone.prefill(tokens, last_only=True), both.prefill(tokens)[:, -1], atol=1e-5)
    assert alone.position == both.position == 10


def test_graphs_of_another_target_run_when_asked_for(copy: Path) -> None:
    graphs = {"step": {"file": "step.onnx"}, "prefill": {"file": "step.onnx"}}
    edit(copy, lambda manifest: manifest.update(variants={"mcu": graphs}))
    tokens = [3, 1, 4, 1, 5]
    other = Session.load(copy, target="mcu").prefill(tokens)
    np.testing.assert_allclose(other, Session.load(copy, target="cpu").prefill(tokens), atol=1e-5)
    with pytest.raises(ArgumentError, match=r"^there are no graphs for 'web' in it, only for cpu, mcu$"):
        Session.load(copy, target="web")


def test_fixed_batch_must_be_the_asked_one(tmp_path: Path) -> None:
    directory = save(toy(), tmp_path / "fixed", batch="2")
    with pytest.raises(FormatError, match="has the fixed batch 2, this session asks for batch 1"):
        Session.load(directory)


def test_a_graph_that_does_not_load(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (copy / "step.onnx").write_bytes(b"not a graph")
    write_manifest(copy, manifest_of(toy()))
    with pytest.raises(FormatError, match=r"^step\.onnx: ONNX Runtime cannot load it: .+$"):
        Session.load(copy)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0, expected a whole number of at least 1"),
        ({"threads": 0}, "threads is 0, expected at least 1"),
        ({"providers": ["NoSuchProvider"]}, "provider 'NoSuchProvider' is not in this onnxruntime"),
        ({"providers": [("Other", {})]}, "provider 'Other' is not in this onnxruntime, which has"),
        ({"providers": []}, "providers is empty; this onnxruntime has"),
    ],
)
def test_bad_options(built: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Session.load(built, **options)


def test_half_precision_and_empty_states(tmp_path: Path) -> None:
    """A float16 sum of the ids so far, its logits float16, beside a state without elements."""
    for name, seq in (("step", "1"), ("prefill", "seq")):
        graph = parser.parse_model(
            f"""<ir_version: 10, opset_import: ["" : 20]> sums
            (int64[batch,{seq}] input_ids, float16[batch,2] total, float[batch,0] nothing)
            => (float16[batch,{seq},2] logits, float16[batch,2] total_new, float[batch,0] nothing_new)
            <int64 one = {{1}}, int64 last = {{-1}}, int64[1] axis2 = {{2}}, int64[1] axis1 = {{1}}> {{
                ids = Cast<to = 1>(input_ids)
                sums = CumSum(ids, one)
                sums3 = Unsqueeze(sums, axis2)
                wide = Cast<to = 1>(total)
                wide3 = Unsqueeze(wide, axis1)
                totals = Add(sums3, wide3)
                logits = Cast<to = 10>(totals)
                total_new = Gather<axis = 1>(logits, last)
                nothing_new = Identity(nothing)
            }}"""
        )
        onnx.save_model(graph, tmp_path / f"{name}.onnx")
    manifest = manifest_of(toy(vocab=2))
    manifest["states"] = [
        {"input": "total", "output": "total_new", "shape": ["batch", 2], "dtype": "float16"},
        {"input": "nothing", "output": "nothing_new", "shape": ["batch", 0], "dtype": "float32"},
    ]
    write_manifest(tmp_path, manifest)
    session = Session.load(tmp_path, batch=2)
    logits = session.prefill([[1, 1, 0], [0, 0, 1]])
    assert logits.dtype == np.float32
    assert logits[:, :, 0].tolist() == [[1, 2, 2], [0, 0, 1]]
    assert session.step([1, 0])[:, 1].tolist() == [3, 1]
    data = session.snapshot()
    session.reset()
    session.restore(data)
    assert session.step([0, 0])[:, 1].tolist() == [3, 1]
    assert session.states()["total"].dtype == np.float16
