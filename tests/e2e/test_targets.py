"""Several targets in one directory: the same model, each with graphs of its own and all with the same weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from commands import done, run
from lhruntime import ArgumentError, FormatError, Session

from lhcompile import pipeline
from lhcompile.artifacts import Lowered
from lhcompile.lower import masked

ALL = ("portable", "cpu", "cuda", "web", "mcu")


@pytest.fixture(scope="module")
def several(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("several") / "out"
    targets = [part for target in ALL for part in ("--target", target)]
    done("build", checkpoint, "-o", out, "--order", 4, "--sequences", 4, *targets)
    return out


def test_every_target_has_its_graphs_and_weights_are_there_once(several: Path) -> None:
    names = {"step.onnx", "prefill.onnx", "weights.bin", "manifest.json", "report.json", "report.html"}
    names |= {"genai_config.json", "tokenizer.json", "tokenizer_config.json"}
    names |= {f"{kind}.{target}.onnx" for kind in ("step", "prefill") for target in ALL[1:]}
    names |= {"decode.cuda.onnx"}
    assert {path.name for path in several.iterdir()} == names - {"prefill.mcu.onnx"}
    graphs = sum(path.stat().st_size for path in several.glob("*.onnx"))
    manifest = json.loads((several / "manifest.json").read_text())
    stored = 4 * manifest["model"]["parameters"]
    assert (several / "weights.bin").stat().st_size < 3 * stored + 4096 * 100
    assert graphs < 1_000_000
    assert manifest["target"] == "portable"
    assert list(manifest["variants"]) == list(ALL[1:])


@pytest.mark.parametrize("target", ALL)
def test_every_target_says_the_same(several: Path, target: str) -> None:
    ids = np.random.default_rng(0).integers(0, 256, 40)
    truth, session = Session.load(several), Session.load(several, target=target)
    expected = truth.prefill(ids)
    np.testing.assert_allclose(session.prefill(ids), expected, atol=1e-4 * np.abs(expected).max())
    for name, value in truth.states().items():
        np.testing.assert_allclose(session.states()[name], value, atol=1e-4 * max(1.0, np.abs(value).max()))


def test_shapes_of_one_row_are_static(several: Path) -> None:
    for target in ("web", "mcu"):
        graph = onnx.load(several / f"step.{target}.onnx", load_external_data=False).graph
        values = [*graph.input, *graph.output]
        assert all(dim.HasField("dim_value") for value in values for dim in value.type.tensor_type.shape.dim)
        with pytest.raises(FormatError, match="has the fixed batch 1, this session asks for batch 2"):
            Session.load(several, target=target, batch=2)


def test_the_report_has_a_stage_for_each(several: Path) -> None:
    stages = json.loads((several / "report.json").read_text())["stages"]
    assert [stage["name"] for stage in stages[-5:]] == ["onnx, mcu", "onnx, web", "onnx, cuda", "onnx, cpu", "onnx"]
    assert all(stage["kl_mean"] == pytest.approx(stages[-1]["kl_mean"], rel=1e-2, abs=1e-9) for stage in stages[-5:])


def test_a_target_that_was_not_built_is_refused(several: Path) -> None:
    with pytest.raises(ArgumentError, match=r"^there are no graphs for 'toaster' in it, only for portable, cpu, cuda"):
        Session.load(several, target="toaster")


@pytest.mark.parametrize("precision", ["none", "bf16", "int8", "int4"])
def test_graphs_with_a_mask_stop_rows(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    out = tmp_path / "out"
    done("build", checkpoint, "-o", out, "--order", 4, "--sequences", 2, "--mask", "--quantize", precision)
    config = json.loads((out / "genai_config.json").read_text())
    files = [next(iter(graph.values()))["filename"] for graph in config["model"]["decoder"]["pipeline"]]
    assert files == ["prefill.masked.onnx", "step.masked.onnx"]
    step = onnxruntime.InferenceSession(out / "step.masked.onnx", providers=["CPUExecutionProvider"])
    draw = np.random.default_rng(0)
    states = {
        entry.name: draw.standard_normal([2, *entry.shape[1:]], np.float32) for entry in step.get_inputs()[2:]
    }
    feeds = {"input_ids": np.array([[65], [66]]), "attention_mask": np.array([[1], [0]]), **states}
    _, *after = step.run(None, feeds)
    for before, new in zip(states.values(), after, strict=True):
        np.testing.assert_array_equal(new[1], before[1])
        assert np.abs(new[0] - before[0]).max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "web"), "--mask is for the targets cpu and cuda"),
        (("--target", "cpu", "--quantize", "fp8"), "--quantize fp8 is for the target cuda"),
    ],
)
def test_what_cannot_be_tried_is_refused(
    checkpoint: Path, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    outcome = run("build", checkpoint, "-o", tmp_path / "out", "--mask", *options)
    assert (outcome.code, message in outcome.err) == (2, True), outcome.err


def test_masked_graphs_that_do_not_stop_are_caught(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lazy(lowered: Lowered, inner_step: ir.Model | None) -> Lowered:
        """Graphs that take the mask and heed it in the prefill alone."""
        right = masked(lowered, inner_step)
        step = right.step.clone()
        for node in list(step.graph):
            if node.op_type == "Where":
                node.outputs[0].replace_all_uses_with(node.inputs[1], replace_graph_outputs=True)
        return dataclasses.replace(right, step=step)

    monkeypatch.setattr(pipeline, "masked", lazy)
    outcome = run("build", checkpoint, "-o", tmp_path / "out", "--order", 4, "--sequences", 2, "--mask")
    assert outcome.code == 3
    assert "of stopped rows differs" in outcome.err
