"""Refined systems of every order, each from those of the two orders below.

Order d is refined by `distill.varpro` from several starts, and the best is kept:

- the system of order d − 1 with the real pole that helps most, that of d − 2 with the pair that does
  (`distill.growth`): the squared error never rises with the order, whatever the Hankel windows make of a filter;
- the poles of Kung's realization on each Hankel window (`distill.hankel`): exact where the filter is a system.

All starts take a few steps, the best of them goes on to a local optimum.
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

__all__ = ["Chain", "chain"]

_TRIED = 6  # steps every start may take


@dataclass(frozen=True)
class Chain:
    """What is known of the refined systems of a bank.

    found: for each order from 0 on, poles in slots, complex [filters, order rounded up to even], and ‖P⊥h‖² there as
    the closed form has it, float64 [filters]
    """

    norm: Norm
    form: Closed
    points: Grid
    found: list[tuple[Tensor, Tensor]] = field(repr=False)

    def __getitem__(self, filters: Tensor | slice) -> Chain:
        found = [(poles[filters], cost[filters]) for poles, cost in self.found]
        return Chain(self.norm[filters], self.form[filters], self.points[filters], found)

    def poles(self, order: int, starts: Callable[[int], list[Tensor]]) -> tuple[Tensor, Tensor]:
        """Poles of an order and ‖P⊥h‖² there; starts(order) gives other poles to start from."""
        while len(self.found) <= order:
            now = len(self.found)
            others = starts(now)
            size = 8 * (len(others) + 2) * (self.form.tables[0].numel() + 60 * (now + 2) * (now + 8))

            def raised(part: slice, now: int = now, others: list[Tensor] = others) -> tuple[Tensor, Tensor]:
                return _raised(self[part], now, [start[part] for start in others])

            pieces = in_parts(raised, self.norm.taps, size)
            self.found.append((torch.cat([p for p, _ in pieces]), torch.cat([c for _, c in pieces])))
        return self.found[order]


def chain(norm: Norm) -> Chain:
    """The chain of a bank, order 0 known."""

    def begun(part: slice) -> tuple[Closed, Grid]:
        form = closed(norm[part])
        return form, grid(form)

    forms, grids = zip(*in_parts(begun, norm.taps, 8 * (32 * norm.length + 80000)), strict=True)
    form = _joined(forms)
    none = torch.zeros(len(norm.taps), 0, dtype=torch.complex128, device=norm.taps.device)
    return Chain(norm, form, _joined(grids), [(none, form.energy)])


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
    form, points = below.form, below.points
    starts = [*starts, grown(below.found[-1][0], order - 1, form, points, pair=False)]
    if order > 1:
        starts.append(grown(below.found[-2][0], order - 2, form, points, pair=True))
    enough = min(1e-4, 10.0 ** min(order - 7, 0))  # gain of the last step: low orders are cheap and go on
    count, filters = len(starts), torch.arange(len(form.energy), device=form.energy.device)
    tried, cost = refine(torch.cat(starts), form[filters.repeat(count)], order, _TRIED, enough)
    best = tried.unflatten(0, (count, -1))[cost.unflatten(0, (count, -1)).argmin(0), filters]
    poles, cost = refine(best, form, order, enough=enough)
    return stabilise(poles, radius_limit(below.norm.length), below.norm.head), cost
