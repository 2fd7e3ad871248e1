"""Prefill of modal systems by FFT, in several ways, and by chunks: time, memory, accuracy. See bench/prefill.py."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.prefill_graphs import LONG, in_turns, operator, poles_of, prefill_of, session
from lhcompile.ops import fft_convolve
from lhcompile.ssm import ModalSSM

__all__ = ["COMPETITORS", "accuracy", "costs", "print_peak"]

RADII, ORDERS, FILTERS = (0.9, 0.99, 0.999, 0.9999), (4, 8, 16), 32
Row = dict[str, Any]
Run = Callable[[Tensor], tuple[Tensor, Tensor]]
"""u [batch, time, channels] → y like u, complex modal states [channels, order]"""


def by_chunks(system: ModalSSM, length: int) -> Run:
    opened = session(prefill_of(operator(system)))
    real, half = system.real(), system.poles.shape[1] // 2
    past = np.zeros((1, *real.own.shape), np.float32)

    def run(u: Tensor) -> tuple[Tensor, Tensor]:
        y, state = opened.run(None, {"inputs": u.numpy(), "past": past})
        rows = torch.from_numpy(state[0])
        first = torch.complex(rows[:half], rows[half:]).T / (1 + 1j)  # z = (1 + i) x
        return torch.from_numpy(y), torch.stack([first, first.conj()], -1).flatten(1)

    return run


def powers(system: ModalSSM, length: int) -> Tensor:
    """λ^t, complex128 [filters, order, length]"""
    return torch.polar(
        system.poles.abs()[..., None] ** torch.arange(length), system.poles.angle()[..., None] * torch.arange(length)
    )


def spectrum(taps: Tensor, length: int) -> Tensor:
    return torch.fft.rfft(taps, n=2 * length).to(torch.complex64)


def filtered(u: Tensor, *spectra: Tensor) -> list[Tensor]:
    """u [1, time, channels] → the convolutions with each response, [..., channels, time]"""
    size = 2 * u.shape[1]
    heard = torch.fft.rfft(u[0].T.contiguous(), n=size)
    return [torch.fft.irfft(heard * response, n=size)[..., : u.shape[1]] for response in spectra]


def by_fft_and_powers(system: ModalSSM, length: int) -> Run:
    response, back = spectrum(system.taps(length), length), powers(system, length)[:, ::2].flip(-1)
    back = torch.view_as_real(back.to(torch.complex64)).permute(0, 2, 1, 3).flatten(2).contiguous()

    def run(u: Tensor) -> tuple[Tensor, Tensor]:
        (y,) = filtered(u, response)
        state = torch.bmm(u[0].T.unsqueeze(1), back).squeeze(1)
        first = torch.view_as_complex(state.unflatten(1, (-1, 2)))
        return y.T[None], torch.stack([first, first.conj()], -1).flatten(1)

    return run


def by_fft_per_mode(system: ModalSSM, length: int) -> Run:
    """One of each pair; real and imaginary part are filters of their own."""
    modes = powers(system, length)[:, ::2]
    responses = spectrum(torch.stack([modes.real, modes.imag], 0).transpose(1, 2), length)  # [2, slots, channels, bins]
    read = 2 * torch.view_as_real(system.residues[:, ::2].to(torch.complex64)).permute(2, 1, 0)

    def run(u: Tensor) -> tuple[Tensor, Tensor]:
        (states,) = filtered(u, responses)
        y = (read[0, ..., None] * states[0] - read[1, ..., None] * states[1]).sum(0)
        first = torch.complex(*states[..., -1]).T
        return y.T[None], torch.stack([first, first.conj()], -1).flatten(1)

    return run


def companion(system: ModalSSM, length: int, outputs_too: bool) -> Run:
    """v = u / den(z), modal state n = Π_{i≠n} (1 − λ_i z⁻¹) v. outputs_too: y = num(z) v, where else it has its FFT."""
    den, others = expanded(system.poles), others_of(system.poles)
    response = torch.zeros(system.filters, length, dtype=torch.float64)
    for t in range(length):
        past = [-den[:, k] * response[:, t - k] for k in range(1, min(t, den.shape[1] - 1) + 1)]
        response[:, t] = sum(past, torch.zeros(system.filters).double()) + (t == 0)
    read = others.to(torch.complex64)
    numerator = (system.residues[..., None] * others).sum(1).real.float()
    spectra = [spectrum(response, length), *([] if outputs_too else [spectrum(system.taps(length), length)])]

    def run(u: Tensor) -> tuple[Tensor, Tensor]:
        v, *y = filtered(u, *spectra)
        latest = v[:, -read.shape[2] :].flip(-1).to(torch.complex64)
        state = (read * latest[:, None]).sum(-1)
        if outputs_too:
            padded = torch.nn.functional.pad(v, (numerator.shape[1] - 1, 0))
            parts = (numerator[:, k, None] * padded[:, padded.shape[1] - u.shape[1] - k :][:, : u.shape[1]]
                     for k in range(numerator.shape[1]))  # fmt: skip
            y = [sum(parts, torch.zeros_like(v))]
        return y[0].T[None], state

    return run


def expanded(poles: Tensor) -> Tensor:
    """Π (1 − λ z⁻¹), [..., order] → [..., order + 1]"""
    polynomial = torch.ones_like(poles[..., :1])
    for pole in poles.unbind(-1):
        longer = torch.nn.functional.pad(polynomial, (0, 1))
        polynomial = longer - pole[..., None] * torch.nn.functional.pad(polynomial, (1, 0))
    return polynomial.real if poles.ndim == 2 else polynomial


def others_of(poles: Tensor) -> Tensor:
    """The polynomials of all poles but one, complex [filters, order, order]"""
    order = poles.shape[1]
    rest = [[i for i in range(order) if i != n] for n in range(order)]
    return expanded(poles[:, torch.tensor(rest)])


COMPETITORS: dict[str, Callable[[ModalSSM, int], Run]] = {
    "chunks": by_chunks,
    "FFT, state by powers": by_fft_and_powers,
    "FFT, one per mode": by_fft_per_mode,
    "FFT, state by companion": lambda system, length: companion(system, length, False),
    "companion alone": lambda system, length: companion(system, length, True),
}


def truth(system: ModalSSM, u: Tensor) -> tuple[Tensor, Tensor]:
    """In double precision, by the closed form."""
    u = u.double()
    y = fft_convolve(u.mT, system.taps(u.shape[1])).mT
    state = (powers(system, u.shape[1]).flip(-1) * u[0].T[:, None]).sum(-1)
    return y, state


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def accuracy(quick: bool) -> Iterator[Row]:
    length = 128 if quick else LONG
    u = torch.randn(1, length, FILTERS, generator=torch.Generator().manual_seed(1))
    for angles, spread in (("all", 3.1), ("slow", 0.1)):
        for order in ORDERS[: 1 if quick else None]:
            for radius in RADII[: 1 if quick else None]:
                system = poles_of(FILTERS, order, radius, spread)
                y, state = truth(system, u)
                errors = {}
                for name, make in COMPETITORS.items():
                    mine = make(system, length)(u)
                    errors[name] = [error(mine[0], y), error(mine[1], state)]
                yield {"angles": angles, "order": order, "radius": radius, "errors": errors}


def costs(quick: bool) -> Iterator[Row]:
    for channels, order in ((16, 4),) if quick else ((256, 4), (768, 4), (768, 16)):
        system = poles_of(channels, order, 0.99, 3.0)
        for length in (128,) if quick else (1024, 4096):
            u = torch.randn(1, length, channels)
            runs = {name: make(system, length) for name, make in COMPETITORS.items()}
            found = in_turns({name: partial(run, u) for name, run in runs.items()}, 2 if quick else 9)
            memory = {name: peak(name, channels, order, length) for name in COMPETITORS}
            ms = {name: [1e3 * seconds for seconds in some] for name, some in found.items()}
            yield {"channels": channels, "order": order, "length": length, "ms": ms, "mb": memory}


def peak(name: str, channels: int, order: int, length: int) -> float:
    """MB by which the first call of a competitor raises the peak of a process."""
    command = [sys.executable, "-m", "bench.prefill", "--peak", name, str(channels), str(order), str(length)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, *shape: str) -> None:
    channels, order, length = map(int, shape)
    run, u = COMPETITORS[name](poles_of(channels, order, 0.99, 3.0), length), torch.randn(1, length, channels)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed is the system's
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    run(u)
    print((_status("VmHWM") - before) / 1024)


def _status(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])
