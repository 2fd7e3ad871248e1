"""Refined systems of growing order, each from smaller ones.

Order d is refined by `distill.varpro` from several starts, and the best is kept:

- the system of the rung below with the poles that help most, one after the other (`distill.growth`), a pair or a real
  pole first: the squared error never rises from rung to rung, whatever the Hankel windows make of a filter;
- the poles of Kung's realization on each Hankel window (`distill.hankel`): exact where the filter is a system.

All starts take a few steps, the best of them goes on to a local optimum. Rungs are 1, 2, 3, 4, 6, 8, 12, 16, 24, …: an
order costs about as much as all rungs below it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from lhcompile.distill.closed import Closed, closed
from lhcompile.distill.growth import Grid, grid, grown
from lhcompile.distill.norm import Norm
from lhcompile.distill.parts import in_parts
from lhcompile.distill.spectrum import radius_limit, stabilise
from lhcompile.distill.varpro import refine

__all__ = ["Chain", "chain", "rungs_below"]

_TRIED = 6  # steps every start may take


def rungs_below(order: int) -> list[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, 16, 24, … as far as they are below an order."""
    steps = {0} | {step for k in range(order.bit_length()) for step in (1 << k, 3 << k)}
    return sorted(step for step in steps if step < order)


@dataclass(frozen=True)
class Chain:
    """What is known of the refined systems of a bank.

    found: by order, poles in slots, complex [filters, order rounded up to even], and ‖P⊥h‖² there as the closed form
    has it, float64 [filters]
    """

    norm: Norm
    form: Closed
    points: Grid
    found: dict[int, tuple[Tensor, Tensor]] = field(repr=False)

    def __getitem__(self, filters: Tensor | slice) -> Chain:
        found = {order: (poles[filters], cost[filters]) for order, (poles, cost) in self.found.items()}
        return Chain(self.norm[filters], self.form[filters], self.points[filters], found)

    def poles(self, order: int, starts: Callable[[int], list[Tensor]]) -> tuple[Tensor, Tensor]:
        """Poles of an order and ‖P⊥h‖² there; starts(order) gives other poles to start from."""
        for now in [*rungs_below(order), order]:
            if now in self.found:
                continue
            others = starts(now)
            size = 8 * (len(others) + 2) * (self.form.tables[0].numel() + 60 * (now + 2) * (now + 8))

            def raised(part: slice, now: int = now, others: list[Tensor] = others) -> tuple[Tensor, Tensor]:
                return _raised(self[part], now, [start[part] for start in others])

            pieces = in_parts(raised, self.norm.taps, size)
            self.found[now] = (torch.cat([p for p, _ in pieces]), torch.cat([c for _, c in pieces]))
        return self.found[order]


def chain(norm: Norm) -> Chain:
    """The chain of a bank, order 0 known."""

    def begun(part: slice) -> tuple[Closed, Grid]:
        form = closed(norm[part])
        return form, grid(form)

    forms, grids = zip(*in_parts(begun, norm.taps, 8 * (32 * norm.length + 80000)), strict=True)
    form = _joined(forms)
    none = torch.zeros(len(norm.taps), 0, dtype=torch.complex128, device=norm.taps.device)
    return Chain(norm, form, _joined(grids), {0: (none, form.energy)})


def _joined(pieces: Sequence[Any]) -> Any:
    """Dataclasses of tensors [filters, …] joined along the filters."""
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat(list(pieces))
    if isinstance(first, int):
        return first
    return type(first)(*(_joined([getattr(piece, f.name) for piece in pieces]) for f in fields(first)))


def _raised(below: Chain, order: int, starts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The best refined poles of an order and their cost."""
    form, rungs = below.form, rungs_below(order)
    first = rungs[-1]
    starts = [*starts, _grown(below, first, order, real_first=False)]
    if order - first > 1:
        starts.append(_grown(below, first, order, real_first=True))
    elif order > 1:
        starts.append(_grown(below, rungs[-2], order, real_first=False))
    enough = min(1e-4, 10.0 ** min(order - 7, 0))  # gain of the last step: low orders are cheap and go on
    count, filters = len(starts), torch.arange(len(form.energy), device=form.energy.device)
    tried, cost = refine(torch.cat(starts), form[filters.repeat(count)], order, _TRIED, enough)
    best = tried.unflatten(0, (count, -1))[cost.unflatten(0, (count, -1)).argmin(0), filters]
    poles, cost = refine(best, form, order, enough=enough)
    return stabilise(poles, radius_limit(below.norm.length), below.norm.head), cost


def _grown(below: Chain, start: int, order: int, real_first: bool) -> Tensor:
    """Poles of an order from those of a rung: a pair that helps most as long as two are missing, then a real one."""
    poles = below.found[start][0]
    while start < order:
        pair = order - start > 1 and not real_first
        poles = grown(poles, start, below.form, below.points, pair)
        start, real_first = start + 1 + pair, False
    return poles
