"""Variable projection: the poles that are best once the residues are best.

For given poles the residues are a linear least-squares problem, so the error is a function of the poles
alone,  r(θ) = ½ ‖P⊥(θ) h‖_w²,  P⊥ the projection off the span of the modes. It is lowered from a start by
damped Gauss–Newton steps (Golub & Pereyra 1973; Kaufman 1975: the Jacobian is −P⊥ ∂y/∂θ with the residues
held; Levenberg–Marquardt damping), and only by steps that lower it: the result is never worse than its
start, stable always, and a local optimum at convergence. The Hankel bound applies unchanged.

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

from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.distill.norm import Norm
from lhcompile.distill.spectrum import chunks, radius_limit, stabilise

__all__ = ["refine"]

_STEPS = 60
_LIMIT = 8.0  # |θ| beyond this is 1 − |k| < 3·10⁻⁷


@dataclass
class _Point:
    """Parameters of a bank and what a step from there needs.

    theta: [filters, slots, 2]; cost: [filters] = ‖P⊥ h‖_w²
    gradient: [filters, order] = −½ ∂cost/∂θ; curvature: [filters, order, order] = YᵀP⊥Y
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
    parts = chunks(poles.shape[0], 8 * 40 * norm.length * (order + 1))
    refined = [_refine_part(poles[part], norm[part], order, steps) for part in parts]
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
        going = torch.where(lower, gain > 1e-6, damping < 1e4)
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
    """Project the residues out at θ: cost, gradient and Kaufman's curvature."""
    length = norm.length
    p, q = _coefficients(theta)
    phi, u = _responses(p, q, length)

    def late(x: Tensor, delay: int) -> Tensor:
        return x[..., 3 - delay : 3 - delay + length]

    modes = norm.rows(torch.stack([late(phi, 1), late(phi, 2)], 2).flatten(1, 2)[:, :order])
    c, residual = _solve(modes, target)
    c = torch.nn.functional.pad(c, (0, order % 2)).unflatten(-1, (-1, 2)).unsqueeze(-1)
    by_p = c[..., 0, :] * late(u, 1) + c[..., 1, :] * late(u, 2)
    by_q = -c[..., 0, :] * late(u, 2) - c[..., 1, :] * late(u, 3)
    k1, k2 = theta.tanh().unbind(-1)
    by_k1 = ((1 + k2) * (1 - k1.square())).unsqueeze(-1) * by_p
    by_k2 = (1 - k2.square()).unsqueeze(-1) * (k1.unsqueeze(-1) * by_p + by_q)
    slopes = norm.rows(torch.stack([by_k1, by_k2], 2).flatten(1, 2)[:, :order])
    mixed = modes @ slopes.mT
    gram = slopes @ slopes.mT - mixed.mT @ _normal_solve(modes, mixed)
    gradient = (slopes @ residual.unsqueeze(-1)).squeeze(-1)
    return _Point(theta, residual.square().sum(-1), gradient, gram)


def _factor(modes: Tensor) -> tuple[Tensor, Tensor]:
    """Cholesky factor of the Gram matrix of unit modes, slightly regularised, and the modes' inverse sizes."""
    size = modes.norm(dim=-1)
    scale = torch.where(size > 1e-150, 1 / size.clamp_min(1e-150), torch.zeros_like(size))
    gram = scale.unsqueeze(-1) * (modes @ modes.mT) * scale.unsqueeze(1)
    gram.diagonal(dim1=-2, dim2=-1).add_(1e-11 + (scale == 0))
    return torch.linalg.cholesky(gram), scale


def _normal_solve(modes: Tensor, right: Tensor) -> Tensor:
    lower, scale = _factor(modes)
    return scale.unsqueeze(-1) * torch.cholesky_solve(scale.unsqueeze(-1) * right, lower)


def _solve(modes: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares coefficients [filters, order] and the residual [filters, rows]."""
    lower, scale = _factor(modes)
    c = torch.zeros_like(scale)
    residual = target
    for _ in range(2):
        moment = scale.unsqueeze(-1) * (modes @ residual.unsqueeze(-1))
        c = c + scale * torch.cholesky_solve(moment, lower).squeeze(-1)
        residual = target - (c.unsqueeze(1) @ modes).squeeze(1)
    return c, residual


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
    step = torch.nn.functional.pad(step.clamp(-1, 1), (0, order % 2)).unflatten(-1, (-1, 2))
    return (here.theta + step).clamp(-_LIMIT, _LIMIT)
