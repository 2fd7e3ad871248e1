"""The smallest state that keeps the model within its budget.

What an allocation of orders should cost is predicted from the filters' sensitivities; what it does cost is measured
by running the model with it. The search starts where the prediction meets the budget and gallops from there, since a
prediction to second order is wrong where an error is large.

*What other text will see.* The difference of the losses on calibration tokens is an estimate without bias, but a noisy
one: over 32 768 tokens its standard error is half of a budget of 0.1 %. The KL divergence is ten times as sure. It is
the rise that text drawn from the source model would see; that of real text is smaller, since no model predicts it
perfectly. The budget is held against the mean of the two and two of its standard errors. A loss that falls by more than
two of them counts as one that falls by two: text that the model knows badly is no reason to change what it says.

*Continuous signals* have no loss. Their budget is the relative l2 error of the outputs, and its square is the cost that
is predicted and measured in place of the divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.artifacts import Trial
from lhcompile.config import DistillConfig
from lhcompile.distill.bank import Allocation, Bank, allocations, uniform
from lhcompile.distill.reduction import Reduction
from lhcompile.errors import BudgetError

__all__ = ["ORDERS", "Ruler", "search"]

ORDERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
TINY = 1e-12
"""A reference loss of zero is taken for this when a rise is relative to it."""
_FIRST = 8
"""Orders up to this are looked at first, then up to twice as much, and so on."""


@dataclass(frozen=True)
class Ruler:
    """What a budget is measured in. Costs are divergences, nats per token, or squared relative errors of the outputs.

    budget: the rise of the loss allowed, relative to `reference`, the source's; None for a continuous signal, whose
        budget is the relative error of the outputs
    """

    budget: float
    reference: float | None

    @property
    def limit(self) -> float:
        """The cost that the budget allows."""
        return self.budget**2 if self.reference is None else self.budget * max(self.reference, TINY)

    def relative(self, cost: float) -> float:
        """A cost in the budget's own unit."""
        return max(cost, 0.0) ** 0.5 if self.reference is None else cost / max(self.reference, TINY)

    def loss(self, cost: float) -> float:
        """The loss of a model of this cost; of a continuous signal, the cost itself."""
        return cost if self.reference is None else max(self.reference, TINY) + cost

    @property
    def subject(self) -> str:
        return "error of the outputs" if self.reference is None else "rise of the loss"


def search(
    bank: Bank,
    config: DistillConfig,
    ruler: Ruler,
    sensitivity: Tensor,
    sharing: Tensor,
    measured: Callable[[Reduction], tuple[Tensor, Tensor | None]],
    say: Callable[[str], None],
) -> tuple[Allocation, tuple[Trial, ...]]:
    """The smallest allocation within the budget, and all trials on the way.

    ruler: of the budget; sensitivity: cost for a relative squared error of a filter of 1, [filters]
    sharing: channels that run through each filter, each with states of its own, [filters]
    measured: by how much the loss of the model with these systems is above the source's, nats per token, [sequences],
    and its divergence from the source alike; None where the first is the divergence itself
    Raises BudgetError naming the best that was reached.
    """
    trials: list[Trial] = []
    limit = min(_FIRST, config.max_order)
    while True:
        orders = _orders(limit, config.uniform)
        costs = torch.stack([sensitivity * bank.squares(order) for order in orders], 1)
        ladder = uniform(costs, orders) if config.uniform else allocations(costs, orders, sharing)

        def passes(allocation: Allocation) -> bool:
            rises, divergences = measured(allocation.reduction(bank))
            cost, sure = float(rises.mean()), expected(rises, divergences)
            trial = Trial(allocation.mean, ruler.loss(cost), ruler.relative(cost), ruler.relative(sure))
            trials.append(trial)
            say(f"mean order {trial.order:.2f}: {trial.expected:+.3%} expected, {100 * ruler.budget:.3g}% allowed")
            return trial.expected <= ruler.budget

        enough = [place for place, step in enumerate(ladder) if step.predicted <= ruler.limit]
        best = _cheapest(ladder, enough[0] if enough else len(ladder) - 1, passes)
        if best is not None:
            return best, tuple(trials)
        if limit == config.max_order:
            break
        limit = min(2 * limit, config.max_order)
    least = min(trials, key=lambda trial: trial.expected)
    raise BudgetError(
        f"no order up to {config.max_order} keeps the {ruler.subject} within {100 * ruler.budget:.3g}%: the best is "
        f"{least.expected:+.3%} at mean order {least.order:.3g}; allow more with --budget or --max-order, or keep taps "
        "with --exact"
    )


def expected(rises: Tensor, divergences: Tensor | None) -> float:
    """The rise of the loss to be expected of other text, nats per token, on the safe side by two standard errors.

    rises, divergences: of single sequences, [sequences] each, the latter perhaps of fewer; None where the rises are
    divergences. One sequence has no standard error: the larger of the two estimates is taken.
    """
    rise = float(rises.mean())
    noise = float(rises.std()) / len(rises) ** 0.5 if len(rises) > 1 else 0.0
    if divergences is None:
        return rise + 2 * noise
    divergence = float(divergences.mean())
    if len(rises) == 1:
        return max(rise, divergence)
    return (max(rise, -2 * noise) + divergence) / 2 + noise  # of a half the standard error is a half


def _orders(limit: int, same: bool) -> tuple[int, ...]:
    """Orders to choose from; a filter may have none of its own, but not all of them."""
    orders = sorted({limit, *(order for order in ORDERS if order <= limit)})
    return tuple(orders if same else [0, *orders])


def _cheapest(ladder: list[Allocation], start: int, passes: Callable[[Allocation], bool]) -> Allocation | None:
    """The first of a ladder that passes, taking it that all after it would: galloping from `start`, then halving."""
    failed, passed = -1, len(ladder)
    place, stride = start, 1
    while failed < place < passed:
        if passes(ladder[place]):
            passed, beyond = place, place - stride
        else:
            failed, beyond = place, place + stride
        if passed < len(ladder) and (failed >= 0 or passed == 0):
            place = (failed + passed) // 2
        elif passed < len(ladder):
            place, stride = max(beyond, 0), 2 * stride
        else:
            place, stride = min(beyond, len(ladder) - 1), 2 * stride
    return ladder[passed] if passed < len(ladder) else None
