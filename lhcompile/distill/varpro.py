"""Variable projection: the poles that are best once the residues are best.

For given poles the residues are a linear least-squares problem, so the error is a function of the poles
alone,  r(θ) = ½ ‖P⊥(θ) h‖_w²,  P⊥ the projection off the span of the modes. It is lowered from a start by
damped Gauss–Newton steps on the projected residual (Golub & Pereyra 1973, both terms of its Jacobian:

    J = −P⊥ ∂Φ c − Φ⁺ᵀ (∂Φ)ᵀ P⊥h,    JᵀJ = YᵀP⊥Y + W (ΦᵀΦ)⁻¹ Wᵀ,  Y = ∂Φ c, W = ⟨∂Φ, P⊥h⟩

with Levenberg–Marquardt damping), and only by steps that lower it: a local optimum at convergence, stable always.

*Parameters.* Two poles m ± √D share a section with q = m² − D = k₂, 2m = k₁ (1 + k₂) and k = tanh θ: stable for
every θ, and a pair that meets on the real axis parts into two real poles (or back) without the parameters noticing.
`distill.modes` has the modes of a section and their derivatives by m and D.

*Cost.* Every inner product comes from `distill.closed`: O(order · length) multiplications a step and filter, and
O(order³) for the small matrices; filters that have converged drop out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.distill.closed import Closed
from lhcompile.distill.modes import Modes, cholesky_solve, modes, project

__all__ = ["Point", "beyond", "modes_of", "point", "refine", "to_poles", "to_theta"]

_STEPS = 60


@dataclass
class Point:
    """Parameters of a bank and what is known there.

    theta: [filters, slots, 2]; cost: [filters] = ‖P⊥ h‖_w²
    gradient: [filters, order] = −½ ∂cost/∂θ; curvature: [filters, order, order] = JᵀJ
    """

    theta: Tensor
    cost: Tensor
    gradient: Tensor
    curvature: Tensor

    def __getitem__(self, filters: Tensor) -> Point:
        return Point(*(x[filters] for x in (self.theta, self.cost, self.gradient, self.curvature)))


def refine(poles: Tensor, form: Closed, order: int, steps: int = _STEPS, enough: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Better poles from given ones, complex [filters, width] in slots, and ‖P⊥ h‖_w² [filters] there.

    poles: stable, `order` ≥ 1 of them (width = order rounded up to even), an odd order's last slot (real, 0).
    A filter is left when a step lowers its cost by less than the share `enough`.
    """
    theta = _limited(to_theta(poles), form.length)
    best, cost = theta.clone(), torch.empty_like(form.energy)
    active = torch.arange(len(theta), device=theta.device)
    damping = torch.full_like(cost, 1e-2)
    here = point(theta, form, order)
    for _ in range(steps):
        there = point(_limited(_step(here, damping, order), form.length), form, order)
        lower = there.cost < here.cost
        gain = 1 - there.cost / here.cost.clamp_min(1e-300)
        damping = torch.where(lower, damping / 5, damping * 4).clamp_min(1e-9)
        for name in ("theta", "cost", "gradient", "curvature"):
            old, new = getattr(here, name), getattr(there, name)
            setattr(here, name, torch.where(lower.reshape(-1, *[1] * (old.dim() - 1)), new, old))
        best[active], cost[active] = here.theta, here.cost
        going = torch.where(lower, gain > enough, damping < 1e4) & (here.cost > 1e-15 * form.energy)
        left = int(going.sum())
        if left == 0:
            break
        if left < 0.8 * len(going):
            active, here, damping, form = active[going], here[going], damping[going], form[going]
    return to_poles(best), cost


def to_theta(poles: Tensor) -> Tensor:
    """Slots of two poles to θ [filters, slots, 2]."""
    first, second = poles.unflatten(-1, (-1, 2)).unbind(-1)
    k2 = (first * second).real
    k1 = (first + second).real / (1 + k2)
    edge = 1 - 1e-15
    return torch.stack([k1, k2], -1).clamp(-edge, edge).atanh()


def _limits(length: int) -> tuple[float, float]:
    """Of |θ|, for k₁ and k₂: 1 − |k₂| ≥ 2·10⁻⁷, and 1 − |k₁| ≥ 1/(4·length²), which is a pair 1/length away from 1.

    Nearer to 1 a pair is a straight line over the whole length, and the closed form loses its digits.
    """
    return min(max(8.0, math.log(length * math.sqrt(8))), 14.0), 8.0


def _limited(theta: Tensor, length: int) -> Tensor:
    pairs = zip(theta.unbind(-1), _limits(length), strict=True)
    return torch.stack([x.clamp(-limit, limit) for x, limit in pairs], -1)


def beyond(poles: Tensor, length: int) -> Tensor:
    """Whether refinement cannot start from a spectrum, complex [filters, width] in slots: bool [filters]."""
    theta = to_theta(poles)
    return (_limited(theta, length) != theta).flatten(1).any(-1)


