"""What each method promises beyond the interface."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lhcompile.distill import factorize, reduce
from lhcompile.distill.closed import closed
from lhcompile.distill.gradient import descend
from lhcompile.distill.hankel import order_limit
from lhcompile.distill.modal import dominant
from lhcompile.distill.norm import Norm, tap_norm
from lhcompile.distill.spectrum import fit_residues, pack, powers, radius_limit, stabilise
from lhcompile.distill.varpro import refine
from lhcompile.ssm import ModalSSM


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4, 8])
def test_variable_projection_is_never_worse_than_hankel(trained_like: Tensor, order: int, weighted: bool) -> None:
    weights = 1 / torch.linspace(0.1, 2, 40, dtype=torch.float64).expand(24, -1) if weighted else None
    reducer = factorize(trained_like, 8, weights)
    hankel, varpro = reducer.reduce(order, "hankel"), reducer.reduce(order, "varpro")
    assert bool((varpro.error <= hankel.error).all())
    assert float(varpro.error.mean()) < 0.99 * float(hankel.error.mean())


@pytest.mark.parametrize("order", [1, 2, 4])
def test_variable_projection_ends_where_no_small_move_of_a_pole_helps(trained_like: Tensor, order: int) -> None:
    norm = tap_norm(trained_like, None)
    poles = refine(reduce(trained_like, order).system.poles, closed(norm), order, steps=200)[0]
    error = fit_residues(poles, norm)[1]
    slots = poles.unflatten(-1, (-1, 2))
    for change in (1e-4, -1e-4):
        for turn in (1.0, 1.0j):
            moved = slots * (1 + change * turn)
            moved = torch.where(slots.imag < 0, moved.flip(-1).conj(), torch.where(slots.imag == 0, slots, moved))
            nearby = stabilise(moved.flatten(-2), radius_limit(norm.length))
            assert bool((fit_residues(nearby, norm)[1] >= error - 1e-5).all())


def test_two_real_poles_become_a_pair_where_the_filter_rings() -> None:
    time = torch.arange(200, dtype=torch.float64)
    taps = (0.95**time * torch.cos(0.05 * time)).unsqueeze(0)
    start = torch.tensor([[0.93, 0.9]], dtype=torch.complex128)
    poles, _ = refine(start, closed(tap_norm(taps, None)), 2)
    torch.testing.assert_close(poles.abs(), torch.full((1, 2), 0.95, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(poles.angle().abs(), torch.full((1, 2), 0.05, dtype=torch.float64), rtol=1e-5, atol=0)


def test_gradient_descent_is_beaten(trained_like: Tensor) -> None:
    taps = trained_like[:6]
    system, error = descend(tap_norm(taps, None), 4, steps=400)
    torch.testing.assert_close(error, tap_norm(taps, None).relative(taps - system.taps(256)))
    assert bool((system.poles.abs() < 1).all())
    assert float(reduce(taps, 4).error.mean()) < float(error.mean()) < 1
    odd, _ = descend(tap_norm(taps, None), 3, steps=5)
    assert odd.orders.tolist() == [3] * 6


def test_balanced_truncation_is_stable_before_any_clipping(trained_like: Tensor) -> None:
    from lhcompile.distill.balanced import EXTENDED

    factors = factorize(trained_like, 8).factors(EXTENDED)
    assert float(torch.linalg.eigvals(factors.shift).abs().max()) <= 1
    assert float(factors.last.abs().max()) == 0


def test_modal_truncation_keeps_pairs_whole() -> None:
    poles = torch.tensor([[0.9 + 0.1j, 0.9 - 0.1j, 0.5, 0.2]], dtype=torch.complex128)
    residues = torch.tensor([[1.0, 1.0, 2.0, 0.1]], dtype=torch.complex128)
    system = ModalSSM(poles, residues, torch.zeros(1))
    assert dominant(system, 1).tolist() == [[0, 0]]  # the pair has most, and no room
    assert dominant(system, 2).tolist() == [[0.9 + 0.1j, 0.9 - 0.1j]]
    assert dominant(system, 3).tolist() == [[0.9 + 0.1j, 0.9 - 0.1j, 0.5, 0]]


def test_spectra_are_packed_pairs_first_reals_by_size() -> None:
    eigenvalues = torch.tensor([[0.1, 0.5 + 0.2j, 0.5 - 0.2j, 0.9, -0.3]], dtype=torch.complex128)
    expected = [[0.5 + 0.2j, 0.5 - 0.2j, 0.9, 0.1, -0.3, 0]]
    assert pack(eigenvalues, 6).tolist() == expected


def test_stabilised_poles_are_reflected_and_cut() -> None:
    poles = torch.tensor([[2.0, 1.0, 0.5j, 1e-5, 0.0]], dtype=torch.complex128)
    assert stabilise(poles, 0.999).tolist() == [[0.5, 0.999, 0.5j, 1e-3, 0]]
    for length in (1, 100, 10**6):
        assert torch.tensor(radius_limit(length), dtype=torch.float32) < 1


def test_powers_span_the_modes() -> None:
    poles = torch.tensor([[0.9 * 1j, -0.9 * 1j, 0.8, -0.5]], dtype=torch.complex128)
    time = torch.arange(37)
    span = powers(poles, 37)[0]
    expected = [(poles[0, 0] ** time).real, (poles[0, 0] ** time).imag, 0.8**time, (-0.5) ** time]
    torch.testing.assert_close(span, torch.stack(expected).double())


def test_the_norm_is_the_output_power_of_the_error() -> None:
    """‖e‖_w² = eᵀ T e with T the autocovariance of an input of spectrum w."""
    generator = torch.Generator().manual_seed(0)
    taps = torch.randn(1, 20, generator=generator, dtype=torch.float64)
    frequency = torch.linspace(0, torch.pi, 401, dtype=torch.float64)
    weights = 1 / (1.2 - torch.cos(frequency))
    norm = tap_norm(taps, weights.unsqueeze(0))
    dense = torch.linspace(0, torch.pi, norm.root.shape[1], dtype=torch.float64) if norm.root is not None else None
    assert dense is not None
    density = torch.nn.functional.interpolate(weights[None, None], len(dense), mode="linear", align_corners=True)
    lags = torch.fft.irfft(density[0, 0])[:20]
    covariance = lags[(torch.arange(20).unsqueeze(0) - torch.arange(20).unsqueeze(1)).abs()] / lags[0]
    torch.testing.assert_close(norm.size(taps).square(), (taps @ covariance @ taps.T)[0])
    assert norm.relative(taps).tolist() == [1.0]
    assert Norm(torch.zeros(1, 4)).relative(torch.zeros(1, 4)).tolist() == [0.0]


def test_order_limits() -> None:
    assert [order_limit(length) for length in (1, 2, 3, 4, 5, 1024)] == [0, 1, 1, 1, 2, 511]
