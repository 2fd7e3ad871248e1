"""Builds whose poles, signals and states are rounded too: every step says what it costs, and the result runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import done, refused, run
from lhruntime import Session

from lhcompile import verify
from lhcompile.verify import budgets, states


def report_of(directory: Path) -> dict[str, Any]:
    return dict(json.loads((directory / "report.json").read_text()))


@pytest.fixture(scope="module")
def rounded(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    """Everything at once, for two targets, with graphs that stop rows; and what the terminal showed."""
    out = tmp_path_factory.mktemp("rounded") / "out"
    shown = done(
        "build", checkpoint, "-o", out, "--order", 4, "--calibration", text, "--sequences", 4, "--target", "cpu",
        "--target", "portable", "--quantize", "int8", "--activations", "static", "--poles", 10, "--state", "int8",
        "--mask",
    )  # fmt: skip
    return shown.rows, out


def test_every_step_has_its_own_cost(rounded: tuple[dict[str, str], Path]) -> None:
    rows, out = rounded
    report = report_of(out)
    assert [stage["name"] for stage in report["stages"]] == [
        "reference", "captured", "distilled", "poles", "streamed",
        "onnx, portable", "int8 weights, portable", "int8, portable", "onnx", "int8 weights", "int8", "int8 states",
    ]  # fmt: skip
    steps = [("distilled", "poles"), ("onnx", "int8 weights"), ("int8 weights", "int8"), ("int8", "int8 states")]
    assert [(each["before"], each["after"]) for each in report["passes"]] == steps
    losses = {stage["name"]: stage["loss"] for stage in report["stages"]}
    for each in report["passes"]:
        assert each["rise"] == pytest.approx((losses[each["after"]] - losses[each["before"]]) / losses[each["before"]])
        assert rows[f"cost, {each['after']}"].endswith(f"({each['rise']:+.3%})")
    assert 'id="rounding"' in (out / "report.html").read_text()
    fixed, every = report["fixed_signals"]
    assert 0 < fixed <= every
    assert rows["signals"].startswith(f"{fixed} of {every} ")
    assert report["poles_coded"]["after"] < 0.4 * report["poles_coded"]["before"]
    assert rows["poles"].startswith("10 bits: ")


def test_states_are_what_the_manifest_says(rounded: tuple[dict[str, str], Path], order_4: Path) -> None:
    _, out = rounded
    manifest, plain = (json.loads((each / "manifest.json").read_text()) for each in (out, order_4))
    assert {state["dtype"] for state in manifest["states"]} == {"int8"}
    assert [state["shape"] for state in manifest["states"]] == [state["shape"] for state in plain["states"]]
    assert 4 * report_of(out)["state_bytes"] == report_of(order_4)["state_bytes"]
    session = Session.load(out)
    session.prefill(np.arange(20))
    assert all(value.dtype == np.int8 for value in session.states().values())
    kept = session.snapshot()
    expected = session.step([3])
    session.restore(kept)
    np.testing.assert_array_equal(session.step([3]), expected)


def test_they_verify_and_generate(rounded: tuple[dict[str, str], Path]) -> None:
    _, out = rounded
    assert done("verify", out).rows["cuts"].startswith("8 ways")
    assert len(done("generate", out, "--prompt", "def ", "-n", 8, "--temperature", 0).out) > 4


@pytest.fixture(scope="module")
def options(checkpoint: Path, text: Path) -> tuple[object, ...]:
    return ("build", checkpoint, "--order", 4, "--calibration", text, "--sequences", 4, "-o")


def test_a_budget_gives_more_bits_to_what_hurts(options: tuple[object, ...], tmp_path: Path) -> None:
    shown = done(*options, tmp_path / "free", "--quantize", "int4")
    assert "weights" not in shown.rows
    free = report_of(tmp_path / "free")
    (cost,) = free["passes"]
    allowed = max(cost["rise"], 1e-4) / 4
    shown = done(*options, tmp_path / "kept", "--quantize", "int4", "--quantize-budget", allowed)
    rounding = report_of(tmp_path / "kept")["rounding"]
    precisions = [weight["precision"] for weight in rounding["weights"]]
    assert rounding["requested"] == allowed
    assert set(precisions) & {"int8", "fp16"}
    assert len(precisions) == 1 + 2 * 4 + 1  # the head, two layers, the embedding
    assert rounding["measured"] < cost["rise"]
    assert shown.rows["weights"] == ", ".join(f"{precisions.count(x)} in {x}" for x in dict.fromkeys(precisions))
    for weight in rounding["weights"]:
        assert weight["left"] <= weight["alone"]
    sizes = [(tmp_path / name / "step.onnx").stat().st_size for name in ("free", "kept")]
    assert sizes[0] < sizes[1]


def test_a_budget_that_cannot_be_kept(checkpoint: Path, tmp_path: Path) -> None:
    """Of tokens that the model drew itself the rise of the loss is a divergence, which is above zero."""
    asked = ("--order", 4, "--sequences", 2, "--quantize", "bf16", "--quantize-budget", 1e-9)
    outcome = run("build", checkpoint, "-o", tmp_path / "out", *asked)
    refused(outcome, r"rounding the weights to bf16 costs \d.* where 0.000% is allowed; allow more", code=3)
    assert not (tmp_path / "out").exists()


HALF_STATES_OF_EIGHT_BITS = ("--quantize", "fp8", "--target", "cuda", "--state", "float16")


@pytest.mark.parametrize("asked", [("--state", "int8"), HALF_STATES_OF_EIGHT_BITS])
def test_states_that_drift_too_far(
    options: tuple[object, ...], asked: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = budgets.Tolerance("tight states", 1e-9, "none is as tight", on_average=True)
    monkeypatch.setattr(verify, "state_tolerance", lambda _: tight)
    refused(run(*options, tmp_path / "out", *asked), r"tight states: logits after \d+ steps differs by", code=3)
    assert not (tmp_path / "out").exists()


def test_states_that_add_to_what_signals_do(
    options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tight = budgets.Tolerance("tight sum", 1e-9, "none is as tight", on_average=True)
    monkeypatch.setattr(states, "added_tolerance", lambda _alone, _states: tight)
    outcome = run(*options, tmp_path / "out", *HALF_STATES_OF_EIGHT_BITS)
    refused(outcome, r"tight sum: what is said beside signals that are rounded differs by", code=3)
    assert not (tmp_path / "out").exists()


def test_drift_is_that_of_states_where_signals_have_4_bits(options: tuple[object, ...], tmp_path: Path) -> None:
    """Signals of float8 turn a difference of one state's last bit into one of theirs, which is no drift."""
    done(*options, tmp_path / "out", *HALF_STATES_OF_EIGHT_BITS)
    assert [stage["name"] for stage in report_of(tmp_path / "out")["stages"]][-3:] == ["onnx", "fp8", "float16 states"]
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert {state["dtype"] for state in manifest["states"]} == {"float16"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("--activations", "static"), "--activations static is for --quantize int8"),
        (("--quantize", "int8", "--activations", "static", "--target", "web"), "is for the targets cpu and portable"),
        (("--state", "int8", "--target", "web"), "--state int8 is not for the target web"),
        (("--quantize-budget", 0.1), "--quantize-budget needs --quantize"),
        (("--poles", 2), "--poles: Input should be greater than or equal to 3"),
    ],
)
def test_what_makes_no_sense(
    options: tuple[object, ...], tmp_path: Path, asked: tuple[object, ...], message: str
) -> None:
    refused(run(*options, tmp_path / "out", *asked), message)
