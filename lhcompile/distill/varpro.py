"""Variable projection: the poles that are best once the residues are best.

For given poles the residues are a linear least-squares problem, so the error is a function of the poles
alone,  r(θ) = ½ ‖P⊥(θ) h‖_w²,  P⊥ the projection off the span of the modes. It is lowered from a start by
damped Gauss–Newton steps on the projected residual (Golub & Pereyra 1973, both terms of its Jacobian:

    J = −P⊥ ∂Φ c − Φ⁺ᵀ (∂Φ)ᵀ P⊥h,    JᵀJ = YᵀP⊥Y + W (ΦᵀΦ)⁻¹ Wᵀ,  Y = ∂Φ c, W = ⟨∂Φ, P⊥h⟩

with Levenberg–Marquardt damping), and only by steps that lower it: the result is never worse than its start,
stable always, and a local optimum at convergence. The Hankel bound applies unchanged.

*Parameters.* Two poles share a section  y_t = c₁ φ_{t−1} + c₂ φ_{t−2},  φ the impulse response of
1/(1 − p z⁻¹ + q z⁻²). With q = k₂, p = k₁ (1 + k₂) and k = tanh θ the section is stable for every θ, and a pair
that meets on the real axis parts into two real poles (or back) without the parameters noticing: pairs and
reals are chosen by the data. An odd order has one section with k₂ = 0, c₂ = 0.

*Cost.* φ and u = ∂φ/∂p come from addition formulas by doubling,

    φ_{n+m} = φ_n φ_m − q φ_{n−1} φ_{m−1},

and ∂φ_t/∂q = −u_{t−1}. One step costs O(order · length + order² · length) per filter; filters that have
converged drop out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.distill.norm import Norm
from lhcompile.distill.parts import in_parts
from lhcompile.distill.spectrum import radius_limit, stabilise

__all__ = ["refine"]

_STEPS = 60
_LIMIT = 8.0  # |θ| beyond this is 1 − |k| < 3·10⁻⁷


@dataclass
class _Point:
    """Parameters of a bank and what a step from there needs.

    theta: [filters, slots, 2]; cost: [filters] = ‖P⊥ h‖_w²
    gradient: [filters, order] = −½ ∂cost/∂θ; curvature: [filters, order, order] = JᵀJ
    """

    theta: Tensor
    cost: Tensor
    gradient: Tensor
    curvature: Tensor

    def __getitem__(self, filters: Tensor) -> _Point:
        return _Point(*(x[filters] for x in (self.theta, self.cost, self.gradient, self.curvature)))


def refine(poles: Tensor, norm: Norm, order: int, steps: int = _STEPS) -> Tensor:
    """Better poles from given ones, complex [filters, width] in slots, to the same.

    poles: stable, `order` of them (width = order rounded up to even), an odd order's last slot (real, 0).
    """
    if order == 0 or norm.length < 3:
        return poles
    bytes_each = 8 * 10 * norm.length * (order + 1)
    refined = in_parts(lambda part: _refine_part(poles[part], norm[part], order, steps), norm.taps, bytes_each)
    return stabilise(torch.cat(refined), radius_limit(norm.length))


def _refine_part(poles: Tensor, norm: Norm, order: int, steps: int) -> Tensor:
    theta = _to_theta(poles)
    best = theta.clone()
    target = norm.rows(norm.taps.unsqueeze(1)).squeeze(1)
    active = torch.arange(len(theta), device=theta.device)
    damping = torch.full((len(theta),), 1e-2, dtype=theta.dtype, device=theta.device)
    here = _point(theta, norm, target, order)
    for _ in range(steps):
        there = _point(_step(here, damping, order), norm, target, order)
        lower = there.cost < here.cost
        gain = 1 - there.cost / here.cost.clamp_min(1e-300)
        damping = torch.where(lower, damping / 5, damping * 4).clamp_min(1e-9)
        for name in ("theta", "cost", "gradient", "curvature"):
            old, new = getattr(here, name), getattr(there, name)
            setattr(here, name, torch.where(lower.reshape(-1, *[1] * (old.dim() - 1)), new, old))
        best[active] = here.theta
        going = torch.where(lower, gain > 1e-5, damping < 1e4)
        if not bool(going.any()):
            break
        if int(going.sum()) < 0.8 * len(going):
            active, here, damping = active[going], here[going], damping[going]
            norm, target = norm[going], target[going]
    return _to_poles(best)


def _to_theta(poles: Tensor) -> Tensor:
    """Slots of two poles to θ [filters, slots, 2]."""
    first, second = poles.unflatten(-1, (-1, 2)).unbind(-1)
    k2 = (first * second).real
    k1 = (first + second).real / (1 + k2)
    edge = 1 - 3e-7
    return torch.stack([k1, k2], -1).clamp(-edge, edge).atanh()


def _coefficients(theta: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of each section, [filters, slots]."""
    k1, k2 = theta.tanh().unbind(-1)
    return k1 * (1 + k2), k2


def _to_poles(theta: Tensor) -> Tensor:
    """The roots of z² − p z + q, the larger real one first: complex [filters, 2·slots]."""
    p, q = _coefficients(theta)
    half = p / 2
    discriminant = half.square() - q
    real = discriminant >= 0
    root = discriminant.abs().sqrt()
    large = half + torch.where(half >= 0, root, -root)
    small = torch.where(large != 0, q / torch.where(large != 0, large, torch.ones_like(large)), 0.0)
    zero = torch.zeros_like(half)
    first = torch.complex(torch.where(real, large, half), torch.where(real, zero, root))
    second = torch.where(real, torch.complex(small, zero), first.conj())
    return torch.stack([first, second], -1).flatten(-2)


