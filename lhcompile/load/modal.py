"""Convolutions that a checkpoint holds as modal systems already: run as such, never fitted.

Families write their kernels as h_t = Re Σ_k R_k p_k^t (+ D at t = 0), with complex poles p and no conjugates, or with
real poles alone. `lhcompile.ssm` has the real form that lhc::modal_ssm takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lhcompile import ops  # noqa: F401  (registers lhc::)

__all__ = ["audible", "complex_modes", "positive", "real_form", "real_modes"]


def complex_modes(u: Tensor, poles: Tensor, residues: Tensor, direct: Tensor) -> Tensor:
    """y = h * u with h_t = Re Σ_k R_k p_k^t + D δ_t.

    u: [batch, time, channels]; poles, residues: complex [channels, modes], |p| < 1; direct: [channels] → like u

    Tables are made in float64 and rounded once. The pair (p, p̄) with residues (R/2, R̄/2) is the real system of two
    states of `lhcompile.ssm`.
    """
    p, r = poles.to(torch.complex128).T, residues.to(torch.complex128).T
    turned = r / (1 + 1j)
    none = torch.zeros_like(p.real)
    own, other = torch.cat([p.real, p.real]), torch.cat([none - p.imag, p.imag])
    return real_form(u, own, other, torch.cat([turned.real, none - turned.imag]), direct)


def real_modes(u: Tensor, poles: Tensor, residues: Tensor, direct: Tensor) -> Tensor:
    """The same with real poles and residues [channels, modes]."""
    own = poles.double().T
    return real_form(u, own, torch.zeros_like(own), residues.double().T, direct)


def real_form(u: Tensor, own: Tensor, other: Tensor, readout: Tensor, direct: Tensor) -> Tensor:
    """The system of these tables [order, channels], as they stand in `lhcompile.ssm.RealModal`."""
    tables = (table.float().contiguous() for table in (own, other, readout, direct.double()))
    y, _ = torch.ops.lhc.modal_ssm(u, *tables, None, None, 1)
    return y


def positive(stored: Tensor, transform: str) -> Tensor:
    """A positive number of what is stored for it; "none" takes it as it is."""
    made = {"none": stored, "exp": stored.exp(), "relu": stored.relu() + 1e-4, "sigmoid": stored.sigmoid()}
    return torch.nn.functional.softplus(stored) if transform == "softplus" else made[transform]


def audible(rates: Tensor, dt: Tensor, bandlimit: float) -> Tensor:
    """Which modes turn by less than bandlimit / 2 of a full turn in a step, bool [channels, modes]."""
    return dt * rates.imag.abs() / (2 * torch.pi) < bandlimit / 2
