"""Gradient modal interpolation, after the paper (arXiv 2310.18780): the method to compare with.

All parameters of the modal form descend the l2 error of the taps together:

    min over ρ, θ, r, φ, D of Σ_t |h_t − ĥ_t|²,   ĥ_t = Re Σ_n r_n e^{iφ_n} (ρ_n e^{iθ_n})^t,   ĥ_0 = h_0,

ρ = exp(−exp(·)) below 1 by construction, Adam with a cosine-decayed rate from poles spread over decays and angles.
Residues are parameters like the others, not eliminated. An odd order has one real pole. No bound, no guarantee
of a minimum; cost O(steps · order · length). The paper's own settings could not be read: rate and steps are ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lhcompile.distill.norm import Norm
from lhcompile.distill.spectrum import radius_limit, stabilise
from lhcompile.ssm import ModalSSM

__all__ = ["descend"]


def descend(norm: Norm, order: int, steps: int = 2000, rate: float = 0.02) -> tuple[ModalSSM, Tensor]:
    """A system of the given order by gradient descent, and its relative error [filters]."""
    filters, length = norm.taps.shape
    slots = (order + 1) // 2
    size = norm.taps.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    target = norm.rows((norm.taps / size).unsqueeze(1)).squeeze(1)
    spread = torch.arange(1, slots + 1, dtype=torch.float64, device=norm.taps.device) / (slots + 1)
    decay = (-(spread * math.log(max(length, 2)))).expand(filters, -1).clone()
    angle = (math.pi * spread.flip(0).square()).expand(filters, -1).clone()
    residue = torch.full((2, filters, slots), 0.1 / max(slots, 1), dtype=torch.float64, device=norm.taps.device)
    free = torch.ones(slots, dtype=torch.float64, device=norm.taps.device)
    if order % 2:
        free[-1] = 0  # the last mode is real
    parameters = [x.requires_grad_() for x in (decay, angle, residue)]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    time = torch.arange(length, dtype=torch.float64, device=norm.taps.device)
    with torch.enable_grad():
        for step in range(steps if slots else 0):
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            magnitude = torch.exp(-decay.exp().unsqueeze(-1) * time)
            phase = (free * angle).unsqueeze(-1) * time
            modes = torch.cat([magnitude * phase.cos(), magnitude * phase.sin()], 1)
            weights = torch.cat([residue[0], -free * residue[1]], -1)
            taps = (weights.unsqueeze(1) @ modes).squeeze(1)
            loss = (norm.rows(taps.unsqueeze(1)).squeeze(1) - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return _system(norm, decay.detach(), free * angle.detach(), residue.detach() * size, free)


def _system(norm: Norm, decay: Tensor, angle: Tensor, residue: Tensor, free: Tensor) -> tuple[ModalSSM, Tensor]:
    """Modes to slots; the direct term is the best for them."""
    poles = stabilise(torch.polar(torch.exp(-decay.exp()), angle), radius_limit(norm.length))
    pair = (free > 0) & (poles.imag != 0)
    zero = torch.zeros_like(decay)
    first = torch.complex(torch.where(pair, residue[0] / 2, residue[0]), torch.where(pair, residue[1] / 2, zero))
    poles = torch.where(pair, poles, torch.complex(poles.real, zero))
    poles = torch.stack([poles, torch.where(pair, poles.conj(), 0)], -1).flatten(-2)
    residues = torch.stack([first, torch.where(pair, first.conj(), 0)], -1).flatten(-2)
    system = ModalSSM(poles, residues, torch.zeros_like(norm.taps[:, 0]))
    error = norm.taps - system.taps(norm.length)
    direct = norm.direct(error)
    error[:, 0] -= direct
    return ModalSSM(poles, residues, direct), norm.relative(error)