def _responses(p: Tensor, q: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """φ and u = ∂φ/∂p, [filters, slots, 3 + length] each: times −3 … length − 1 (zeros before time 0)."""
    phi = torch.zeros(*p.shape, length + 3, dtype=p.dtype, device=p.device)
    u = torch.zeros_like(phi)
    phi[..., 3] = 1
    done = 1
    q1 = q.unsqueeze(-1)
    while done < length:
        more = min(done, length - done)
        # times done − 1 and done, the latter by one step of the recurrence
        a, b = phi[..., 2 + done : 3 + done], phi[..., 1 + done : 2 + done]
        da, db = u[..., 2 + done : 3 + done], u[..., 1 + done : 2 + done]
        p1 = p.unsqueeze(-1)
        next_, dnext = p1 * a - q1 * b, a + p1 * da - q1 * db
        now, before = slice(3, 3 + more), slice(2, 2 + more)
        out = slice(3 + done, 3 + done + more)
        qa, qda = q1 * a, q1 * da
        phi[..., out] = next_ * phi[..., now] - qa * phi[..., before]
        u[..., out] = dnext * phi[..., now] - qda * phi[..., before]
        u[..., out] += next_ * u[..., now]
        u[..., out] -= qa * u[..., before]
        done += more
    return phi, u


def _point(theta: Tensor, norm: Norm, target: Tensor, order: int) -> _Point:
    """Project the residues out at θ: cost, gradient and curvature.

    All of it follows from the Gram matrix of the columns φ_{t−1}, φ_{t−2} (modes), u_{t−1}, u_{t−2}, u_{t−3}
    of every section and the taps. Parameters are ordered k₁ of all sections, then k₂.
    """
    slots = theta.shape[1]
    p, q = _coefficients(theta)
    phi, u = _responses(p, q, norm.length)
    late = [x[..., 3 - delay : 3 - delay + norm.length] for x, delay in ((phi, 1), (phi, 2), (u, 1), (u, 2), (u, 3))]
    columns = torch.cat([norm.rows(torch.cat(late, 1)), target.unsqueeze(1)], 1)
    gram = columns @ columns.mT
    c, solve = _residues(gram[:, :order, :order], gram[:, :order, -1])
    slopes = slice(2 * slots, -1)
    missed = gram[:, -1] - (c.unsqueeze(1) @ gram[:, :order]).squeeze(1)  # ⟨column, residual⟩
    c1, c2 = torch.nn.functional.pad(c, (0, order % 2)).unflatten(-1, (2, slots)).unbind(1)
    zero = torch.zeros_like(c1)
    turn = _by_theta(theta, torch.stack([c1, c2, zero], 1), torch.stack([zero, -c1, -c2], 1))[:, :order]
    m1, m2, m3 = missed[:, slopes].unflatten(-1, (3, slots)).unbind(1)
    bend = _by_theta(theta, torch.stack([m1, m2], 1), torch.stack([-m2, -m3], 1))[:, :order, :order]
    mixed = turn @ gram[:, slopes, :order]
    curvature = turn @ gram[:, slopes, slopes] @ turn.mT - mixed @ solve(mixed.mT) + bend @ solve(bend.mT)
    cost = missed[:, -1] - (c * missed[:, :order]).sum(-1)
    gradient = (turn @ missed[:, slopes].unsqueeze(-1)).squeeze(-1)
    return _Point(theta, cost, gradient, curvature)


def _by_theta(theta: Tensor, by_p: Tensor, by_q: Tensor) -> Tensor:
    """Derivatives by θ from those by p and q, laid out by sections.

    by_p, by_q: [filters, kinds, slots] → [filters, 2·slots, kinds·slots], zero between different sections
    """
    k1, k2 = (x.unsqueeze(1) for x in theta.tanh().unbind(-1))
    by_k1 = (1 + k2) * (1 - k1.square()) * by_p
    by_k2 = (1 - k2.square()) * (k1 * by_p + by_q)
    return torch.diag_embed(torch.stack([by_k1, by_k2], 1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _residues(gram: Tensor, moment: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Coefficients c of the modes, and the inverse of their Gram matrix, slightly regularised."""
    size = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    scale = torch.where(size > 1e-150, 1 / size.clamp_min(1e-150), torch.zeros_like(size))
    unit = scale.unsqueeze(-1) * gram * scale.unsqueeze(1)
    unit.diagonal(dim1=-2, dim2=-1).add_(1e-10 + (scale == 0))
    lower = torch.linalg.cholesky(unit)

    def solve(right: Tensor) -> Tensor:
        return scale.unsqueeze(-1) * torch.cholesky_solve(scale.unsqueeze(-1) * right, lower)

    return solve(moment.unsqueeze(-1)).squeeze(-1), solve


def _step(here: _Point, damping: Tensor, order: int) -> Tensor:
    """θ after one Levenberg–Marquardt step, each |Δθ| ≤ 1."""
    diagonal = here.curvature.diagonal(dim1=-2, dim2=-1)
    floor = 1e-9 * diagonal.amax(-1, keepdim=True).clamp_min(1e-300)
    scale = diagonal.clamp_min(floor).rsqrt()
    matrix = scale.unsqueeze(-1) * here.curvature * scale.unsqueeze(1)
    matrix.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1) + 1e-10)
    values, vectors = torch.linalg.eigh(matrix)
    moment = vectors.mT @ (scale * here.gradient).unsqueeze(-1)
    step = scale * (vectors @ (moment / values.clamp_min(1e-12).unsqueeze(-1))).squeeze(-1)
    step = torch.nn.functional.pad(step.clamp(-1, 1), (0, order % 2)).unflatten(-1, (2, -1)).mT
    return (here.theta + step).clamp(-_LIMIT, _LIMIT)
