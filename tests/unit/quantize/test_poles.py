"""Poles in codes: strictly stable whatever they are, and the impulse response within the stated bound."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lhcompile.quantize import poles as module
from lhcompile.quantize.poles import PoleCodes, decode_poles, encode_poles, round_poles, taps_bound
from lhcompile.ssm import ModalSSM

SYSTEMS, ORDER = 10_000, 6
TIMES = torch.tensor([0, 1, 2, 3, 7, 20, 100, 1000, 10_000, 100_000])
ROUNDING = 1e-9
"""Of a tap in float64, relative to the residues: 1e5 steps of 1e-16 in a pole's logarithm, with some room."""


def systems(seed: int = 0, filters: int = SYSTEMS) -> ModalSSM:
    """Two conjugate pairs and two real poles a filter, 1 − |λ| spread evenly in its logarithm from 1e-5 to 1; a tenth
    of the slots is not used."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    radii = 1 - 10 ** (-5 * random(filters, 3))
    pair = torch.polar(radii, torch.pi * random(filters, 3))
    poles = torch.stack([pair, pair.conj()], -1)
    real = (1 - 10 ** (-5 * random(filters, 2))) * (random(filters, 2) - 0.5).sign()
    poles[:, 2] = real.to(poles.dtype)
    residues = torch.polar(random(filters, 3), 6.28 * random(filters, 3))
    residues = torch.stack([residues, residues.conj()], -1)
    residues[:, 2] = random(filters, 2).to(poles.dtype) - 0.5
    used = (random(filters, 3) > 0.1).unsqueeze(-1)
    return ModalSSM((poles * used).flatten(1), (residues * used).flatten(1), random(filters))


def taps_at(system: ModalSSM, time: Tensor) -> Tensor:
    """[filters, len(time)]"""
    radii, theta = system.poles.abs().unsqueeze(-1), system.poles.angle().unsqueeze(-1)
    powers = torch.polar(radii**time, theta * time)
    taps = (system.residues.unsqueeze(-1) * powers).sum(1).real
    return taps + system.direct.unsqueeze(-1) * (time == 0)


def excess(system: ModalSSM, rounded: ModalSSM, bits: int) -> Tensor:
    """Error over bound, [filters, len(TIMES)]"""
    error = (taps_at(rounded, TIMES) - taps_at(system, TIMES)).abs()
    noise = ROUNDING * system.residues.abs().sum(-1, keepdim=True)
    return (error - noise).clamp(min=0) / (taps_bound(system, bits, TIMES) + 1e-300)


@pytest.mark.parametrize("bits", [4, 8, 12, 16])
def test_ten_thousand_systems_stay_stable_and_near(bits: int) -> None:
    system = systems(bits)
    assert float(system.poles.abs().max()) > 0.9999
    rounded = round_poles(system, bits)
    assert bool((rounded.poles.abs() < 1).all())
    real = rounded.real()
    assert bool((real.own.float().hypot(real.other.float()) < 1).all())
    assert bool((real.own.float().double().hypot(real.other.float().double()) < 1).all())
    worst = excess(system, rounded, bits)
    assert float(worst.max()) <= 1
    assert float(worst.max()) > 0.3  # the bound says something: some filter comes near it


def test_kinds_of_poles_stay() -> None:
    system = systems()
    poles = round_poles(system, 6).poles
    first, second = poles[:, 0::2], poles[:, 1::2]
    pairs = system.poles[:, 0::2].imag != 0
    assert torch.equal(first[pairs], second[pairs].conj())
    assert bool((poles[:, 4:].imag == 0).all())
    assert torch.equal(poles == 0, system.poles == 0)
    turned = (poles.real * system.poles.real < 0) & (system.poles.imag == 0)
    assert not bool(turned.any())


def test_every_code_decays() -> None:
    """Not only those that encoding makes."""
    every = torch.arange(256, dtype=torch.int32).expand(256, -1)
    slow = encode_poles(torch.tensor([[1 - 1e-15, 0.5]], dtype=torch.complex128), 8)
    poles = decode_poles(replace(slow, decays=every, angles=every.T))
    assert float(poles.abs().max()) < 1
    parts = poles.to(torch.complex64)
    assert float(parts.real.double().hypot(parts.imag.double()).max()) < 1


def test_the_ends_of_the_range() -> None:
    """Slower and faster than can be stored, alone, and none at all."""
    poles = torch.tensor([[1 - 1e-12, 1e-300], [0.25, 0], [-0.25, 0.25]], dtype=torch.complex128)
    system = ModalSSM(poles, torch.ones_like(poles), torch.zeros(3))
    for bits in (3, 16):
        assert float(excess(system, round_poles(system, bits), bits).max()) <= 1
    one = torch.full((2, 2), 0.7, dtype=torch.complex128)
    assert torch.allclose(decode_poles(encode_poles(one, 3)), one, rtol=1e-14)
    assert torch.equal(decode_poles(encode_poles(0 * one, 3)), 0 * one)


def test_codes_of_too_few_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 bits for a pole, not between 3 and 24"):
        encode_poles(torch.zeros(1, 2, dtype=torch.complex64), 2)


def mutants() -> dict[str, PoleCodes]:
    codes = encode_poles(systems().poles, 10)
    return {
        "a coarser grid": encode_poles(systems().poles, 8),
        "the next decay": replace(codes, decays=(codes.decays + 1).clamp(max=1023) * (codes.decays > 0)),
        "the next angle": replace(codes, angles=(codes.angles + 1) % 1024),
        "turned the other way": replace(codes, angles=-codes.angles % 1024),
        "another smallest": replace(codes, smallest=codes.smallest * 1.05),
    }


@pytest.mark.parametrize("name", mutants())
def test_mutants_leave_the_bound(name: str) -> None:
    system = systems()
    changed = replace(system, poles=decode_poles(mutants()[name]))
    assert float(excess(system, changed, 10).max()) > 1


def test_real_and_imaginary_parts_would_not_do() -> None:
    """Eight bits of each put poles on the circle and beyond, which is why none are stored so."""
    parts = torch.view_as_real(systems().poles)
    rounded = torch.view_as_complex((parts * 127).round() / 127)
    assert float(rounded.abs().max()) >= 1
    assert module.SLOWEST > 2**-23
