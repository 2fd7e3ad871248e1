"""Spectra of modal systems: made stable, packed into slots, and fitted with residues.

A spectrum is complex [filters, order], closed under conjugation, in the slots of `lhcompile.ssm.ModalSSM`:
entries 2i and 2i+1 are a conjugate pair or two real poles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lhcompile.distill.norm import Norm
from lhcompile.distill.parts import in_parts
from lhcompile.ssm import ModalSSM

__all__ = ["fit_residues", "least_squares", "pack", "powers", "radius_limit", "stabilise"]

_SAFE_CUTOFF, _SHARP_CUTOFF = 1e-9, 1e-13  # see least_squares


def radius_limit(length: int) -> float:
    """The largest modulus a pole may have: 1 − 10⁻³/length, and never so near 1 that float32 rounds it to 1.

    Over the whole length such a pole decays by 0.1 %, so a constant filter is met to 3·10⁻⁴.
    """
    return 1.0 - max(1e-3 / length, 2e-7)


def stabilise(poles: Tensor, limit: float, head: int = 1) -> Tensor:
    """Poles outside the unit circle are reflected into it (λ → 1/λ̄), moduli cut to 10^(−3/head) … limit.

    A pole below that is one tap at t = head: the residue that gives it size costs float32 its digits in tap 0.
    Exact zeros, which stand for unused entries, stay.
    """
    modulus = poles.abs()
    wanted = torch.where(modulus > 1, 1 / modulus.clamp_min(1e-300), modulus).clamp(10 ** (-3 / head), limit)
    return torch.where(modulus > 0, poles * (wanted / modulus.clamp_min(1e-300)), poles)


def pack(eigenvalues: Tensor, width: int) -> Tensor:
    """Eigenvalues of real matrices, complex [filters, order], to slots [filters, width], zeros at the end.

    A real eigenvalue has an imaginary part of exactly 0; the others come in pairs of exact conjugates,
    next to each other. Both hold for LAPACK's real Schur form. Pairs come first, then the reals in order
    of size, so that equal spectra are packed alike.
    """
    # real eigenvalues after all pairs; among pairs the order stays, which keeps partners together
    by_size = torch.where(eigenvalues.imag == 0, 2.0 - eigenvalues.real.clamp(-1, 1), 0.0)
    order = torch.sort(by_size, dim=-1, stable=True).indices
    packed = eigenvalues.gather(-1, order)
    return torch.nn.functional.pad(packed, (0, width - packed.shape[-1]))


def powers(poles: Tensor, length: int) -> Tensor:
    """The real functions a spectrum spans, float64 [filters, order, length].

    A pair gives Re λ^t and Im λ^t, two real poles λ₁^t and λ₂^t, t = 0 … length − 1, by repeated doubling
    t → t + k with λ^k from squaring: log₂(length) multiplications, relative error about length·10⁻¹⁶.
    A zero pole, which stands for an unused entry, gives zeros.
    """
    first, second, pair = _slots(poles)
    out = torch.empty(*first.shape, 2, length, dtype=torch.float64, device=poles.device)
    out[..., 0, 0] = (first != 0).double()
    out[..., 1, 0] = (~pair & (second != 0)).double()
    real, imag, other = first.real.clone(), torch.where(pair, first.imag, 0.0), second.real.clone()
    done = 1
    while done < length:
        more = min(done, length - done)
        a, b = out[..., 0, :more], out[..., 1, :more]
        c = torch.where(pair, real, other)
        torch.mul(a, real.unsqueeze(-1), out=out[..., 0, done : done + more])
        out[..., 0, done : done + more].addcmul_(b, imag.unsqueeze(-1), value=-1)
        torch.mul(b, c.unsqueeze(-1), out=out[..., 1, done : done + more])
        out[..., 1, done : done + more].addcmul_(a, imag.unsqueeze(-1))
        real, imag, other = real * real - imag * imag, 2 * real * imag, other * other
        done += more
    return out.flatten(-3, -2)


def _slots(poles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First pole, second pole and "is a conjugate pair" of each slot, [filters, slots] each."""
    slots = poles.unflatten(-1, (-1, 2))
    return slots[..., 0], slots[..., 1], slots[..., 0].imag != 0


