"""The kernels of S4D and S4 as modes and as taps, from their stored parameters; float64 throughout.

All are of the form  x' = A x + B u,  y = 2 Re(C x)  with A, B, C complex and half of a spectrum that is closed under
conjugation, discretized with a step dt. The diagonal ones have A = diag(λ), so with the pole p of each λ

    zoh:       p = exp(dt λ),                  h_t = 2 Re Σ B C (p − 1)/λ · p^t
    bilinear:  p = (1 + dt λ/2)/(1 − dt λ/2),  h_t = 2 Re Σ B C dt/(1 − dt λ/2) · p^t

DPLR has  A = diag(λ, λ̄) − q q*,  q = (P, P̄), where the low rank couples the halves. On (Re x, Im x) that is real:

    [Re λ  −Im λ]
    [Im λ   Re λ]  −  2 (Re P, Im P)(Re P, Im P)ᵀ

whose eigenvectors are those of the bilinear dA too. A kernel that was prepared for length L > 0 stores C (I − dA^L).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.ssm import ModalSSM

__all__ = [
    "DPLR",
    "bilinear_modes",
    "check_fading",
    "real_alone",
    "rounded",
    "systems_of",
    "with_conjugates",
    "zoh_modes",
]

CHUNK = 16
"""Channels at once, where tables of channels × states × time are made."""

Modes = tuple[Tensor, Tensor]
"""poles, residues, complex128 [channels, modes], of half a spectrum: h_t = 2 Re Σ R p^t"""


def systems_of(channels: int, systems: int) -> Tensor:
    """The system of each channel: they take turns."""
    return torch.arange(channels) % systems


def zoh_modes(rates: Tensor, dt: Tensor, gains: Tensor) -> Modes:
    """rates λ, gains B·C: complex128 [channels, modes]; dt: float64, broadcast against them"""
    poles = torch.exp(dt * rates)
    return poles, gains * torch.expm1(dt * rates) / rates


def bilinear_modes(rates: Tensor, dt: Tensor, gains: Tensor) -> Modes:
    """The same by the bilinear rule."""
    half = dt * rates / 2
    return (1 + half) / (1 - half), gains * dt / (1 - half)


def with_conjugates(poles: Tensor, residues: Tensor, direct: Tensor) -> ModalSSM:
    """The system of half a spectrum, whose other half is conjugate; direct: [channels]"""
    poles, residues = (torch.stack([x, x.conj()], -1).flatten(1) for x in (poles, residues))
    return ModalSSM(poles, residues, direct)


def real_alone(poles: Tensor, residues: Tensor, direct: Tensor) -> ModalSSM:
    """The system of real poles, each of which counts twice: h_t = 2 Σ R p^t."""
    odd = poles.shape[1] % 2
    poles, residues = (torch.nn.functional.pad(x.real, (0, odd)).to(torch.complex128) for x in (poles, residues))
    return ModalSSM(poles, 2 * residues, direct)


@dataclass(frozen=True)
class DPLR:
    """A bank of DPLR systems on real states; channels share them as `systems_of` says.

    a: float64 [systems, states, states]; b: [systems, states]; c: [copies, channels, states], as stored
    dt: [channels]; prepared: the length that c was made for, 0 for c itself
    """

    a: Tensor
    b: Tensor
    c: Tensor
    dt: Tensor
    prepared: int

    @classmethod
    def of(cls, rates: Tensor, p: Tensor, b: Tensor, c: Tensor, dt: Tensor, prepared: int) -> DPLR:
        """From complex128 rates and b [systems, half], p [rank, systems, half], c [copies, channels, half].

        dt: [channels], or [channels, half] for a step of each state: then every channel gets the system Δ A, Δ B of
        its own, Δ = diag(dt), and a step of 1.
        """
        upper = torch.cat([torch.diag_embed(rates.real), torch.diag_embed(-rates.imag)], -1)
        lower = torch.cat([torch.diag_embed(rates.imag), torch.diag_embed(rates.real)], -1)
        low = torch.cat([p.real, p.imag], -1)
        a = torch.cat([upper, lower], -2) - 2 * torch.einsum("rsn,rsm->snm", low, low)
        drive, read = torch.cat([b.real, b.imag], -1), 2 * torch.cat([c.real, -c.imag], -1)
        if dt.ndim > 1:
            which, scale = systems_of(len(dt), len(a)), torch.cat([dt, dt], -1)
            a, drive, dt = scale.unsqueeze(-1) * a[which], scale * drive[which], torch.ones_like(dt[:, 0])
        return cls(a, drive, read, dt, prepared)

    def modal(self, direct: Tensor) -> ModalSSM | None:
        """The system by the eigenvectors of a, filters [copies · channels]; direct: one for each.

        None where the eigenvectors are too nearly parallel for modes in double precision.
        """
        rates, vectors = torch.linalg.eig(self.a)
        if not bool((torch.linalg.cond(vectors) < WORST_CONDITION).all()):
            return None
        order = (rates.imag == 0).int().argsort(dim=-1, stable=True)  # pairs lie side by side, real ones come last
        rates = rates.gather(-1, order)
        vectors = vectors.gather(-1, order.unsqueeze(1).expand_as(vectors))
        gains = torch.linalg.solve(vectors, self.b.to(vectors.dtype).unsqueeze(-1)).squeeze(-1)
        which = systems_of(self.c.shape[1], len(self.a))
        half = self.dt[:, None] * rates[which] / 2
        poles = (1 + half) / (1 - half)
        read = torch.einsum("chn,hnm->chm", self.c.to(vectors.dtype), vectors[which])
        if self.prepared:
            read = read / (1 - poles**self.prepared)
        residues = read * gains[which] * self.dt[:, None] / (1 - half)
        return ModalSSM(poles.expand_as(residues).flatten(0, 1), residues.flatten(0, 1), direct)

    def taps(self, length: int) -> Tensor:
        """h_t = C dA^t dB for t < length, [copies · channels, length], by powers of dA and no modes."""
        which = systems_of(self.c.shape[1], len(self.a))
        parts = [
            self._taps(self.a[which[rows]], self.b[which[rows]], self.c[:, rows], self.dt[rows], length)
            for rows in torch.arange(len(which)).split(CHUNK)
        ]
        return torch.cat(parts, 1).flatten(0, 1)

    def _taps(self, a: Tensor, b: Tensor, c: Tensor, dt: Tensor, length: int) -> Tensor:
        one, half = torch.eye(a.shape[-1], dtype=a.dtype), dt[:, None, None] * a / 2
        step = torch.linalg.solve(one - half, one + half)
        states = torch.linalg.solve(one - half, (dt[:, None] * b).unsqueeze(-1))  # dA^t dB, [channels, states, time]
        if self.prepared:
            whole = one - torch.linalg.matrix_power(step, self.prepared)
            c = torch.linalg.solve(whole.mT, c.permute(1, 2, 0)).permute(2, 0, 1)
        power = step
        while states.shape[-1] < length:
            states = torch.cat([states, power @ states], -1)
            power = power @ power
        return torch.einsum("chn,hnt->cht", c, states[..., :length])


WORST_CONDITION = 1e6
"""Of eigenvectors: at 2e3, taps of modes are exact to 1e-11, at 8e10 (HiPPO-LegS untouched, 16 states) to 1e-4."""


def check_fading(system: ModalSSM) -> None:
    """Raises ValueError where a pole that is kept in single precision has a modulus of 1."""
    moduli = _single(system.poles).abs().amax(-1)
    if not bool((moduli < 1).all()):
        channel = int(moduli.argmax())
        raise ValueError(f"channel {channel} has a pole of modulus {float(moduli[channel]):.9g}, not below 1")


def rounded(system: ModalSSM, length: int) -> tuple[ModalSSM, float]:
    """The system with poles in single precision, and its relative error over `length` taps, of the worst filter.

    Residues follow their poles: they are moved to where the taps come nearest, as far as their own rounding warrants,

        min_r ‖V r − h‖² + ε² ‖V‖² ‖r − r₀‖²,   V the powers of the rounded poles, ε the single unit of rounding

    which counts where residues are large and cancel. The error is that of residues in single precision as well.
    """
    poles, residues, worst = [], [], 0.0
    for part, start in zip(system.poles.split(CHUNK), system.residues.split(CHUNK), strict=True):
        near = _single(part)
        taps, pair = _columns(part, length) @ _real(part, start), near.imag[:, ::2, None] != 0
        columns, before = _columns(near, length), _real(near, start)
        ridge = EPSILON * torch.linalg.matrix_norm(columns)[:, None, None] * torch.eye(before.shape[1]).double()
        missing = torch.cat([taps - columns @ before, torch.zeros_like(before)], 1)
        moved = before + torch.linalg.lstsq(torch.cat([columns, ridge], 1), missing).solution
        error = (columns @ moved.float().double() - taps).norm(dim=1) / taps.norm(dim=1).clamp_min(1e-300)
        worst = max(worst, float(error.max()))
        one, two = moved.unflatten(1, (-1, 2)).unbind(2)
        turned = torch.complex(one, two)
        slots = torch.stack([torch.where(pair, turned, one), torch.where(pair, turned.conj(), two)], 2)
        poles.append(near)
        residues.append(slots.flatten(1))
    return ModalSSM(torch.cat(poles), torch.cat(residues), system.direct), worst


EPSILON = 2.0**-24


def _single(x: Tensor) -> Tensor:
    return x.to(torch.complex64).to(torch.complex128)


def _columns(poles: Tensor, length: int) -> Tensor:
    """What each real number of `_real` is multiplied with in the taps, float64 [filters, length, order]."""
    time = torch.arange(length, dtype=torch.float64)
    powers = torch.polar(poles.abs().unsqueeze(-1) ** time, poles.angle().unsqueeze(-1) * time)
    first, second = powers.unflatten(1, (-1, 2)).unbind(2)
    pair = poles.imag[:, ::2, None] != 0
    one = torch.where(pair, 2 * first.real, first.real)
    two = torch.where(pair, -2 * first.imag, second.real)
    return torch.stack([one, two], 2).flatten(1, 2).mT


def _real(poles: Tensor, residues: Tensor) -> Tensor:
    """Residues as real numbers, [filters, order, 1]: parts of the first of a pair, or those of two real poles."""
    first, second = residues.unflatten(1, (-1, 2)).unbind(2)
    two = torch.where(poles.imag[:, ::2] != 0, first.imag, second.real)
    return torch.stack([first.real, two], 2).flatten(1).unsqueeze(-1)