def to_poles(theta: Tensor) -> Tensor:
    """The roots of z² − 2m z + q, the larger real one first: complex [filters, 2·slots]."""
    k1, q = theta.tanh().unbind(-1)
    half = k1 * (1 + q) / 2
    discriminant = half.square() - q
    real = discriminant >= 0
    root = discriminant.abs().sqrt()
    large = half + torch.where(half >= 0, root, -root)
    small = torch.where(large != 0, q / torch.where(large != 0, large, torch.ones_like(large)), 0.0)
    zero = torch.zeros_like(half)
    first = torch.complex(torch.where(real, large, half), torch.where(real, zero, root))
    second = torch.where(real, torch.complex(small, zero), first.conj())
    return torch.stack([first, second], -1).flatten(-2)


def _section(theta: Tensor, order: int) -> tuple[Tensor, Tensor, Tensor]:
    """m and D [filters, slots], and the derivatives of m and D by θ [filters, 2 (k₁, k₂), 2 (m, D), slots]."""
    k1, k2 = theta.tanh().unbind(-1)
    rise1, rise2 = 1 - k1.square(), 1 - k2.square()
    mean = k1 * (1 + k2) / 2
    m1, m2 = rise1 * (1 + k2) / 2, rise2 * k1 / 2
    if order % 2:  # the lone pole is k₁ itself
        mean, m1 = (torch.cat([x[:, :-1], y[:, -1:]], 1) for x, y in ((mean, k1), (m1, rise1)))
    slopes = torch.stack([m1, 2 * mean * m1, m2, 2 * mean * m2 - rise2], 1).unflatten(1, (2, 2))
    return mean, mean.square() - k2, slopes


def modes_of(poles: Tensor, form: Closed, order: int) -> Modes:
    """The modes of poles in slots, complex [filters, order rounded up to even]."""
    mean, discriminant, _ = _section(_limited(to_theta(poles), form.length), order)
    return modes(form, mean, discriminant, bool(order % 2))


def point(theta: Tensor, form: Closed, order: int) -> Point:
    """Project the residues out at θ: cost, gradient and curvature. Parameters: k₁ of all sections, then k₂."""
    slots = theta.shape[1]
    mean, discriminant, by_theta = _section(theta, order)
    of = modes(form, mean, discriminant, bool(order % 2))
    best = project(form, of, order)
    slopes = slice(2 * slots, None)
    a, b = torch.nn.functional.pad(best.c, (0, order % 2)).unflatten(-1, (2, slots)).unbind(1)
    zero = torch.zeros_like(a)
    turn = _by_theta(by_theta, torch.stack([a, b, zero], 1), torch.stack([zero, a / 2, b], 1))[:, :order]
    m, delta, s = best.missed[:, slopes].unflatten(-1, (3, slots)).unbind(1)
    bend = _by_theta(by_theta, torch.stack([m, delta], 1), torch.stack([delta / 2, s], 1))[:, :order, :order]
    mixed = turn @ of.gram[:, slopes, :order]
    both = best.solve(torch.cat([mixed.mT, bend.mT], -1))
    curvature = turn @ of.gram[:, slopes, slopes] @ turn.mT - mixed @ both[..., :order] + bend @ both[..., order:]
    gradient = (turn @ best.missed[:, slopes].unsqueeze(-1)).squeeze(-1)
    return Point(theta, best.cost, gradient, curvature)


def _by_theta(by_theta: Tensor, by_m: Tensor, by_d: Tensor) -> Tensor:
    """Derivatives by θ from those by m and D, laid out by sections.

    by_m, by_d: [filters, kinds, slots] → [filters, 2·slots, kinds·slots], zero between different sections
    """
    both = by_theta[:, :, :1] * by_m.unsqueeze(1) + by_theta[:, :, 1:] * by_d.unsqueeze(1)
    return torch.diag_embed(both).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _step(here: Point, damping: Tensor, order: int) -> Tensor:
    """θ after one Levenberg–Marquardt step, each |Δθ| ≤ 1."""
    diagonal = here.curvature.diagonal(dim1=-2, dim2=-1)
    floor = 1e-9 * diagonal.amax(-1, keepdim=True).clamp_min(1e-300)
    scale = diagonal.clamp_min(floor).rsqrt()
    matrix = scale.unsqueeze(-1) * here.curvature * scale.unsqueeze(1)
    matrix.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1) + 1e-8)
    lower, _ = torch.linalg.cholesky_ex(matrix)
    step = scale * cholesky_solve(lower, (scale * here.gradient).unsqueeze(-1)).squeeze(-1)
    step = step.nan_to_num(0.0, 0.0, 0.0)
    step = torch.nn.functional.pad(step.clamp(-1, 1), (0, order % 2)).unflatten(-1, (2, -1)).mT
    return here.theta + step
