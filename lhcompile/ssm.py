"""Modal state-space mathematics: systems given by their poles and residues.

A modal system of order d maps a signal u to

    x_t = λ x_{t-1} + u_t   (one state per pole, update before read)
    y_t = Σ_k R_k x_{k,t} + D u_t          so that   h_0 = D + Σ_k R_k,   h_t = Σ_k R_k λ_k^t

The spectrum is closed under conjugation and stored in *slots* of two poles: either a conjugate pair
(λ, λ̄) with residues (R, R̄), or two real poles. Hence h is real without taking real parts, and the order
counts real state dimensions: 1 for a real pole, 2 for a conjugate pair.

The recurrence runs in real numbers. A slot holds two real states s with

    s_t = A s_{t-1} + (1, 1)ᵀ u_t,    y_t = Σ_slots c·s_t + D u_t

where a real slot has A = diag(λ₁, λ₂), c = (R₁, R₂). For a conjugate pair λ = a + ib the complex state
z = (1 + i) x is driven by (1 + i) u, so A = [[a, −b], [b, a]] and, because y = 2 Re(R/(1+i) · z),
c = (2 Re Q, −2 Im Q) with Q = R/(1+i). Driving both rows alike costs no input table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ModalSSM", "RealModal", "block_powers"]


@dataclass(frozen=True)
class RealModal:
    """A bank of modal systems in real block form.

    transition: [filters, 2, 2, slots]  A[row, column] of each slot
    readout:    [filters, 2, slots]     c of each slot
    direct:     [filters]               D
    """

    transition: Tensor
    readout: Tensor
    direct: Tensor


@dataclass(frozen=True)
class ModalSSM:
    """A bank of modal systems of one order.

    poles:    complex [filters, order]; order is even; entries 2i and 2i+1 form a slot
    residues: complex [filters, order]
    direct:   real    [filters]

    Unused entries have pole 0 and residue 0. Every |pole| < 1 strictly.
    """

    poles: Tensor
    residues: Tensor
    direct: Tensor

    def __post_init__(self) -> None:
        if self.poles.shape != self.residues.shape or self.poles.shape[-1] % 2:
            raise ValueError(
                f"poles {tuple(self.poles.shape)} and residues {tuple(self.residues.shape)} "
                "must agree and have an even order"
            )
        if not bool((self.poles.abs() < 1).all()):
            raise ValueError(f"a pole has modulus {float(self.poles.abs().max())}, not below 1")

    @property
    def filters(self) -> int:
        return self.poles.shape[0]

    @property
    def orders(self) -> Tensor:
        """Real state dimensions each filter uses, int [filters]: its poles with a non-zero residue."""
        return (self.residues != 0).sum(-1)

    def taps(self, length: int) -> Tensor:
        """Impulse response h_0 … h_{length-1}, float64 [filters, length], by Vandermonde sum."""
        powers = _vandermonde(self.poles.to(torch.complex128), length)
        taps = (self.residues.to(torch.complex128).unsqueeze(1) @ powers).squeeze(1).real
        taps[:, 0] += self.direct
        return taps

    def real(self) -> RealModal:
        """The real block form; see the module's text."""
        poles = self.poles.to(torch.complex128).unflatten(-1, (-1, 2))  # [F, N, 2]
        residues = self.residues.to(torch.complex128).unflatten(-1, (-1, 2))
        pair = poles[..., 0].imag != 0
        first, second = poles[..., 0], poles[..., 1]
        zero = torch.zeros_like(first.real)
        transition = torch.stack(
            [
                torch.stack([first.real, torch.where(pair, -first.imag, zero)], -2),
                torch.stack([torch.where(pair, first.imag, zero), torch.where(pair, first.real, second.real)], -2),
            ],
            -3,
        )
        rotated = residues[..., 0] / (1 + 1j)
        readout = torch.stack(
            [
                torch.where(pair, 2 * rotated.real, residues[..., 0].real),
                torch.where(pair, -2 * rotated.imag, residues[..., 1].real),
            ],
            -2,
        )
        return RealModal(transition, readout, self.direct.to(torch.float64))


def _vandermonde(poles: Tensor, length: int) -> Tensor:
    """λ^t for t = 0 … length-1, complex [filters, order, length]; 0^0 = 1."""
    time = torch.arange(length, dtype=torch.float64, device=poles.device)
    magnitude = poles.abs().unsqueeze(-1) ** time
    return torch.polar(magnitude, poles.angle().unsqueeze(-1) * time)


def block_powers(transition: Tensor, count: int) -> Tensor:
    """A^0 … A^count of each 2×2 block, by doubling, in the dtype given.

    transition: [filters, 2, 2, slots] → [count + 1, filters, 2, 2, slots]
    """
    powers = torch.eye(2, dtype=transition.dtype, device=transition.device)[None, None, :, :, None]
    powers = powers.expand(1, *transition.shape)
    leap = transition  # A^len(powers)
    while len(powers) <= count:
        powers = torch.cat([powers, torch.einsum("fijn,tfjkn->tfikn", leap, powers)])
        leap = torch.einsum("fijn,fjkn->fikn", leap, leap)
    return powers[: count + 1]
