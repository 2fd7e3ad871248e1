"""All filters of a model reduced to every order that is asked for, each once, and the cost of each choice.

The cost of giving filter f the order d is its sensitivity times its squared error at that order, KL per token, rounding
in float32 included; costs of filters add up. For a price μ per state the cheapest choice is  argmin_d cost(f, d) + μ d
filter by filter: what an order buys is worth the same wherever one is spent. Falling prices give ever larger states and
ever smaller costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.config import Method
from lhcompile.distill.reduction import Reducer, factorize
from lhcompile.distill.result import Reduction, select, spread

__all__ = ["REFINED", "Allocation", "Bank", "allocations", "uniform"]

REFINED = 8
"""Largest order that `auto` refines: variable projection grows with the square of the order."""
_RANK = 512
"""The largest order; what a smaller one needs is found without it."""
_UNIT = 2.0**-24
"""States are float32."""
_PRICES = 1.25
"""Ratio of one price to the next."""


class Bank:
    """Filters [filters, length] with their weights [filters, bins] or None, reduced on a GPU where torch has one.

    method: "hankel", "varpro", or "auto", refined where that takes seconds; say: told what is going on
    heads: int [filters], first taps that are kept exactly; None: the first alone, which is the direct term
    """

    def __init__(
        self,
        taps: Tensor,
        weights: Tensor | None,
        method: Method,
        say: Callable[[str], None],
        heads: Tensor | None = None,
    ) -> None:
        self._taps, self._weights, self._method, self._say = taps, weights, method, say
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        heads = torch.ones(len(taps), dtype=torch.int64) if heads is None else heads
        self._lengths, self._kind = heads.unique(return_inverse=True)
        self._reducers: list[Reducer] = []
        self._found: dict[tuple[int, str], Reduction] = {}
        self._size: Tensor | None = None

    def reduce(self, order: int, method: str | None = None) -> Reduction:
        """The systems of one order, by the bank's method if no other is named."""
        if method is None:
            method = self._method
        if method == "auto":
            method = "varpro" if order <= REFINED else "hankel"
        if (order, method) not in self._found:
            self._say(f"reducing {len(self._taps)} filters of length {self._taps.shape[1]} to order {order} ({method})")
            parts = [reducer.reduce(order, method, _UNIT).cpu() for reducer in self._each()]
            places = [(self._kind == kind).nonzero().squeeze(1) for kind in range(len(parts))]
            laid = [spread(part, where, len(self._taps)) for part, where in zip(parts, places, strict=True)]
            self._found[order, method] = parts[0] if len(parts) == 1 else select(laid, self._kind)
        return self._found[order, method]

    def squares(self, order: int, method: str | None = None) -> Tensor:
        """Relative squared error of the systems of an order as they will run: in float32, [filters]."""
        found = self.reduce(order, method)
        if self._size is None:
            self._size = torch.ones_like(found.error)
            for kind, reducer in enumerate(self._each()):
                self._size[self._kind == kind] = reducer.norm.size(reducer.norm.taps).cpu().clamp_min(1e-300)
        noise = found.system.noise(_UNIT) / self._size
        return found.error.square() + noise.square()

    def _each(self) -> list[Reducer]:
        """The filters with heads of each length."""
        if not self._reducers:
            for kind, head in enumerate(self._lengths.tolist()):
                rows = self._kind == kind
                weights = None if self._weights is None else self._weights[rows].to(self._device)
                self._reducers.append(factorize(self._taps[rows].to(self._device), _RANK, weights, head=head))
        return self._reducers


@dataclass(frozen=True)
class Allocation:
    """An order for every filter.

    orders: what there is to choose from; choice: int [filters], filter f has order orders[choice[f]]
    predicted: KL per token it should cost; price: KL per token that one more state was worth, 0 if there was no price
    """

    orders: tuple[int, ...]
    choice: Tensor
    predicted: float
    price: float = 0.0

    @property
    def mean(self) -> float:
        """Mean order of the filters."""
        return float(torch.tensor(self.orders, dtype=torch.float64)[self.choice].mean())

    def states(self, sharing: Tensor) -> float:
        """Numbers of state of all channels; sharing: channels of each filter, [filters]."""
        return float((sharing * torch.tensor(self.orders, dtype=torch.float64)[self.choice]).sum())

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


def allocations(costs: Tensor, orders: tuple[int, ...], sharing: Tensor) -> list[Allocation]:
    """The cheapest choices for falling prices, by growing state. costs: [filters, orders]; sharing: [filters], states
    that an order of the filter takes"""
    costs = costs.cummin(1).values
    states = sharing.to(costs).unsqueeze(1) * torch.tensor(orders, dtype=costs.dtype)
    price = float(costs.max().clamp_min(1e-300))
    least = max(float((costs[:, -1] / sharing).mean()), 1e-12 * price) / (1 + max(orders)) / 8
    found: list[Allocation] = []
    while price > least:
        choice = (costs + price * states).argmin(1)
        if not found or not torch.equal(choice, found[-1].choice):
            found.append(Allocation(orders, choice, float(costs.gather(1, choice.unsqueeze(1)).sum()), price))
        price /= _PRICES
    return [*found, Allocation(orders, costs.argmin(1), float(costs[:, -1].sum()), price)]
