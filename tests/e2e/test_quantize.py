"""Builds with smaller weights: every target and precision passes its gates, says what it did, and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import done
from lhruntime import Session

from lhcompile.verify import budgets

CELLS = [
    ("fp16", ("cpu", "cuda")),
    ("bf16", ("portable",)),
    ("int8", ("cpu", "portable", "web")),
    ("int4", ("cpu", "portable", "mcu")),
]


def report_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "report.json").read_text()))


@pytest.fixture(scope="module", params=CELLS, ids=lambda cell: cell[0])
def cell(
    request: pytest.FixtureRequest, checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, tuple[str, ...], Path]:
    precision, targets = request.param
    out = tmp_path_factory.mktemp(precision) / "out"
    asked = [part for target in targets for part in ("--target", target)]
    shown = done(
        "build", checkpoint, "-o", out, "--order", 4, "--calibration", text, "--sequences", 4, *asked,
        "--quantize", precision,
    )  # fmt: skip
    assert shown.rows["matrices"].startswith(f"{precision}: ")
    return precision, targets, out


def test_the_report_has_both_stages_of_every_target(cell: tuple[str, tuple[str, ...], Path]) -> None:
    precision, targets, out = cell
    report = report_of(out)
    _, *others = targets
    expected = [f"{kind}, {target}" for target in reversed(others) for kind in ("onnx", precision)]
    names = [stage["name"] for stage in report["stages"]]
    assert names == ["reference", "captured", "distilled", "streamed", *expected, "onnx", precision]
    assert report["quantize"] == precision
    for part in report["weights"]:
        assert part["tensors"] > 0
        assert part["after"] < 0.6 * part["before"]


def test_the_manifest_has_the_figures_of_what_was_written(cell: tuple[str, tuple[str, ...], Path]) -> None:
    precision, targets, out = cell
    manifest, last = json.loads((out / "manifest.json").read_text()), report_of(out)["stages"][-1]
    assert (manifest["quantize"], manifest["target"]) == (precision, targets[0])
    assert manifest["fidelity"]["loss_compiled"] == last["loss"]
    assert {state["dtype"] for state in manifest["states"]} == {"float32"}


def test_it_verifies_and_generates(cell: tuple[str, tuple[str, ...], Path], checkpoint: Path) -> None:
    _, targets, out = cell
    rows = done("verify", out, "--against", checkpoint).rows
    assert rows["cuts"].startswith(f"{4 * len(targets)} ways")
    assert len(done("generate", out, "--prompt", "def ", "-n", 8, "--temperature", 0).out) > 4


def test_outputs_are_near_those_of_the_build_in_single_precision(
    cell: tuple[str, tuple[str, ...], Path], order_4: Path
) -> None:
    precision, targets, out = cell
    ids = np.random.default_rng(0).integers(0, 256, 40)
    truth = Session.load(order_4).prefill(ids)
    for target in targets:
        found = Session.load(out, target=target).prefill(ids)
        share = float(np.sqrt(np.square(found - truth).mean() / np.square(truth).mean()))
        assert 0 < share < {"fp16": 2e-3, "bf16": 2e-2, "int8": 5e-2, "int4": 0.4}[precision]


def test_a_gate_that_is_not_met_stops_the_build(
    checkpoint: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from commands import run

    import lhcompile.verify as verify

    tight = budgets.Tolerance("int4", 1e-9, "none is as tight")
    monkeypatch.setattr(verify, "quantized_tolerance", lambda *_: tight)
    options = ("--order", 4, "--calibration", text, "--sequences", 4, "--quantize", "int4")
    outcome = run("build", checkpoint, "-o", tmp_path / "out", *options)
    assert outcome.code == 3
    assert "int4: logits fed whole differs" in outcome.err
    assert not (tmp_path / "out").exists()
