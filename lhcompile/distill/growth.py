"""Where another pole helps most: starts of a higher order from the systems of a lower one.

A system that leaves P⊥h of the taps gets one more mode, a real pole μ or a pair μ, μ̄. The squared error falls by

    ⟨e(μ), P⊥h⟩² / ‖P⊥e(μ)‖²,    a pair: 2 (y |b|² − Re(x̄ b²)) / (y² − |x|²),

b = ⟨e(μ), P⊥h⟩, x = ⟨e(μ), P⊥e(μ)⟩, y = ⟨e(μ̄), P⊥e(μ)⟩, residues refitted. It is computed in closed form for every
point of a grid and the best is taken: orthogonal least squares (Chen, Billings & Luo 1989), as a start for
`distill.varpro`. The old poles stay, so the error of a higher order is never larger.

*Grid.* Time constants τ from 1 to 2 · length by octaves; at each about πτ angles, at most _ANGLES, closer where they
are small; the real points of both signs apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.distill.closed import Closed, Jets, at_points, bilinear
from lhcompile.distill.modes import project
from lhcompile.distill.varpro import modes_of

__all__ = ["Grid", "grid", "grown"]

_ANGLES = 24
_NEW = 1e-6  # a mode is new if this share of its energy is orthogonal to the others


@dataclass(frozen=True)
class Grid:
    """The polynomials of a bank at the points of the grid: real points, and upper halves of pairs."""

    real: Jets
    upper: Jets

    def __getitem__(self, part: slice | Tensor) -> Grid:
        return Grid(self.real[part], self.upper[part])


def grid(form: Closed) -> Grid:
    """The grid for filters of one length."""
    real, upper = [], []
    for octave in range(math.ceil(math.log2(form.length)) + 2):
        radius = math.exp(-(0.5**octave))
        real += [radius, -radius]
        count = min(_ANGLES, round(math.pi * 2**octave))
        places = [(i + 0.5) / count for i in range(count)]
        angles = [math.pi * (place if count < _ANGLES else place * place) for place in places]
        upper += [complex(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]
    points = (torch.tensor(x, dtype=torch.complex128, device=form.energy.device) for x in (real, upper))
    return Grid(*(at_points(form, x) for x in points))


def grown(poles: Tensor, order: int, form: Closed, points: Grid, pair: bool) -> Tensor:
    """Poles of one order, complex [filters, width] in slots, with a real pole more, or with a pair more."""
    at = points.upper if pair else points.real
    best = at.points[0, _gain(poles, order, form, at, pair).argmax(-1)].unsqueeze(-1)
    if pair:
        return torch.cat([best, best.conj(), poles], -1)
    if order % 2:
        return torch.cat([poles[:, :-1], best], -1)
    return torch.cat([poles, best, torch.zeros_like(best)], -1)


def _gain(poles: Tensor, order: int, form: Closed, at: Jets, pair: bool) -> Tensor:
    """What each point takes off the squared error, [filters, points]; 0 where it is no new mode."""
    x, moment = at.points, at.moment
    own = 2 * (at.even - at.end * at.odd) / (1 - x * x)
    crossed = 2 * (at.even - at.end.conj() * at.odd).real / (1 - x.abs().square())
    whole = crossed
    spanned = []  # products with orthonormal bases of what is there already: the head, the modes
    if not form.plain:
        head = form.whiten.to(x.dtype) @ at.head
        moment = moment - (form.heard.to(x.dtype).unsqueeze(1) @ head).squeeze(1)
        spanned.append(head)
    if order:
        of = modes_of(poles, form, order)
        fit = project(form, of, order)
        across = of.sections.combine(bilinear(at, of.at).mT)[:, :order]
        if not form.plain:
            across = across - of.head[..., :order].mT.to(x.dtype) @ head
        moment = moment - (fit.c.to(x.dtype).unsqueeze(1) @ across).squeeze(1)
        spanned.append(fit.whiten(across))
    for part in spanned:
        own, crossed = own - (part * part).sum(1), crossed - part.abs().square().sum(1)
    if not pair:
        return torch.where(crossed > _NEW * whole, moment.real.square() / crossed.clamp_min(1e-300), 0.0)
    determinant = crossed.square() - own.abs().square()
    gain = 2 * (crossed * moment.abs().square() - (own.conj() * moment * moment).real)
    return torch.where(determinant > _NEW * whole.square(), gain / determinant.clamp_min(1e-300), 0.0)
