"""The modes of a system: their products with each other and with the taps, and the residues that follow.

A section of two poles λ = m ± √D spans the mean M of e(λ₁) and e(λ₂) and their divided difference Δ, real for a pair
and for two real poles alike; an odd order has one lone pole, with M alone, in its last section. The derivatives are

    ∂M/∂m = M',   ∂Δ/∂m = Δ',   ∂M/∂D = Δ'/2,   ∂Δ/∂D = S = (M' − Δ)/(2D)

with M', Δ' the same of e' = ∂e/∂λ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.distill.closed import Closed, Jets, bilinear, jets

__all__ = ["Modes", "Projection", "Sections", "cholesky_solve", "modes", "project"]

_APART = 3e-3  # least distance of the poles of a section, as a share of 1 − |m|
_REGULAR = 1e-10  # added to the Gram matrix of unit modes: what rounding leaves of it is larger where poles are equal


@dataclass(frozen=True)
class Sections:
    """How sections combine their two poles: 1/(2√D) complex and 1/(2D), [filters, sections]; 0 for a lone pole."""

    odd: Tensor
    turn: Tensor

    def combine(self, x: Tensor) -> Tensor:
        """e(λ₁), e(λ₂), e'(λ₁), e'(λ₂), complex [filters, 4·sections, ·], to M, Δ, M', Δ', S of all sections."""
        first, second, slope, other = x.unflatten(1, (4, -1)).unbind(1)
        odd, turn = self.odd.unsqueeze(-1), self.turn.unsqueeze(-1)
        delta, even = (first - second) * odd, (slope + other) / 2
        return torch.cat([(first + second) / 2, delta, even, (slope - other) * odd, (even - delta) * turn], 1)


@dataclass(frozen=True)
class Modes:
    """M, Δ, M', Δ', S of all sections, [filters, 5·sections] in this order, after the best head.

    gram:   float64 [filters, 5·sections, 5·sections]
    moment: float64 [filters, 5·sections], products with the taps
    head:   float64 [filters, head, 5·sections], products with the orthonormal head; empty for the plain norm
    at:     polynomials at the poles, which `sections` combines
    """

    gram: Tensor
    moment: Tensor
    head: Tensor
    at: Jets
    sections: Sections


def modes(form: Closed, mean: Tensor, discriminant: Tensor, lone: bool) -> Modes:
    """The modes of sections m, D [filters, sections]; lone: the last one has one pole, m."""
    discriminant, root = _apart(mean, discriminant, lone)
    at = jets(form, mean, discriminant, root)
    used = discriminant != 0
    odd, turn = (torch.where(used, 0.5 / torch.where(used, x, 1), 0) for x in (root, discriminant))
    sections = Sections(odd, turn)
    gram = sections.combine(sections.combine(bilinear(at, at)).mT).real
    moment = sections.combine(at.moment.unsqueeze(-1)).squeeze(-1).real
    if form.plain:
        return Modes(gram, moment, moment.unsqueeze(1)[:, :0], at, sections)
    head = form.whiten @ sections.combine(at.head.mT).mT.real
    moment = moment - (head.mT @ form.heard.unsqueeze(-1)).squeeze(-1)
    return Modes(gram - head.mT @ head, moment, head, at, sections)


def _apart(mean: Tensor, discriminant: Tensor, lone: bool) -> tuple[Tensor, Tensor]:
    """D held away from 0, but 0 where the last section is a lone pole, and complex √D: [filters, sections]."""
    least = (_APART * (1 - mean.abs()).clamp_min(1e-9)).square() / 4
    apart = torch.where(discriminant < 0, discriminant.clamp_max(-least), torch.maximum(discriminant, least))
    if lone:
        apart = torch.cat([apart[:, :-1], torch.zeros_like(apart[:, -1:])], 1)
    root = apart.abs().sqrt()
    zero = torch.zeros_like(root)
    return apart, torch.complex(torch.where(apart > 0, root, zero), torch.where(apart < 0, root, zero))


@dataclass(frozen=True)
class Projection:
    """The best residues of the first `order` modes, slightly regularised.

    c:       float64 [filters, order], coefficients of M and Δ
    missed:  float64 [filters, 5·sections] = ⟨mode or derivative, P⊥h⟩
    cost:    float64 [filters] = ‖P⊥h‖²
    """

    c: Tensor
    missed: Tensor
    cost: Tensor
    _lower: Tensor
    _scale: Tensor

    def solve(self, right: Tensor) -> Tensor:
        """(ΦᵀΦ)⁻¹ right, [filters, order, ·]."""
        scale = self._scale.unsqueeze(-1)
        return scale * cholesky_solve(self._lower, scale * right)

    def whiten(self, products: Tensor) -> Tensor:
        """Products with the modes, complex [filters, order, ·], to products with an orthonormal basis of them."""
        scaled = self._scale.unsqueeze(-1) * products
        both = torch.cat([scaled.real, scaled.imag], -1)
        real, imag = torch.linalg.solve_triangular(self._lower, both, upper=False).chunk(2, -1)
        return torch.complex(real, imag)


def project(form: Closed, of: Modes, order: int) -> Projection:
    """Taps onto the modes."""
    gram, moment = of.gram[:, :order, :order], of.moment[:, :order]
    size = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = torch.where(size > 1e-150, 1 / size.clamp_min(1e-150), torch.zeros_like(size))
    unit = scale.unsqueeze(-1) * gram * scale.unsqueeze(1)
    unit.diagonal(dim1=-2, dim2=-1).add_(_REGULAR + (scale == 0))
    lower, _ = torch.linalg.cholesky_ex(unit)
    c = scale * cholesky_solve(lower, (scale * moment).unsqueeze(-1)).squeeze(-1)
    missed = of.moment - (c.unsqueeze(1) @ of.gram[:, :order]).squeeze(1)
    cost = form.energy - (c * (moment + missed[:, :order])).sum(-1)
    cost = torch.where(cost < 0, 1e-16 * form.energy, cost).nan_to_num(math.inf, math.inf)
    return Projection(c, missed, cost, lower, scale)


def cholesky_solve(lower: Tensor, right: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ right; by two triangular solves, which accelerators do in batches."""
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)
