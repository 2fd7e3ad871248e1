"""Builds for cuda on a machine without a GPU: their graphs run through the functions they carry."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from commands import done
from lhruntime import Engine, Session
from lhruntime.bfloat16 import array_of, from_bits, to_bits, value_of

from lhcompile import verify_directory
from lhcompile.errors import ParityError


@pytest.fixture(scope="module", params=["none", "fp16", "bf16", "fp8", "int4"])
def built(
    request: pytest.FixtureRequest, checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("fused") / "out"
    options = ("--order", 4, "--method", "hankel", "--calibration", text, "--sequences", 4, "--target", "cuda")
    done("build", checkpoint, "-o", out, *options, "--quantize", request.param)
    return out


def test_the_directory_has_a_decode_graph_and_each_weight_once(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["graphs"]["decode"]["file"] == "decode.onnx"
    assert manifest["files"].keys() >= {"step.onnx", "prefill.onnx", "decode.onnx", "weights.bin"}
    bytes_each = {"none": 4, "fp16": 2, "bf16": 2, "fp8": 2, "int4": 0.6}[manifest["quantize"]]
    assert (built / "weights.bin").stat().st_size < bytes_each * manifest["model"]["parameters"] + 4096 * 100
    report = json.loads((built / "report.json").read_text())
    assert report["stages"][-1]["loss"] <= 1.01 * report["stages"][0]["loss"]


def test_the_past_of_float16_signals_is_kept_in_float16(built: Path) -> None:
    """And nothing else is rounded, so the report speaks of float32 states, and the files agree as if it were that."""
    manifest = json.loads((built / "manifest.json").read_text())
    kept = {state["input"].rpartition(".")[2]: state["dtype"] for state in manifest["states"]}
    past = "float32" if manifest["quantize"] in ("none", "bf16") else "float16"
    assert kept == {"conv_state": past, "recurrent_state": "float32"}
    assert json.loads((built / "report.json").read_text())["state"] == "float32"


@pytest.mark.parametrize(
    ("options", "kept"), [(("--target", "cpu"), {"float32"}), (("--state", "int8"), {"int8"})], ids=["cpu too", "int8"]
)
def test_the_past_is_kept_as_others_need_it(
    options: tuple[str, str], kept: set[str], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    given = ("--order", 2, "--method", "hankel", "--calibration", text, "--sequences", 2, "--target", "cuda")
    done("build", checkpoint, "-o", tmp_path / "out", *given, "--quantize", "fp16", *options)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert {state["dtype"] for state in manifest["states"]} == kept


@pytest.mark.parametrize("targets", [("cpu",), ("cuda", "cpu")], ids=" ".join)
def test_the_past_is_rounded_where_signals_are_float32(
    targets: tuple[str, ...], checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    given = ("--order", 2, "--method", "hankel", "--calibration", text, "--sequences", 2)
    chosen = [option for target in targets for option in ("--target", target)]
    done("build", checkpoint, "-o", tmp_path / "out", *given, *chosen, "--quantize", "bf16", "--state", "float16")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert {state["dtype"] for state in manifest["states"]} == {"float16"}
    assert "past" not in manifest["graphs"]


def test_the_past_of_bfloat16_signals_is_not_rounded_to_float16(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    given = ("--order", 2, "--method", "hankel", "--calibration", text, "--sequences", 2, "--target", "cuda")
    done("build", checkpoint, "-o", tmp_path / "out", *given, "--quantize", "bf16", "--state", "float16")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    kept = {state["input"].rpartition(".")[2]: state["dtype"] for state in manifest["states"]}
    assert kept == {"conv_state": "float32", "recurrent_state": "float16"}
    assert {past["dtype"] for past in manifest["graphs"]["past"].values()} == {"bfloat16"}
    assert verify_directory(tmp_path / "out", sequences=2).cuts


def test_decoding_is_generating(built: Path) -> None:
    """Greedy tokens through the decode graph are those of the session, and so are the states behind them."""
    session, prompt = Session.load(built), np.frombuffer(b"def f1(x", np.uint8).astype(np.int64)
    expected = [int(token[0]) for token in session.generate(prompt, 20, temperature=0)]
    truth = session.states()
    graph = onnxruntime.InferenceSession(built / "decode.onnx", providers=["CPUExecutionProvider"])
    past = json.loads((built / "manifest.json").read_text())["graphs"]["past"]
    assert set(past) == {name for name in truth if name.endswith("conv_state")}
    bits = json.loads((built / "manifest.json").read_text())["quantize"] == "bf16"
    assert {each.get("dtype") for each in past.values()} == ({"bfloat16"} if bits else {None})
    types = {value.name: value.type for value in graph.get_inputs()}
    again = Session.load(built)
    token = again.prefill(prompt[None])[:, -1].argmax(-1)[:, None]
    if bits:  # of windows in float32
        assert all((state == from_bits(to_bits(state))).all() for name, state in again.states().items() if name in past)
    states, found = list(again.states().values()), []
    settings = {"uniform": 0.5, "temperature": 0.0, "top_k": 0, "top_p": 1.0}
    chosen = {name: np.array([x], np.int64 if name == "top_k" else np.float32) for name, x in settings.items()}
    for _ in range(20):
        found.append(int(token[0, 0]))
        carried: dict[str, np.ndarray[Any, Any]] = {}
        for name, state in zip(truth, states, strict=True):
            tokens = past[name]["inputs"] if name in past else [name]
            carried |= dict(zip(tokens, np.split(state, 2, axis=1) if name in past else [state], strict=True))
        feeds = {"input_ids": token} | carried | chosen
        feeds = {name: value_of(array, types[name]) for name, array in feeds.items()}
        token, *after = map(array_of, graph.run_with_ort_values(None, feeds))
        states = [
            np.concatenate([state[:, 1:], new], axis=1) if name in past else new
            for name, state, new in zip(truth, states, after, strict=True)
        ]
    assert found == expected
    for mine, theirs in zip(states, truth.values(), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-3 * max(1.0, np.abs(theirs).max()))


def test_sequences_side_by_side_get_the_tokens_they_get_alone(built: Path) -> None:
    """Also behind a prompt, whose states the loop takes over."""
    prompts = [np.frombuffer(text, np.uint8).astype(np.int64) for text in (b"def f1(x", b"import", b"class A:", b"x")]
    session, expected = Session.load(built), []
    for prompt in prompts:
        session.reset()
        expected.append([int(token[0]) for token in session.generate(prompt, 12, temperature=0)])
    with Engine.load(built, slots=3) as engine:
        handles = [engine.submit(prompt, 12, temperature=0) for prompt in prompts]
        assert [handle.result(60) for handle in handles] == expected


def test_a_decode_graph_of_other_logits_is_not_verified(built: Path, tmp_path: Path) -> None:
    assert verify_directory(built, sequences=2).cuts
    wrong = Path(shutil.copytree(built, tmp_path / "wrong"))
    model = onnx.load(wrong / "decode.onnx", load_external_data=False)
    sample = next(node for node in model.graph.node if node.op_type == "Sample")
    at = list(model.graph.node).index(sample)
    wide = onnx.helper.make_node("Cast", [sample.input[0]], ["wide"], to=onnx.TensorProto.FLOAT)
    model.graph.node.insert(at, wide)
    model.graph.node.insert(at + 1, onnx.helper.make_node("Neg", ["wide"], ["negated"]))
    model.graph.node[at + 2].input[0] = "negated"
    content = model.SerializeToString()
    (wrong / "decode.onnx").write_bytes(content)
    manifest = json.loads((wrong / "manifest.json").read_text())
    manifest["files"]["decode.onnx"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (wrong / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ParityError, match="decode: call 1 chose"):
        verify_directory(wrong, sequences=2)
