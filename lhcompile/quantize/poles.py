"""Poles in codes of a few bits: how fast they decay and where they turn, never real and imaginary part.

    λ = e^{−d + iθ},  d = smallest · growth^(c − 1),  θ = 2π k / 2^bits

Decays d = −log ρ lie in equal ratios from the slowest of the bank to its fastest, so that every time constant 1/d has
the same relative error, and whatever its code a pole decays: |λ| < 1 needs no check. Code 0 is the pole 0. Angles hold
0 and π exactly, and θ and −θ alike: real poles stay real, conjugate pairs stay conjugate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lhcompile.ssm import ModalSSM

__all__ = ["PoleCodes", "decode_poles", "encode_poles", "round_poles", "taps_bound"]

SLOWEST = 2.0**-21
"""The least decay that is stored. Rounding real and imaginary part to float32 moves a modulus by 2^−24 of itself, which
leaves it below e^{−SLOWEST} (1 + 2^−24) < 1."""
FASTEST = 64.0
"""The largest: e^{−64} is below the rounding error of float64."""
LEAST_BITS, MOST_BITS = 3, 24


@dataclass(frozen=True)
class PoleCodes:
    """decays, angles: int32 [filters, order], below 2^bits; decay c > 0 is smallest · growth^(c − 1)"""

    decays: Tensor
    angles: Tensor
    bits: int
    smallest: float
    growth: float


def encode_poles(poles: Tensor, bits: int) -> PoleCodes:
    """The nearest codes of poles, complex [filters, order]. Raises ValueError for a number of bits out of range."""
    if not LEAST_BITS <= bits <= MOST_BITS:
        raise ValueError(f"{bits} bits for a pole, not between {LEAST_BITS} and {MOST_BITS}")
    decays, zero = _decays(poles)
    smallest, growth = _grid(decays, zero, bits)
    codes = torch.zeros_like(decays)
    if growth > 1:
        codes = (decays / smallest).log() / math.log(growth)
    codes = torch.where(zero, 0, 1 + codes.round().clamp(0, 2**bits - 2))
    angles = (poles.to(torch.complex128).angle() * (2**bits / (2 * math.pi))).round() % 2**bits
    return PoleCodes(codes.to(torch.int32), angles.to(torch.int32), bits, smallest, growth)


def decode_poles(codes: PoleCodes) -> Tensor:
    """complex128 [filters, order], all strictly inside the unit circle, in float32 as well."""
    decays = codes.smallest * codes.growth ** (codes.decays.double() - 1)
    radii = torch.where(codes.decays == 0, 0.0, (-decays).exp())
    turn = 2**codes.bits
    angles = codes.angles.double()
    angles = torch.where(2 * angles > turn, angles - turn, angles)
    theta = angles * (2 * math.pi / turn)
    straight = 2 * angles % turn == 0  # 0 and π: no sine
    return torch.complex(radii * theta.cos(), torch.where(straight, 0.0, radii * theta.sin()))


def round_poles(system: ModalSSM, bits: int) -> ModalSSM:
    """The system with poles that codes of `bits` can hold."""
    poles = decode_poles(encode_poles(system.poles, bits))
    return replace(system, poles=poles.to(system.poles.dtype))


def taps_bound(system: ModalSSM, bits: int, time: Tensor) -> Tensor:
    """How far the taps of `round_poles` can be from the system's, float64 [filters, len(time)]; time: [n]

    λ = e^a and λ̂ = e^â lie no further apart than e^{−t min(d, d̂)} t |a − â|, the mean value theorem along the line from
    a to â, and no further than their moduli added:

        |ĥ_t − h_t| ≤ Σ_k |R_k| e^{−t min(d_k, d̂_k)} min(2, t √(δ_k² + (π / 2^bits)²))

    where δ = d (√growth − 1) is half a step of the decays, on a bank with SLOWEST ≤ d ≤ FASTEST; beyond these, the
    distance to them is added.
    """
    decays, zero = _decays(system.poles)
    _, growth = _grid(decays, zero, bits)
    exact = -system.poles.to(torch.complex128).abs().log()
    exact = torch.where(zero, 1.0, exact)
    step = decays * (math.sqrt(growth) - 1) + (decays - exact).abs()
    slowest = torch.minimum(exact, decays / math.sqrt(growth)).unsqueeze(-1)
    apart = step.hypot(torch.tensor(math.pi / 2**bits)).unsqueeze(-1)
    time = time.double()
    error = (-time * slowest).exp() * (time * apart).clamp(max=2)
    size = torch.where(zero, 0.0, system.residues.abs().double())
    return (size.unsqueeze(-1) * error).sum(1)


def _decays(poles: Tensor) -> tuple[Tensor, Tensor]:
    """d within what can be stored, float64, and which poles are 0 and have none; both [filters, order]"""
    radii = poles.to(torch.complex128).abs()
    zero = radii == 0
    return torch.where(zero, 1.0, -radii.log()).clamp(SLOWEST, FASTEST), zero


def _grid(decays: Tensor, zero: Tensor, bits: int) -> tuple[float, float]:
    """The smallest decay of a bank and the ratio of neighbouring ones."""
    held = decays[~zero]
    if not len(held):
        return 1.0, 1.0
    smallest, largest = float(held.min()), float(held.max())
    return smallest, (largest / smallest) ** (1 / (2**bits - 2))
