"""Rational interpolation: what it recovers, how it stands beside scipy's, and what it hears."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.interpolate import AAA
from torch import Tensor

from lhcompile.distill import reduce
from lhcompile.distill.aaa import interpolate
from lhcompile.distill.norm import tap_norm
from lhcompile.distill.spectrum import fit_residues
from lhcompile.ssm import ModalSSM

PAIRS = [0.97 * np.exp(0.4j), 0.9 * np.exp(1.5j), 0.8 * np.exp(2.9j)]


def sorted_poles(poles: Tensor) -> list[complex]:
    return sorted(poles.tolist(), key=lambda pole: (pole.real, pole.imag))


def planted(length: int, real: list[float]) -> tuple[Tensor, Tensor]:
    """Poles [order] and taps [1, length] of a system with PAIRS and real poles."""
    poles = torch.tensor([[p for pair in PAIRS for p in (pair, pair.conjugate())] + [complex(x) for x in real]])
    residues = torch.tensor([[1 + 0.5j, 1 - 0.5j, -2, -2, 0.5j, -0.5j] + [1 + 0j] * len(real)])
    return poles[0], ModalSSM(poles, residues, torch.tensor([3.0])).taps(length)


@pytest.mark.parametrize("length", [30, 31, 64, 401])
def test_a_system_is_recovered_whether_it_has_decayed_or_not(length: int) -> None:
    """Odd and even lengths; 0.999^30 is far from nothing."""
    expected, taps = planted(length, [0.999, -0.5])
    assert sorted_poles(interpolate(tap_norm(taps, None), 8)[0]) == pytest.approx(sorted_poles(expected), abs=1e-7)
    assert float(reduce(taps, 8, method="aaa").error) < 1e-9


@pytest.mark.parametrize("length", [30, 31])
def test_only_1_and_minus_1_are_real_support_points(length: int) -> None:
    """The response is largest at the sample nearest to π, which is no real one where the length is odd."""
    pair = 0.97 * np.exp(3j)
    poles = torch.tensor([[pair, pair.conjugate()]])
    taps = ModalSSM(poles, torch.ones_like(poles), torch.zeros(1)).taps(length)
    found = interpolate(tap_norm(taps, None), 2)[0]
    assert sorted_poles(found) == pytest.approx(sorted_poles(poles[0]), abs=1e-9)


def test_a_larger_order_still_holds_the_poles() -> None:
    expected, taps = planted(200, [0.9, -0.5])
    found = interpolate(tap_norm(taps, None), 13)[0]
    assert len(found) == 14
    assert float((found.unsqueeze(0) - expected.unsqueeze(1)).abs().amin(1).max()) < 1e-6


def test_an_exact_head_in_front_moves_no_pole() -> None:
    expected, taps = planted(150, [0.95, -0.5])
    taps[:, :4] += torch.tensor([5.0, -7.0, 2.0, 9.0])
    found = interpolate(tap_norm(taps, None, head=4), 8)[0]
    assert sorted_poles(found) == pytest.approx(sorted_poles(expected), abs=1e-7)
    result = reduce(taps, 8, method="aaa", head=4)
    torch.testing.assert_close(result.taps(150), taps)


def test_poles_are_those_of_the_library() -> None:
    _, taps = planted(120, [0.95, -0.5])
    circle = np.exp(2j * np.pi / 120 * np.arange(120))
    library = AAA(circle, np.fft.fft(taps[0].numpy()), rtol=1e-12).poles()
    ours = interpolate(tap_norm(taps, None), 8)[0].numpy()
    assert len(library) == 8
    assert np.abs(library[:, None] - ours).min(1).max() < 1e-7


def test_fits_are_as_good_as_the_librarys(trained_like: Tensor) -> None:
    """Of filters that no small system makes, with poles of the library matched to conjugates by hand."""
    norm, circle = tap_norm(trained_like, None), np.exp(2j * np.pi / 256 * np.arange(256))
    rows = []
    for taps in trained_like.numpy():
        with pytest.warns(RuntimeWarning, match="failed to converge within 7"):
            poles = AAA(circle, np.fft.fft(taps), max_terms=7, clean_up=False).poles()
        upper = sorted(poles[poles.imag > 0], key=abs)[-3:]
        pairs = [p for pole in upper for p in (pole, pole.conjugate())]
        rows.append(pairs + [0j] * (6 - len(pairs)))
    poles = torch.tensor(np.array(rows))
    library = fit_residues(torch.where(poles.abs() >= 1, 1 / poles.conj(), poles), norm)[1]
    ours = reduce(trained_like, 6, method="aaa").error
    assert float(ours.mean()) < float(library.mean())


def test_poles_go_where_the_filter_listens(trained_like: Tensor) -> None:
    frequency = torch.linspace(0, torch.pi, 257, dtype=torch.float64)
    weights = (1 / (0.01 + (1 - 0.95 * torch.cos(frequency)))).square().expand(24, -1)
    norm = tap_norm(trained_like, weights)
    weighted = reduce(trained_like, 4, weights=weights, method="aaa").error
    plain = fit_residues(interpolate(tap_norm(trained_like, None), 4), norm)[1]
    assert float(weighted.mean()) < 0.9 * float(plain.mean())
