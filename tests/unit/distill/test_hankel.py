"""Hankel factors: their singular values, their poles, and the bound as a bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lhcompile.distill import reduce
from lhcompile.distill.hankel import EVEN, LEVEL, Window, _reflected, factor, order_limit
from lhcompile.distill.norm import tap_norm
from lhcompile.ssm import ModalSSM


def planted(order: int, radius: float, spread: float, length: int, filters: int = 4) -> Tensor:
    """Unit taps of systems with order/2 conjugate pairs, moduli up to `radius`, angles spread·(0, 3)."""
    generator = torch.Generator().manual_seed(order)
    pairs = order // 2
    moduli = 1 - (1 - radius) * torch.linspace(1, 40, pairs, dtype=torch.float64)
    angles = 0.05 + spread * torch.linspace(0, 2.9, pairs, dtype=torch.float64)
    first = torch.polar(moduli, angles)
    poles = torch.stack([first, first.conj()], -1).flatten().expand(filters, -1)
    residue = torch.randn(filters, pairs, generator=generator, dtype=torch.complex128)
    residues = torch.stack([residue, residue.conj()], -1).flatten(1)
    taps = ModalSSM(poles, residues, torch.ones(filters, dtype=torch.float64)).taps(length)
    return taps / taps.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("spread", [1.0, 0.25], ids=["separated", "clustered"])
@pytest.mark.parametrize("radius", [0.98, 0.9995])
@pytest.mark.parametrize("order", [2, 8, 32])
def test_planted_systems_are_recovered(order: int, radius: float, spread: float) -> None:
    taps = planted(order, radius, spread, 1024)
    assert float(reduce(taps, order, method="hankel").error.max()) < 1e-8
    noise = torch.randn(taps.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise *= 1e-3 / noise.norm(dim=-1, keepdim=True)
    result = reduce(taps + noise, order, method="hankel")
    assert float(result.error.max()) < 1.25e-3
    assert float((result.system.taps(1024) - taps).norm(dim=-1).max()) < 7e-4  # below the noise it was shown


def dense_window(taps: Tensor, window: Window) -> tuple[Tensor, float]:
    """The window itself, [filters, p, q], and the largest weight a tap has in it."""
    n = taps.shape[1] - 1
    p, q = n // 2 + 1, n - n // 2
    taper = window.taper(p, taps.shape[1], taps)
    weight = torch.zeros(n, dtype=torch.float64)
    for i in range(p):
        weight[i : i + q] += (taper[i] * taper[:q]).square()
    return taper.unsqueeze(-1) * taps[:, 1:].unfold(-1, q, 1) * taper[:q], float(weight.max())


def test_level_window_counts_every_tap_once() -> None:
    taper = LEVEL.taper(100, 200, torch.zeros(1, dtype=torch.float64)).square()
    counts = torch.stack([(taper[: t + 1] * taper[: t + 1].flip(0)).sum() for t in range(100)])
    torch.testing.assert_close(counts, torch.ones(100, dtype=torch.float64))


@pytest.mark.parametrize("window", [EVEN, LEVEL])
def test_singular_values_are_those_of_the_window(trained_like: Tensor, window: Window) -> None:
    factors = factor(tap_norm(trained_like, None), 16, window)
    scale = trained_like[:, 1:].abs().amax(-1, keepdim=True)
    values = torch.linalg.svdvals(dense_window(trained_like / scale, window)[0])
    torch.testing.assert_close(factors.values[:, :8], values[:, :8], rtol=1e-4, atol=0)
    torch.testing.assert_close(factors.energy, values.square().sum(-1))


@pytest.mark.parametrize("window", [EVEN, LEVEL])
@pytest.mark.parametrize("length", [3, 4, 5, 30, 31, 256])
def test_bound_is_below_the_bound_of_the_dense_window(trained_like: Tensor, length: int, window: Window) -> None:
    """What the projected window gives is never more than Eckart–Young on the whole one."""
    taps = trained_like[:, :length]
    norm = tap_norm(taps, None)
    whole, weight = dense_window(taps, window)
    values = torch.linalg.svdvals(whole)
    for order in range(min(16, order_limit(length)) + 1):
        dense = (values[:, order:].square().sum(-1) / weight).sqrt() / taps.norm(dim=-1)
        bound = factor(norm, max(order, 1), window).bound(order)
        assert bool((bound <= dense * (1 + 1e-9) + 1e-12).all())
        near = factor(norm, 4 * order + 8, window).bound(order)
        assert bool((near >= 0.95 * dense - 1e-6).all())


def test_no_system_beats_the_bound(trained_like: Tensor) -> None:
    """Not even systems made of the taps' own best poles, residues fitted in the same norm."""
    spectrum = torch.linspace(5.0, 0.1, 65, dtype=torch.float64).expand(24, -1)
    for weights in (None, spectrum):
        for order in (1, 2, 4, 8):
            result = reduce(trained_like, order, weights=weights, method="hankel")
            assert bool((result.bound <= result.error).all())
            assert bool((result.bound > 0).all())


def test_input_weights_lower_the_weighted_error(trained_like: Tensor) -> None:
    """A filter that only hears low frequencies is matched there."""
    frequency = torch.linspace(0, torch.pi, 257, dtype=torch.float64)
    weights = (1 / (0.01 + (1 - 0.95 * torch.cos(frequency)))).square().expand(24, -1)
    norm = tap_norm(trained_like, weights)
    plain = reduce(trained_like, 4, method="hankel")
    heard = reduce(trained_like, 4, weights=weights, method="hankel")
    before = norm.relative(trained_like - plain.system.taps(256))
    assert float(heard.error.mean()) < 0.8 * float(before.mean())


def test_flat_weights_are_no_weights(trained_like: Tensor) -> None:
    plain = reduce(trained_like, 6, method="hankel")
    flat = reduce(trained_like, 6, weights=torch.full((1, 9), 3.0), method="hankel")
    assert float((flat.error - plain.error).abs().max()) < 0.02  # the window ends ⅛ earlier
    torch.testing.assert_close(flat.error, tap_norm(trained_like, None).relative(trained_like - flat.system.taps(256)))


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
def test_reflections_give_the_rows_that_qr_gives(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    left, right = (
        torch.randn(3, *shape, generator=generator, dtype=torch.float64) for shape in ((4, rank), (rank, 30))
    )
    x = left @ right
    new, lower = _reflected(x)
    torch.testing.assert_close(lower @ new, x)
    torch.testing.assert_close(new @ new.mT, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    torch.testing.assert_close(lower, lower.tril())
    torch.testing.assert_close(lower.abs(), torch.linalg.qr(x.mT).R.mT.abs(), rtol=1e-9, atol=1e-12)
