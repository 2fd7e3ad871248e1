"""The stage on a continuous signal: the relative error of the outputs takes the place of the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from factories import Continuous
from torch import Tensor

from lhcompile.artifacts import LoadedModel, Program, Signal
from lhcompile.capture import capture
from lhcompile.config import DistillConfig
from lhcompile.distill import distill, factorize
from lhcompile.distill.convolutions import Convolutions
from lhcompile.distill.heal import heal
from lhcompile.distill.norm import tap_norm
from lhcompile.errors import BudgetError
from lhcompile.measure import Reference, compare, divergences
from lhcompile.recognize import recognize
from lhcompile.ssm import ModalSSM


@pytest.fixture(scope="module")
def program() -> Program:
    module = Continuous().eval().requires_grad_(False)
    return recognize(capture(LoadedModel(module, "module", 48, 0, "", signal=Signal(3))))


def noise(rows: int, seed: int = 0) -> Tensor:
    return Signal(3).random(rows, 48, tokens=0, seed=seed)


def error(program: Program, other: Program, features: Tensor) -> float:
    with TemporaryDirectory() as place:
        return compare(Reference(program, features, Path(place) / "r"), {"other": other})["other"].relative_error


def test_the_program_reads_features(program: Program) -> None:
    assert program.signal == Signal(3)
    assert (program.signal.input, program.signal.output) == ("inputs", "outputs")
    assert not program.reads_bytes
    assert next(iter(program.graph.graph.nodes)).target == "inputs"


@pytest.mark.parametrize("same", [False, True])
def test_the_orders_that_are_chosen_keep_the_budget(program: Program, same: bool) -> None:
    config = DistillConfig(budget=0.05, uniform=same)
    distilled = distill(program, config, noise(16))
    assert error(program, distilled.program, noise(16)) <= 0.05
    assert error(program, distilled.program, noise(16, seed=1)) <= 0.06
    layer = distilled.layers[0]
    assert layer.orders is not None
    assert int(layer.orders.max()) < 24
    order = float(layer.orders.double().mean())
    (chosen,) = [trial for trial in distilled.trials if trial.order == pytest.approx(order)]
    assert chosen.expected <= 0.05
    assert chosen.rise == pytest.approx(error(program, distilled.program, noise(16)), rel=1e-3)
    assert chosen.loss == pytest.approx(chosen.rise**2)
    assert all(trial.expected > 0.05 for trial in distilled.trials if trial.order < chosen.order)


def test_a_budget_that_no_order_keeps_names_the_best(program: Program) -> None:
    message = r"no order up to 1 keeps the error of the outputs within 0\.01%: the best is \+\d+\.\d+% at mean order"
    with pytest.raises(BudgetError, match=message):
        distill(program, DistillConfig(budget=1e-4, max_order=1), noise(4))


def test_sensitivities_predict_the_error_of_small_deviations(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Filter by filter, a tenth of a system's deviation costs a hundredth of sensitivity times squared error."""
    monkeypatch.setattr("lhcompile.distill.convolutions.DRAWS", 1000)
    features = noise(8)
    convolutions = Convolutions(program)
    probe = factorize(convolutions.taps, 2, convolutions.heard(features)).reduce(1, "hankel")
    predicted = convolutions.sensitivity(features, [probe]) * probe.error.square() / 100
    for index in range(len(convolutions.taps)):
        taps = convolutions.taps.clone()
        taps[index] += 0.1 * (probe.system.taps(48)[index] - taps[index])
        found = divergences(program, convolutions.with_taps(taps), features).mean()
        assert float(predicted[index]) == pytest.approx(float(found), rel=0.25)


def test_healing_brings_a_damaged_model_back_to_its_source(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lhcompile.distill.heal.RATE", 0.02)
    convolutions = Convolutions(program)
    whole = factorize(convolutions.taps, 8).reduce(8)
    bent = replace(whole, system=ModalSSM(0.97 * whole.system.poles, 0.7 * whole.system.residues, whole.system.direct))
    norm = tap_norm(convolutions.taps, None)
    _, (before, after) = heal(convolutions, bent, norm, noise(16), 60, False, lambda _: None)
    model = convolutions.with_taps(bent.system.taps(48))
    assert before == pytest.approx(float(divergences(program, model, noise(16)[1::4]).mean()))
    assert after < before / 4