def least_squares(rows: Tensor, target: Tensor) -> Tensor:
    """Coefficients x [filters, columns] that minimise ‖Σ x_i rows_i − target‖, and stay of modest size.

    rows: [filters, columns, rows]; target: [filters, rows]. Normal equations with unit columns by a
    symmetric eigendecomposition, then two steps of refinement on the true residual, which carry the
    accuracy of the fit from the square of the condition number back to the condition number.
    Nearly equal poles make directions that need huge residues which cancel, and float32 cannot cancel them:
    directions whose eigenvalue is below 10⁻⁹ are left out, unless those above 10⁻¹³ halve the residual, with
    coefficients whose rounding in float64 is below 10⁻¹⁰ of the target.
    """
    size = rows.norm(dim=-1)
    scale = torch.where(size > 1e-150, 1 / size.clamp_min(1e-150), torch.zeros_like(size))
    unit = rows * scale.unsqueeze(-1)
    values, vectors = torch.linalg.eigh(unit @ unit.mT)
    largest = values[:, -1:].clamp_min(1e-300)

    def solve(cutoff: float) -> tuple[Tensor, Tensor]:
        inverse = torch.where(values > cutoff * largest, 1 / values.clamp_min(1e-300), 0.0)
        x, residual = torch.zeros_like(scale), target
        for _ in range(3):
            moment = vectors.mT @ (unit @ residual.unsqueeze(-1))
            x = x + (vectors @ (inverse.unsqueeze(-1) * moment)).squeeze(-1)
            residual = target - (x.unsqueeze(1) @ unit).squeeze(1)
        return x, residual.norm(dim=-1)

    safe, left = solve(_SAFE_CUTOFF)
    if bool((values[:, 0:1] > _SAFE_CUTOFF * largest).all()):
        x = safe
    else:
        sharp, less = solve(_SHARP_CUTOFF)
        exact = 2e-16 * (sharp * scale).abs().sum(-1) < 1e-10 * target.norm(dim=-1)
        x = torch.where((exact & (less < left / 2)).unsqueeze(-1), sharp, safe)
    rounding = 1e-14 * target.norm(dim=-1, keepdim=True)
    return torch.where(x.abs() > rounding, x * scale, torch.zeros_like(x))


def fit_residues(poles: Tensor, norm: Norm, unit: float = 0.0) -> tuple[ModalSSM, Tensor]:
    """The best system with the given poles, and its relative error.

        min over R, D of ‖h − ĥ‖_w,   ĥ_t = Σ_k R_k λ_k^t + D δ_t   (and over the other taps of the norm's head)

    poles: complex [filters, order], stable, in slots → ModalSSM, float64 [filters]
    The minimum is global: the problem is linear. A pole the fit has no use for becomes an unused entry.
    unit: relative rounding of the states the system will run with: what is minimised is the squared error and the
    squared rounding noise (`ModalSSM.noise`) together, which forbids residues that cancel. The error is still ‖h − ĥ‖.
    Taken in parts of bounded memory.
    """
    bytes_each = 8 * 6 * norm.length * (poles.shape[1] + 2)
    parts = in_parts(lambda part: _fit_part(poles[part], norm[part], unit), norm.taps, bytes_each)
    fields = [torch.cat([getattr(system, name) for system, _ in parts]) for name in ("poles", "residues", "direct")]
    return ModalSSM(*fields), torch.cat([error for _, error in parts])


def _fit_part(poles: Tensor, norm: Norm, unit: float) -> tuple[ModalSSM, Tensor]:
    _, _, pair = _slots(poles)
    if poles.shape[1] == 0:
        error = norm.taps.clone()
        residues = poles.clone()
    else:
        span = powers(poles, norm.length)
        rows, target = norm.rows(span), norm.rows(norm.taps.unsqueeze(1)).squeeze(1)
        if unit:
            gain = unit / (1 - poles.abs().square()) * torch.where(pair, 0.5**0.5, 1.0).repeat_interleave(2, -1)
            rows = torch.cat([rows, torch.diag_embed(gain)], -1)
            target = torch.nn.functional.pad(target, (0, poles.shape[1]))
        x = least_squares(rows, target)
        error = norm.taps - (x.unsqueeze(1) @ span).squeeze(1)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        zero = torch.zeros_like(a)
        first = torch.complex(torch.where(pair, a / 2, a), torch.where(pair, -b / 2, zero))
        second = torch.where(pair, first.conj(), torch.complex(b, zero))
        residues = torch.stack([first, second], -1).flatten(-2)
    free = norm.free(error)
    error[:, : norm.head] -= free
    used = torch.where(residues != 0, poles, torch.zeros_like(poles))
    return ModalSSM(used, residues, free[:, 0]), norm.relative(error)
