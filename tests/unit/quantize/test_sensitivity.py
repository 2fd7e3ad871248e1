"""Bits go where they save most loss a byte, until the whole is within the budget."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lhcompile.config import QuantizeConfig
from lhcompile.errors import BudgetError
from lhcompile.quantize import Plan, plan_weights, quantize
from lhcompile.quantize.sensitivity import Candidate, Measure, Rung, allot
from lhcompile.quantize.trials import Range

from .toy import toy

Array = NDArray[Any]
WEIGHTS = {"loud": 30.0, "quiet": 1.0, "large": 5.0}
"""How much an error in each counts."""
SIZES = {"loud": 10, "quiet": 10, "large": 100}


def candidates() -> list[Candidate]:
    """Three weights; a rung is a number that its rounding is off by: 4 bits 1, 8 bits 1/16, 16 bits 1/256."""

    rungs = (("int4", 1.0), ("int8", 1 / 16), ("fp16", 1 / 256))
    return [
        Candidate(name, [Rung(precision, SIZES[name] * 2**i, off**2, lambda off=off: np.array(off))
                         for i, (precision, off) in enumerate(rungs)])
        for name in WEIGHTS
    ]  # fmt: skip


class Known(Measure):
    """Costs that are known: the weighted sum of squared errors, as a rise 1 / 1000 of it."""

    def __init__(self) -> None:
        self.measured = 0

    def cost(self, weights: Mapping[str, Array]) -> float:
        return sum(WEIGHTS[name] * float(off) ** 2 for name, off in weights.items())

    def rise(self, weights: Mapping[str, Array]) -> float:
        self.measured += 1
        return self.cost(weights) / 1000


def allotted(budget: float) -> dict[str, str]:
    return {each.name: each.precision for each in allot(candidates(), Known(), budget, lambda _: None)}


def test_nothing_goes_up_that_need_not() -> None:
    assert set(allotted(0.1).values()) == {"int4"}


def test_what_hurts_goes_first() -> None:
    assert allotted(0.01) == {"loud": "int8", "quiet": "int4", "large": "int4"}


def test_loss_is_weighed_by_bytes() -> None:
    """The large one costs five times as much as the quiet one, but ten times the bytes."""
    assert allotted(0.0058) == {"loud": "int8", "quiet": "int8", "large": "int4"}


def test_the_last_rung() -> None:
    assert allotted(1e-4)["loud"] == "fp16"


def test_what_cannot_be_kept_names_the_best() -> None:
    best = sum(WEIGHTS.values()) / 256**2 / 1000
    with pytest.raises(BudgetError, match=rf"rounding the weights to fp16 costs {best:.3%} .* 0.000% is allowed"):
        allot(candidates(), Known(), best / 2, lambda _: None)


@pytest.mark.parametrize("target", ["cpu", "mcu"])
def test_the_plan_is_what_is_built(target: str) -> None:
    """Every weight of the toy, tied to its content; one graph that takes a token a call is fed token by token."""
    source = toy("cpu")
    if target == "mcu":
        source = type(source)(source.step, source.step, "mcu", source.states)
    tokens = torch.randint(0, 20, (4, 8), generator=torch.Generator().manual_seed(0))
    config = QuantizeConfig(quantize="int4")
    free = plan_weights(source, config, 10.0, tokens, sampled=True)
    assert {each.name for each in free.allotted} == {"projection", "head", "embedding"}
    assert {each.precision for each in free.allotted} == {"int4"}
    assert all(each.alone > 0 for each in free.allotted)
    tight = plan_weights(source, config, 1e-4, tokens, sampled=True)
    assert sum(each.bytes for each in tight.allotted) > sum(each.bytes for each in free.allotted)
    parts = quantize(source, config, tight).parts
    assert sum(part.after for part in parts) == sum(each.bytes for each in tight.allotted)


def test_no_budget_is_no_plan() -> None:
    assert plan_weights(toy("cpu"), QuantizeConfig(quantize="int4"), None, torch.zeros(1, 4), False) == Plan()


def test_fixed_scales_hold_light_tails_alone() -> None:
    light, heavy = Range(-3.0, 3.0, 1.0), Range(-30.0, 30.0, 1.0)
    steps = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).clamp(-3, 3)
    unit = 6 / 255
    measured = float(((steps / unit).round() * unit - steps).square().mean().sqrt() / steps.square().mean().sqrt())
    assert light.error == pytest.approx(measured, rel=0.02)
    assert light.error < 0.02 < heavy.error
    assert light.with_other(heavy) == Range(-30.0, 30.0, 1.0)


def test_signals_by_fixed_scales_are_as_near_as_their_range_says() -> None:
    tokens = torch.randint(0, 20, (2, 9), generator=torch.Generator().manual_seed(0))
    source, config = toy("portable"), QuantizeConfig(quantize="int8", activations="static")
    plan = plan_weights(source, config, None, tokens, sampled=False)
    assert 0 < len(plan.signals) <= plan.listened == 2
    types = [node.op_type for node in quantize(source, config, plan).lowered.prefill.graph]
    assert types.count("QuantizeLinear") >= len(plan.signals)
