"""All filters of a model reduced to every order that is asked for, each once, and the cost of each choice.

The cost of giving filter f the order d is its sensitivity times its squared error at that order, KL per token; costs
of filters add up. For a price μ per state the cheapest choice is  argmin_d cost(f, d) + μ d  filter by filter: what
an order buys is worth the same wherever one is spent. Falling prices give ever larger states and ever smaller costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.config import Method
from lhcompile.distill.reduction import Reducer, Reduction, factorize, select

__all__ = ["REFINED", "Allocation", "Bank", "allocations", "uniform"]

REFINED = 8
"""Largest order that `auto` refines: variable projection grows with the square of the order."""
_PRICES = 1.5
"""Ratio of one price to the next."""


class Bank:
    """Filters [filters, length] with their weights [filters, bins] or None.

    method: "hankel", "varpro", or "auto", refined where that takes seconds; say: told what is going on
    """

    _RANKS = (8, 32, 128, 512)

    def __init__(self, taps: Tensor, weights: Tensor | None, method: Method, say: Callable[[str], None]) -> None:
        self._taps, self._weights, self._method, self._say = taps, weights, method, say
        self._reducers: dict[int, Reducer] = {}
        self._found: dict[tuple[int, str], Reduction] = {}

    def reduce(self, order: int, method: str | None = None) -> Reduction:
        """The systems of one order, by the bank's method if no other is named."""
        if method is None:
            method = self._method
        if method == "auto":
            method = "varpro" if order <= REFINED else "hankel"
        if (order, method) not in self._found:
            rank = next(rank for rank in self._RANKS if rank >= order)
            filters, length = self._taps.shape
            if rank not in self._reducers:
                self._say(f"factoring {filters} filters of length {length}")
                self._reducers[rank] = factorize(self._taps, rank, self._weights)
            self._say(f"reducing {filters} filters to order {order} ({method})")
            self._found[order, method] = self._reducers[rank].reduce(order, method)
        return self._found[order, method]


@dataclass(frozen=True)
class Allocation:
    """An order for every filter.

    orders: what there is to choose from; choice: int [filters], filter f has order orders[choice[f]]
    predicted: KL per token it should cost
    """

    orders: tuple[int, ...]
    choice: Tensor
    predicted: float

    @property
    def mean(self) -> float:
        """Mean order of the filters."""
        return float(torch.tensor(self.orders, dtype=torch.float64)[self.choice].mean())

    def reduction(self, bank: Bank) -> Reduction:
        """The systems of this allocation."""
        used = sorted(set(self.choice.tolist()))
        places = torch.zeros(len(self.orders), dtype=torch.int64)
        places[used] = torch.arange(len(used))
        return select([bank.reduce(self.orders[place]) for place in used], places[self.choice])


def uniform(costs: Tensor, orders: tuple[int, ...]) -> list[Allocation]:
    """The same order for every filter, by growing order. costs: [filters, orders]"""
    filters = costs.shape[0]
    return [
        Allocation(orders, torch.full((filters,), place), float(costs[:, place].sum())) for place in range(len(orders))
    ]


def allocations(costs: Tensor, orders: tuple[int, ...]) -> list[Allocation]:
    """The cheapest choices for falling prices, by growing state. costs: [filters, orders]"""
    costs = costs.cummin(1).values
    states = torch.tensor(orders, dtype=costs.dtype)
    price = float(costs.max().clamp_min(1e-300))
    least = max(float(costs[:, -1].mean()), 1e-12 * price) / (1 + max(orders)) / 8
    found: list[Allocation] = []
    while price > least:
        choice = (costs + price * states).argmin(1)
        if not found or not torch.equal(choice, found[-1].choice):
            found.append(Allocation(orders, choice, float(costs.gather(1, choice.unsqueeze(1)).sum())))
        price /= _PRICES
    largest = torch.full((costs.shape[0],), len(orders) - 1)
    return [*found, Allocation(orders, largest, float(costs[:, -1].sum()))]
