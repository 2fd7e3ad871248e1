"""The smallest state that keeps the model within its budget.

What an allocation of orders should cost is predicted from the filters' sensitivities; what it does cost is measured
by running the model with it, and judged by `distill.judge`. The search starts where the prediction meets the budget.
What is measured there corrects the prediction, since one to second order is wrong where an error is large; when a few
corrections do not lead to the end, the search gallops, then halves.

*Continuous signals* have no loss. Their budget is the relative l2 error of the outputs, and its square is the cost that
is predicted and measured in place of the divergence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lhcompile.artifacts import Trial
from lhcompile.config import DistillConfig
from lhcompile.distill.bank import Allocation, Bank, allocations, uniform
from lhcompile.distill.judge import Judge
from lhcompile.distill.reduction import Reduction
from lhcompile.errors import BudgetError
from lhcompile.measure import Model

__all__ = ["ORDERS", "search"]

ORDERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_FIRST = 8
"""Orders up to this are looked at first, then up to twice as much, and so on."""
_GUESSES, _TINY = 4, 1e-300
"""Trials that go where the corrected prediction says."""


def search(
    bank: Bank,
    config: DistillConfig,
    judge: Judge,
    sensitivity: Tensor,
    sharing: Tensor,
    model_of: Callable[[Reduction], Model],
    say: Callable[[str], None],
) -> tuple[Allocation, tuple[Trial, ...]]:
    """The smallest allocation within the budget, and all trials on the way.

    judge: of the budget; sensitivity: cost for a relative squared error of a filter of 1, [filters]
    sharing: channels that run through each filter, each with states of its own, [filters]
    model_of: the model with these systems
    Raises BudgetError naming the best that was reached.
    """
    trials: list[Trial] = []
    ruler = judge.ruler
    limit = min(_FIRST, config.max_order)
    while True:
        orders = _orders(limit, config.uniform)
        costs = torch.stack([sensitivity * bank.squares(order) for order in orders], 1)
        ladder = uniform(costs, orders) if config.uniform else allocations(costs, orders, sharing)

        def bound(allocation: Allocation) -> float:
            found = judge(model_of(allocation.reduction(bank)))
            rise, most = ruler.relative(found.measured), ruler.relative(found.bound())
            trial = Trial(allocation.mean, ruler.loss(found.measured), rise, most)
            trials.append(trial)
            say(f"mean order {trial.order:.2f}: {trial.expected:+.3%} at most, {100 * ruler.budget:.3g}% allowed")
            return found.bound()

        enough = [place for place, step in enumerate(ladder) if judge.share * step.predicted <= ruler.limit]
        best = _cheapest(ladder, enough[0] if enough else len(ladder) - 1, bound, ruler.limit)
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


def _orders(limit: int, same: bool) -> tuple[int, ...]:
    """Orders to choose from; a filter may have none of its own, but not all of them."""
    orders = sorted({limit, *(order for order in ORDERS if order <= limit)})
    return tuple(orders if same else [0, *orders])


def _cheapest(
    ladder: list[Allocation], start: int, bound: Callable[[Allocation], float], limit: float
) -> Allocation | None:
    """The first of a ladder whose bound is within the limit, taking it that all after it would be.

    The first few steps go where the prediction, corrected by the last bound, says; then it gallops, then halves.
    """
    failed, passed = -1, len(ladder)
    place, stride, guesses = start, 1, _GUESSES
    while failed < place < passed:
        found = bound(ladder[place])
        passes = found <= limit
        failed, passed = (failed, place) if passes else (place, passed)
        ratio = found / max(ladder[place].predicted, _TINY)
        guess = next((i for i in range(failed + 1, passed) if ladder[i].predicted * ratio <= limit), passed - 1)
        if guesses:
            place, guesses = guess, guesses - 1
        elif passed < len(ladder) and (failed >= 0 or passed == 0):
            place = (failed + passed) // 2
        elif passes:
            place, stride = max(place - stride, 0), 2 * stride
        else:
            place, stride = min(place + stride, len(ladder) - 1), 2 * stride
    return ladder[passed] if passed < len(ladder) else None
