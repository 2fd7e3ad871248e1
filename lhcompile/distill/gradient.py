"""Gradient modal interpolation, after the paper (arXiv 2310.18780): the method to compare with.

All parameters of the modal form

    ĥ_t = Re Σ_n r_n λ_n^t,   λ_n = ρ_n e^{iθ_n},   ρ_n = exp(−exp(a_n)) < 1,

descend one of two losses together; nothing is eliminated:

    l2:  Σ_{k≤t<L} (h_t − ĥ_t)²               the error over the L taps given, but for the k of the head
    H2:  the same + Σ_{t≥L} ĥ_t²              the error over all time, h being 0 after its last tap

where the tail has the closed form

    Σ_{t≥L} ĥ_t² = ½ Re Σ_{mn} [ r_m r_n (λ_m λ_n)^L / (1 − λ_m λ_n) + r_m r̄_n (λ_m λ̄_n)^L / (1 − λ_m λ̄_n) ].

The head (k = 1: the direct term) is free. With input weights the first sum is the weighted norm of `distill.norm`;
the tail is not weighted. A mode is a pair and stays one, except the real last mode of an odd order.

*Settings.* The authors' own, as published, are in `bench/distill_published.py`: AdamW for 30 000 steps at a rate of
6·10⁻⁴, from random poles. Tried here were 7 starts (decays and angles on grids, on a ring, at random, angles that
follow the decay), rates from 0.003 to 0.1 and β₂ from 0.9 to 0.999 with 1500 to 4000 steps, on 24 trained filters of
length 1024 at orders 2, 4 and 8 and on 12 well separated planted systems of order 8. Kept is what is best on planted
systems among those within 1 % of the best on trained filters: Adam with β = (0.9, 0.9), a cosine-decayed rate of 0.05,
3000 steps. Mean errors are 0.110, 0.064, 0.045 and 0.068. A rate of 0.01 with the customary β₂ = 0.999 gave 0.144,
0.071, 0.052 and 0.341 after 4000 steps; a start on a ring 0.142, 0.067, 0.050 and 0.003.

No bound and no guarantee of a minimum; the Hankel bound applies as to any system. Gradients are exact and share the
powers of the poles, so a step costs O(order · length) per filter, without transcendental functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.distill.norm import Norm
from lhcompile.distill.parts import in_parts
from lhcompile.distill.spectrum import powers, radius_limit, stabilise
from lhcompile.parallel import one_thread
from lhcompile.ssm import ModalSSM

__all__ = ["descend", "tail_energy"]


def descend(
    norm: Norm, order: int, steps: int = 3000, rate: float = 0.05, tail: bool = False
) -> tuple[ModalSSM, Tensor]:
    """A system of the given order by gradient descent, and its relative error over the taps [filters].

    tail: the loss is H2 instead of l2
    """
    bytes_each = 8 * 8 * norm.length * (order + 2)
    parts = in_parts(lambda part: _descend_part(norm[part], order, steps, rate, tail), norm.taps, bytes_each)
    fields = [torch.cat([getattr(system, name) for system, _ in parts]) for name in ("poles", "residues", "direct")]
    return ModalSSM(*fields), torch.cat([error for _, error in parts])


@dataclass
class _Modes:
    """What descends: float64 [filters, modes] each; `free` [modes] is 0 for a mode that is real."""

    decay: Tensor
    angle: Tensor
    real: Tensor
    imag: Tensor
    free: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return [self.decay, self.angle, self.real, self.imag]

    @property
    def poles(self) -> Tensor:
        return torch.polar(torch.exp(-self.decay.exp()), self.free * self.angle)

    @property
    def residues(self) -> Tensor:
        return torch.complex(self.real, self.free * self.imag)


def _start(norm: Norm, order: int) -> _Modes:
    """Modes that fade within 1 to `length` taps, the slower the lower their angle, equally small."""
    filters, modes = norm.taps.shape[0], (order + 1) // 2
    place = torch.arange(1, modes + 1, dtype=torch.float64, device=norm.taps.device) / (modes + 1)
    free = torch.ones_like(place)
    if order % 2:
        free[-1] = 0
    small = torch.full_like(place, 0.1 / max(modes, 1))
    starts = (-place * math.log(norm.length), math.pi * place.flip(0).square(), small, small)
    decay, angle, real, imag = (x.repeat(filters, 1).requires_grad_() for x in starts)
    return _Modes(decay, angle, real, imag, free)


@one_thread()
def _descend_part(norm: Norm, order: int, steps: int, rate: float, tail: bool) -> tuple[ModalSSM, Tensor]:
    size = norm.taps.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    target = norm.rows((norm.taps / size).unsqueeze(1)).squeeze(1)
    modes = _start(norm, order)
    time = torch.arange(norm.length, dtype=torch.float64, device=norm.taps.device)
    optimizer = torch.optim.Adam(modes.parameters, lr=rate, betas=(0.9, 0.9))
    for step in range(steps if order and norm.length > 1 else 0):
        optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        if tail:
            with torch.enable_grad():
                tail_energy(modes.poles, modes.residues, norm.length).sum().backward()
        _add_slopes(modes, norm, target, time)
        optimizer.step()
    with torch.no_grad():
        return _system(norm, modes, size)


@torch.no_grad()
def _add_slopes(modes: _Modes, norm: Norm, target: Tensor, time: Tensor) -> None:
    """Add the derivatives of Σ (rows of ĥ − target)² to those of the parameters."""
    poles = modes.poles
    span = powers(_slots(poles, modes.free), norm.length)
    weights = torch.stack([modes.real, -modes.free * modes.imag], -1).flatten(1)
    taps = (weights.unsqueeze(1) @ span).squeeze(1)
    with torch.enable_grad():
        loss = (norm.rows(taps.requires_grad_().unsqueeze(1)).squeeze(1) - target).square().sum()
        (slope,) = torch.autograd.grad(loss, taps)
    moments = span @ torch.stack([slope, time * slope], -1)  # Σ_t slope_t · (1, t) · (Re λ^t, Im λ^t)
    (by_real, of_real), (by_imag, of_imag) = (x.unbind(-1) for x in moments.unflatten(1, (-1, 2)).unbind(2))
    real, imag = modes.real, modes.free * modes.imag
    slopes = [
        -modes.decay.exp() * (real * of_real - imag * of_imag),
        -modes.free * (real * of_imag + imag * of_real),
        by_real,
        -modes.free * by_imag,
    ]
    for parameter, found in zip(modes.parameters, slopes, strict=True):
        parameter.grad = found if parameter.grad is None else parameter.grad + found


def _slots(x: Tensor, free: Tensor) -> Tensor:
    """Each mode with its conjugate, a real mode with 0: complex [filters, modes] → [filters, 2·modes]."""
    return torch.stack([x, torch.where(free > 0, x.conj(), 0)], -1).flatten(-2)


def tail_energy(poles: Tensor, residues: Tensor, start: int) -> Tensor:
    """Σ_{t≥start} (Re Σ_n r_n λ_n^t)² of complex [filters, modes], |λ| < 1 → float64 [filters]."""
    late = residues * poles**start

    def against(other: Tensor, residue: Tensor) -> Tensor:
        each = late.unsqueeze(2) * residue.unsqueeze(1) / (1 - poles.unsqueeze(2) * other.unsqueeze(1))
        return each.sum((1, 2)).real

    return (against(poles, late) + against(poles.conj(), late.conj())) / 2


def _system(norm: Norm, modes: _Modes, size: Tensor) -> tuple[ModalSSM, Tensor]:
    """Modes to slots; direct term and head are the best for them."""
    poles = stabilise(modes.poles, radius_limit(norm.length), norm.head)
    residues = size * modes.residues / torch.where(modes.free > 0, 2.0, 1.0)
    slots = _slots(poles, modes.free), _slots(residues, modes.free)
    system = ModalSSM(*slots, torch.zeros_like(norm.taps[:, 0]))
    error = norm.taps - system.taps(norm.length)
    free = norm.free(error)
    error[:, : norm.head] -= free
    return ModalSSM(*slots, free[:, 0]), norm.relative(error)
