"""What the terminal says of a build."""

from __future__ import annotations

import pytest

from lhcompile.screen import costs
from lhcompile.verify.model import ModelReport, Report, StageFidelity

MODEL = ModelReport(family="hyena", source="model.pt", parameters=1, context_length=8)


def report(*stages: StageFidelity) -> Report:
    plain = Report(model=MODEL, target="cpu", command="", stages=list(stages[:1]), state_bytes=0)
    return plain.measured(list(stages), {}, {})


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (2.0, 2.01, "loss 2.00000 → 2.01000  (+0.500%)"),
        (0.0, 0.25, "loss 0.00000 → 0.25000"),  # the model is sure of all tokens that were sampled from it
    ],
)
def test_cost_of_rounding_in_loss(before: float, after: float, said: str) -> None:
    stages = [StageFidelity(name=name, tokens=8, loss=before) for name in ("reference", "onnx")]
    assert costs(report(*stages, StageFidelity(name="int4", tokens=8, loss=after))) == [("cost, int4", said)]


def test_cost_of_rounding_a_continuous_signal() -> None:
    stages = [StageFidelity(name=name, tokens=8, relative_error=1e-6) for name in ("reference", "onnx")]
    found = costs(report(*stages, StageFidelity(name="int8", tokens=8, relative_error=2e-3)))
    assert found == [("cost, int8", "error 1.00e-06 → 2.00e-03")]
