"""Random stable systems are one and the same system in every form they take."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_modal
from torch import Tensor

from lhcompile.lower.tables import chunk_tables
from lhcompile.ops import fft_convolve
from lhcompile.ssm import ModalSSM, real_powers, swap

lhc = torch.ops.lhc


@st.composite
def systems(draw: st.DrawFn) -> ModalSSM:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    largest = draw(st.sampled_from([0.5, 0.9, 0.99, 0.9999]))
    return random_modal(draw(st.integers(1, 3)), draw(st.integers(1, 4)), generator, largest)


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(mine: Tensor, theirs: Tensor, share: float) -> None:
    assert float((mine - theirs).abs().max()) <= share * max(1.0, float(theirs.abs().max()))


@settings(max_examples=40, deadline=None)
@given(system=systems(), seed=st.integers(0, 2**31), time=st.integers(2, 70), chunk=st.sampled_from([1, 3, 8, 32]))
def test_taps_steps_chunks_and_fft_agree(system: ModalSSM, seed: int, time: int, chunk: int) -> None:
    """y by convolving with the taps, by one step after the other, by chunks as the prefill graph computes them, and
    by the operator's closed form."""
    real = system.real()
    weights = (real.own, real.other, real.readout, real.direct)
    u = noise(1, time, system.filters, seed=seed)
    by_fft = fft_convolve(u.mT, system.taps(time)).mT

    steps, state = [], None
    for token in u.split(1, dim=1):
        y, state = lhc.modal_ssm(token, *weights, None, state, 1)
        steps.append(y)
    close(torch.cat(steps, 1), by_fft, 1e-10)

    whole, last = lhc.modal_ssm(u, *weights, None, None, 1)
    close(whole, by_fft, 1e-10)
    close(state, last, 1e-10)

    tables = chunk_tables(real, chunk)  # rounded to single precision
    padded = torch.nn.functional.pad(u[0].T, (-time % chunk, 0)).unflatten(1, (-1, chunk))  # [filters, chunks, Q]
    toeplitz, inject, observe = (
        torch.from_numpy(table).double() for table in (tables.taps[:, tables.lags], tables.inject, tables.observe)
    )
    leap = torch.from_numpy(tables.powers[chunk]).double().mT  # [2, filters, order]
    carried, chunks = torch.zeros_like(leap[0]), []
    for tokens in padded.unbind(1):
        chunks.append(torch.einsum("fj,fji->fi", tokens, toeplitz) + torch.einsum("fd,fdi->fi", carried, observe))
        carried = leap[0] * carried + leap[1] * swap(carried, 1) + torch.einsum("fj,fjd->fd", tokens, inject)
    close(torch.cat(chunks, 1)[:, -time % chunk :].T[None], by_fft, 1e-4)


@settings(max_examples=40, deadline=None)
@given(system=systems(), count=st.integers(0, 40))
def test_powers_are_matrix_powers(system: ModalSSM, count: int) -> None:
    real = system.real()

    def matrices(own: Tensor, other: Tensor) -> Tensor:
        return torch.diag_embed(own.T) + torch.diag_embed(other.T) @ swap(torch.eye(own.shape[0]).double())

    own, other = real_powers(real.own, real.other, count)
    assert len(own) == len(other) == count + 1
    expected = torch.linalg.matrix_power(matrices(real.own, real.other), count)
    close(matrices(own[-1], other[-1]), expected, 1e-10)


@settings(max_examples=40, deadline=None)
@given(system=systems(), length=st.integers(1, 60))
def test_step_response_sums_the_taps(system: ModalSSM, length: int) -> None:
    real = system.real()
    ones = torch.ones(1, length, system.filters, dtype=torch.float64)
    y, _ = lhc.modal_ssm(ones, real.own, real.other, real.readout, real.direct, None, None, 1)
    close(y[0].T, system.taps(length).cumsum(1), 1e-10)
