"""The default method: monotone, recovers systems, near the best of many starts, whatever the filter's end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lhcompile.distill import factorize, reduce
from lhcompile.distill.chain import rungs_below
from lhcompile.distill.closed import closed
from lhcompile.distill.norm import tap_norm
from lhcompile.distill.varpro import refine, to_poles, to_theta
from lhcompile.ssm import ModalSSM


def planted(order: int, length: int, clustered: bool) -> Tensor:
    """Unit taps [3, length] of systems of pairs, and a real pole if odd; radius up to 0.9995."""
    generator = torch.Generator().manual_seed(order)

    def uniform(count: int) -> Tensor:
        return torch.rand(3, count, generator=generator, dtype=torch.float64)

    pairs = order // 2
    first = torch.polar(1 - 5e-4 * 100 ** uniform(pairs), 0.05 + (0.7 if clustered else 2.8) * uniform(pairs))
    residue = torch.randn(3, pairs, generator=generator, dtype=torch.complex128)
    poles, residues = (torch.stack([x, x.conj()], -1).flatten(1) for x in (first, residue))
    if order % 2:
        lone = (1 - 5e-4 * 100 ** uniform(1)).to(poles.dtype)
        poles, residues = (torch.cat([x, y, 0 * y], 1) for x, y in ((poles, lone), (residues, lone)))
    taps = ModalSSM(poles, residues, torch.ones(3, dtype=torch.float64)).taps(length)
    return taps / taps.norm(dim=-1, keepdim=True)


def undecayed(length: int = 512) -> Tensor:
    """Smooth functions under windows that end at 5 %, as implicit filters do: no tap is small."""
    generator = torch.Generator().manual_seed(2)
    time = torch.linspace(0, 1, length, dtype=torch.float64)
    parts = torch.randn(3, 6, 4, 1, generator=generator, dtype=torch.float64)
    smooth = (parts[0] * torch.sin(8 * parts[1] * time + 3 * parts[2])).sum(1)
    return smooth * (torch.exp(-time * torch.tensor([[3.0], [6.0], [10.0], [15.0], [4.0], [8.0]])) + 0.05)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("head", [1, 3])
def test_errors_never_rise_from_rung_to_order(trained_like: Tensor, weighted: bool, head: int) -> None:
    noise = torch.randn(3, 256, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    exact = 0.9 ** torch.arange(256, dtype=torch.float64).unsqueeze(0)
    taps = torch.cat([trained_like[:8], noise, exact, undecayed(256)[:2], torch.zeros_like(exact)])
    weights = 1 / torch.linspace(0.1, 2, 40, dtype=torch.float64).expand(len(taps), -1) if weighted else None
    reducer = factorize(taps, 10, weights, head)
    errors = []
    for order in range(11):
        now = reducer.reduce(order)
        errors.append(now.error)
        for below in rungs_below(order):
            assert bool((now.error <= errors[below] * (1 + 1e-9)).all())
        assert bool((now.bound <= now.error + 1e-12).all())
        assert bool((now.error <= reducer.reduce(order, "hankel").error * (1 + 1e-9)).all())
    torch.testing.assert_close(reduce(taps, 5, weights=weights, head=head).error, reducer.reduce(5).error)


@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize("order", [2, 5, 8, 16])
def test_planted_systems_are_recovered_to_the_noise(order: int, clustered: bool) -> None:
    taps = planted(order, 1024, clustered)
    assert float(reduce(taps, order).error.max()) < 1e-9
    noise = torch.randn(taps.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise *= 1e-3 / noise.norm(dim=-1, keepdim=True)
    assert float(reduce(taps + noise, order).error.max()) < 1.05e-3 * (1 - 2 * order / 1024) ** 0.5


def test_no_start_of_many_ends_much_lower(trained_like: Tensor) -> None:
    taps, order = trained_like[:12], 6
    norm = tap_norm(taps, None)
    form, found = closed(norm), reduce(taps, order)
    cost = torch.full((12,), float("inf"), dtype=torch.float64)
    for seed in range(12):
        shake = torch.randn(12, order // 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        start = to_poles(to_theta(found.system.poles) + (0.3, 1.0)[seed % 2] * shake)
        cost = torch.minimum(cost, refine(start, form, order)[1])
    best = cost.sqrt() / norm.size(taps)
    assert bool((found.error <= 1.1 * best).all())
    assert float((found.error / best).mean()) < 1.02


def test_filters_that_do_not_decay_are_met() -> None:
    reducer = factorize(undecayed(), 12)
    refined = {order: float(reducer.reduce(order).error.max()) for order in (4, 8, 12)}
    assert refined[8] < 0.1 * refined[4]
    assert refined[12] < 0.2 * refined[8]
    assert refined[12] < 2e-3
    assert float(reducer.reduce(12, "hankel").error.max()) > 5 * refined[12]  # the windows alone do not see it


def test_pairs_much_slower_than_their_length_is_short_are_refined() -> None:
    time = torch.arange(8000, dtype=torch.float64)
    taps = (torch.exp(-time / 4000) * torch.cos(3e-4 * time)).unsqueeze(0)
    taps += 1e-2 * torch.randn(taps.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    norm, hankel = tap_norm(taps, None), reduce(taps, 2, method="hankel")
    _, cost = refine(hankel.system.poles, closed(norm), 2)
    assert float(cost.sqrt() / norm.size(taps)) <= float(hankel.error) * (1 + 1e-9)


def test_what_refinement_cannot_start_from_is_kept(trained_like: Tensor) -> None:
    level = 1 + 1e-4 * trained_like[:2]  # hardly decays: a pole nearer to 1 than refinement goes
    for order in (1, 2, 3):
        reducer = factorize(level, order)
        assert bool((reducer.reduce(order).error <= reducer.reduce(order, "hankel").error * (1 + 1e-9)).all())


def test_a_head_is_exact_and_the_rest_is_as_if_it_were_not_there(trained_like: Tensor) -> None:
    broken = trained_like.clone()
    broken[:, :4] += 10 * torch.randn(24, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    result = reduce(broken, 6, head=4)
    assert result.head.shape == (24, 3)
    left = broken - result.taps(256)
    assert float(left[:, :4].abs().max()) < 1e-9
    torch.testing.assert_close(result.error, left.norm(dim=-1) / broken.norm(dim=-1))
    torch.testing.assert_close(
        result.error * broken.norm(dim=-1), reduce(trained_like, 6, head=4).error * trained_like.norm(dim=-1)
    )
    assert float(result.error.mean()) < 0.8 * float(reduce(broken, 6).error.mean())
    torch.testing.assert_close(result.taps(2), result.taps(256)[:, :2])


@pytest.mark.parametrize("method", ["hankel", "varpro", "balanced", "modal"])
def test_a_head_under_weights_is_the_best_one(trained_like: Tensor, method: str) -> None:
    weights = 1 / torch.linspace(0.1, 2, 40, dtype=torch.float64).expand(24, -1)
    result = reduce(trained_like, 4, weights=weights, method=method, head=3)
    norm = tap_norm(trained_like, weights, head=3)
    left = trained_like - result.taps(256)
    torch.testing.assert_close(result.error, norm.relative(left))
    assert float(norm.free(left).abs().max()) < 1e-9
    assert float(result.error.mean()) < float(reduce(trained_like, 4, weights=weights, method=method).error.mean())
    picked = result[torch.tensor([3, 1])]
    torch.testing.assert_close(picked.head, result.head[[3, 1]])


def test_a_head_as_long_as_the_filter_leaves_nothing() -> None:
    taps = torch.randn(2, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    for head in (4, 5, 9):
        result = reduce(taps, 2, head=head)
        assert float(result.error.max()) < 1e-12
        torch.testing.assert_close(result.taps(5), taps)


def test_tolerances_with_a_head(trained_like: Tensor) -> None:
    trained_like = trained_like[::4]
    result = reduce(trained_like, tol=0.2, head=2)
    assert float(result.error.max()) <= 0.2
    torch.testing.assert_close(result.error, tap_norm(trained_like, None, 2).relative(trained_like - result.taps(256)))
