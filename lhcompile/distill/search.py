"""The smallest order that keeps the model's loss, the same for every filter.

Orders are tried upwards with the fast method; from the first that keeps the loss, the refined method is tried
downwards, since better poles lower the loss and often save an order.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lhcompile.artifacts import Trial
from lhcompile.config import DistillConfig
from lhcompile.distill.reduction import Reducer, Reduction, factorize
from lhcompile.errors import BudgetError

__all__ = ["ORDERS", "Bank", "search"]

ORDERS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
REFINED = 8
"""Largest order that `auto` refines: variable projection grows with the square of the order."""
TINY = 1e-12
"""A reference loss of zero is taken for this when a rise is relative to it."""


class Bank:
    """All filters of a model, factored as far as the orders asked for need: a small rank costs little."""

    _RANKS = (8, 32, 128, 512)

    def __init__(self, taps: Tensor, weights: Tensor | None, say: Callable[[str], None]) -> None:
        self._taps, self._weights, self._say = taps, weights, say
        self._reducer: Reducer | None = None
        self._rank = 0

    def reduce(self, order: int, method: str) -> Reduction:
        """The systems of one order, by "hankel", "varpro", or "auto": refined where that takes seconds."""
        if method == "auto":
            method = "varpro" if order <= REFINED else "hankel"
        if self._reducer is None or order > self._rank:
            self._rank = next(rank for rank in self._RANKS if rank >= order)
            self._say(f"factoring {self._taps.shape[0]} filters of length {self._taps.shape[1]}")
            self._reducer = factorize(self._taps, self._rank, self._weights)
        self._say(f"reducing {self._taps.shape[0]} filters to order {order} ({method})")
        return self._reducer.reduce(order, method)


def search(
    bank: Bank,
    config: DistillConfig,
    reference: float,
    loss_of: Callable[[Reduction], float],
    say: Callable[[str], None],
) -> tuple[Reduction, tuple[Trial, ...]]:
    """The systems of the smallest order within the budget, and all trials on the way.

    reference: the source's loss; loss_of: the loss of the model with these systems
    Raises BudgetError naming the best that was reached.
    """
    trials: list[Trial] = []

    def attempt(order: int, method: str) -> Reduction | None:
        """The reduction, if it keeps the loss."""
        reduction = bank.reduce(order, method)
        value = loss_of(reduction)
        trials.append(Trial(order, value, (value - reference) / max(reference, TINY), method))
        say(f"order {order}, {method}: loss {trials[-1].rise:+.3%} of {100 * config.rise:.3g}% allowed")
        return reduction if trials[-1].rise <= config.rise else None

    orders = sorted({config.max_order, *(order for order in ORDERS if order <= config.max_order)})
    climbing = "hankel" if config.method == "auto" else config.method
    for place, order in enumerate(orders):
        found = attempt(order, climbing)
        if found is None:
            continue
        if config.method == "auto":
            for refined in reversed([order for order in orders[: place + 1] if order <= REFINED]):
                better = attempt(refined, "varpro")
                if better is None:
                    break
                found = better
        return found, tuple(trials)
    best = min(trials, key=lambda trial: trial.rise)
    raise BudgetError(
        f"no order up to {config.max_order} keeps the loss within {100 * config.rise:.3g}%: the best is "
        f"{best.rise:+.3%} at order {best.order}; allow more with --budget or --max-order, or keep taps with --exact"
    )
