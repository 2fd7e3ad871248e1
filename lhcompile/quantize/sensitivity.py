"""How many bits each weight gets, so that rounding them costs no more of the loss than it may.

Every weight begins with the fewest bits. What rounding one of them costs is measured by itself, as the divergence
KL(model ‖ model with this weight rounded) on a few calibration sequences; of more bits it is taken to fall as the
square of the rounding error does, for it is of second order in it. Those whose next rung saves most divergence a byte
go up, until the loss on all calibration sequences, with every weight rounded as it then stands, is within the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from lhcompile.artifacts import Allotted
from lhcompile.errors import BudgetError
from lhcompile.measure import divergences, losses

__all__ = ["LADDER", "Candidate", "Measure", "Rung", "allot"]

Array = NDArray[Any]
LADDER = ("int4", "int8", "fp16")
SURE = 1.0
"""Standard errors above the mean up to which the rise of the loss is counted."""
CLOSE = 0.9
"""Share of the budget that a prediction aims at."""
FEW = 2**21
"""Numbers of outputs that are compared weight by weight."""
Model = Callable[[Tensor], Tensor]
With = Callable[[Mapping[str, Array]], Model]
"""weights by name → the model with these in place of its own"""


@dataclass(frozen=True)
class Rung:
    """A weight rounded: to what precision, the bytes it takes, the squared error, and how to have its values again."""

    precision: str
    bytes: int
    error: float
    values: Callable[[], Array]


@dataclass
class Candidate:
    """A weight and its rungs; cost: the divergence on the first of them."""

    name: str
    rungs: list[Rung]
    cost: float = 0.0
    at: int = field(default=0)

    def cost_at(self, rung: int) -> float:
        first = self.rungs[0].error
        return self.cost * self.rungs[rung].error / first if first else 0.0

    @property
    def saving(self) -> float:
        """Divergence that the next rung saves, a byte that it takes more."""
        saved = self.cost_at(self.at) - self.cost_at(self.at + 1)
        return saved / max(1, self.rungs[self.at + 1].bytes - self.rungs[self.at].bytes)


class Measure:
    """What a budget is held against, on calibration sequences [rows, time, …], beside the model itself.

    sampled: the model drew the tokens, and the rise of their loss is known best by the divergence
    """

    def __init__(self, model: With, rows: Tensor, sampled: bool) -> None:
        self._with, self._rows, self._sampled = model, rows, sampled
        self._continuous = rows.is_floating_point()
        self._itself = model({})
        width = self._itself(rows[:1, :2]).shape[-1]
        self._few = rows[: max(1, FEW // (rows.shape[1] * width))]
        self._remembered = _Remembered(self._itself)
        self._losses = None if self._continuous else losses(self._itself, rows)

    def cost(self, weights: Mapping[str, Array]) -> float:
        """Mean divergence of the model with these weights, on a few sequences."""
        return float(divergences(self._remembered, self._with(weights), self._few).mean())

    def rise(self, weights: Mapping[str, Array]) -> float:
        """In the budget's own unit: the rise of the loss to be expected, relative to it; of a continuous signal, the
        relative error of the outputs."""
        model = self._with(weights)
        if self._continuous:
            return float(divergences(self._itself, model, self._rows).mean().clamp(min=0)) ** 0.5
        assert self._losses is not None
        if self._sampled:
            risen = divergences(self._itself, model, self._rows)
        else:
            risen = losses(model, self._rows) - self._losses
        error = float(risen.std()) / len(risen) ** 0.5 if len(risen) > 1 else 0.0
        return (float(risen.mean()) + SURE * error) / float(self._losses.mean())


class _Remembered:
    """A model whose outputs for sequences it has seen are kept."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._known: dict[bytes, Tensor] = {}

    def __call__(self, rows: Tensor) -> Tensor:
        key = rows.numpy().tobytes()
        if key not in self._known:
            self._known[key] = self._model(rows)
        return self._known[key]


def allot(
    candidates: Sequence[Candidate], measure: Measure, budget: float, say: Callable[[str], None]
) -> tuple[Allotted, ...]:
    """The rung of every weight. Raises BudgetError, with the best figure, if the highest cost more than `budget`."""
    for index, each in enumerate(candidates):
        say(f"rounding {index + 1} of {len(candidates)} weights by itself")
        each.cost = measure.cost({each.name: each.rungs[0].values()})
    best = float("inf")
    while True:
        rise = measure.rise({each.name: each.rungs[each.at].values() for each in candidates})
        best = min(best, rise)
        say(f"the weights cost {rise:.3%} of the loss, {budget:.3%} allowed")
        if rise <= budget:
            return tuple(_allotted(each) for each in candidates)
        if not _raised(candidates, CLOSE * budget / rise):
            highest = max(rung.precision for each in candidates for rung in each.rungs[-1:])
            raise BudgetError(
                f"rounding the weights to {highest} costs {best:.3%} of the loss where {budget:.3%} is allowed; allow "
                "more with --quantize-budget"
            )


def _raised(candidates: Sequence[Candidate], share: float) -> bool:
    """Whether a weight could go up: those that save most do, until this share of the divergence is left."""
    left = sum(each.cost_at(each.at) for each in candidates)
    goal, raised = left * share, False
    while left > goal or not raised:
        able = [each for each in candidates if each.at + 1 < len(each.rungs)]
        if not able:
            return raised
        first = max(able, key=lambda each: each.saving)
        left -= first.cost_at(first.at) - first.cost_at(first.at + 1)
        first.at += 1
        raised = True
    return True


def _allotted(each: Candidate) -> Allotted:
    rung = each.rungs[each.at]
    return Allotted(each.name, rung.precision, rung.bytes, each.cost, each.cost_at(each.at))
