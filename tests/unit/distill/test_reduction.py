"""The interface: orders, tolerances, selection, certificates, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lhcompile.distill import METHODS, factorize, reduce, select
from lhcompile.distill.norm import tap_norm
from lhcompile.errors import DistillError

FAST = [method for method in METHODS if not method.startswith("gradient")]


@pytest.mark.parametrize("method", FAST)
@pytest.mark.parametrize("order", [1, 2, 5, 8])
def test_reported_error_is_that_of_the_system(trained_like: Tensor, method: str, order: int) -> None:
    weights = 1 / torch.linspace(0.1, 2, 40, dtype=torch.float64).expand(24, -1)
    for spectrum in (None, weights):
        result = reduce(trained_like, order, weights=spectrum, method=method)
        norm = tap_norm(trained_like, spectrum)
        torch.testing.assert_close(result.error, norm.relative(trained_like - result.system.taps(256)))
        assert result.method == method
        assert result.seconds > 0
        assert result.system.poles.shape == (24, order + order % 2)
        assert int(result.system.orders.max()) <= order
        assert float(result.hankel_singular_values.square().sum(-1).max()) <= 1 + 1e-12


@pytest.mark.parametrize("method", FAST)
@pytest.mark.parametrize(
    "taps",
    [
        torch.zeros(2, 100),
        torch.full((2, 300), 0.05),
        torch.eye(100)[:1],
        torch.eye(100)[37:38],
        torch.eye(100)[99:],
        torch.randn(2, 200, generator=torch.Generator().manual_seed(3)),
        (-1.0) ** torch.arange(64).unsqueeze(0),
        *(torch.randn(2, length, generator=torch.Generator().manual_seed(length)) for length in (1, 2, 3, 4, 7)),
    ],
    ids=[
        "zeros",
        "constant",
        "one tap",
        "delay",
        "last tap",
        "white",
        "alternating",
        "1",
        "2",
        "3",
        "4",
        "7",
    ],
)
def test_degenerate_taps(taps: Tensor, method: str) -> None:
    for order in (0, 1, 2, 3, 16):
        result = reduce(taps, order, method=method)
        assert bool((result.system.poles.abs() < 1).all())
        assert bool(torch.isfinite(result.system.residues.abs()).all())
        assert bool((result.error <= 1 + 1e-9).all())
        assert bool((result.bound <= result.error + 1e-12).all())
        torch.testing.assert_close(
            result.error, tap_norm(taps, None).relative(taps - result.system.taps(taps.shape[1]))
        )


def test_errors_are_those_of_the_taps_where_residues_could_be_huge() -> None:
    taps = torch.zeros(1, 13, dtype=torch.float64)
    taps[0, 0], taps[0, 3] = 2.3, 1.6  # three poles near 0 would do it, with residues of 10⁹
    for seed in range(4):
        weights = torch.rand(1, 17, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for method in ("hankel", "varpro"):
            result = reduce(taps, 3, weights=weights, method=method)
            again = tap_norm(taps, weights).relative(taps - result.taps(13))
            torch.testing.assert_close(result.error, again, rtol=1e-9, atol=1e-12)


def test_constant_taps_need_one_pole() -> None:
    result = reduce(torch.full((3, 1024), 0.05), order=1)
    assert float(result.error.max()) < 1e-3
    assert result.system.orders.tolist() == [1, 1, 1]


def test_many_orders_from_one_factorization(trained_like: Tensor) -> None:
    reducer = factorize(trained_like, 16)
    errors = torch.stack([reducer.reduce(order, "hankel").error.mean() for order in (1, 2, 4, 8, 16)])
    assert bool((errors.diff() < 0).all())
    torch.testing.assert_close(reducer.reduce(16, "hankel").error, reduce(trained_like, 16, method="hankel").error)


def test_selection_gives_every_filter_its_own_order(trained_like: Tensor) -> None:
    reducer = factorize(trained_like, 8)
    both = [reducer.reduce(2, "hankel"), reducer.reduce(8, "hankel")]
    choice = torch.arange(24) % 2
    mixed = select(both, choice)
    assert mixed.system.poles.shape == (24, 8)
    torch.testing.assert_close(mixed.error, torch.where(choice == 0, both[0].error, both[1].error))
    torch.testing.assert_close(
        mixed.error, tap_norm(trained_like, None).relative(trained_like - mixed.system.taps(256))
    )
    assert select(both, torch.zeros(24, dtype=torch.int64)).system.poles.shape == (24, 2)
    torch.testing.assert_close(mixed[choice == 1].error, both[1].error[1::2])


def test_tolerance_gives_each_filter_the_order_it_needs(trained_like: Tensor) -> None:
    taps = torch.cat([trained_like[:4], 0.9 ** torch.arange(256).unsqueeze(0).double()])
    result = reduce(taps, tol=0.2, method="hankel")
    assert float(result.error.max()) <= 0.2
    assert int(result.system.orders[-1]) == 1
    assert int(result.system.orders.max()) > 2
    weights = torch.linspace(2, 1, 8).expand(5, -1)
    assert float(reduce(taps, tol=0.2, weights=weights, method="hankel").error.max()) <= 0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give an order or a tolerance"),
        ({"order": -1}, "order -1 is negative"),
        ({"order": 2, "method": "magic"}, "no distillation method 'magic'; there are hankel"),
        ({"order": 4, "tol": 1e-3}, r"tolerance 0\.001 is out of reach for 24 of 24 filters: filter \d+ has "
         r"error 0\.\d+ at order 4, the largest allowed"),
        ({"order": 4, "weights": torch.ones(3, 9)}, r"weights \(3, 9\) are not a power spectrum"),
        ({"order": 4, "weights": -torch.ones(24, 9)}, "the weights of filter 0 are not a finite power"),
    ],
)  # fmt: skip
def test_refused_arguments(trained_like: Tensor, arguments: dict, message: str) -> None:
    with pytest.raises(DistillError, match=message):
        reduce(trained_like, **arguments)


def test_refused_taps(trained_like: Tensor) -> None:
    broken = trained_like.clone()
    broken[5, 17] = float("nan")
    with pytest.raises(DistillError, match="filter 5 has taps that are NaN or infinite"):
        reduce(broken, order=2)
    growing = trained_like.clone()
    growing[3] = 1.02 ** torch.arange(256)
    with pytest.raises(DistillError, match="filter 3 grows: each quarter"):
        reduce(growing, order=2)
    with pytest.raises(DistillError, match=r"taps \(24,\) torch.float64 are not real \[filters, length"):
        reduce(trained_like[:, 0], order=2)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_taps_too_small_or_large_to_square_are_refused(trained_like: Tensor, scale: float) -> None:
    taps = trained_like[:3].double().clone()
    taps[1] *= scale
    with pytest.raises(DistillError, match="filter 1 has taps of size"):
        reduce(taps, 2)


def test_the_size_of_taps_changes_no_figure(trained_like: Tensor) -> None:
    one, other = (reduce(scale * trained_like[:6].double(), 4) for scale in (1.0, 1e-60))
    torch.testing.assert_close(one.error, other.error, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(one.bound, other.bound, rtol=1e-6, atol=1e-12)


def test_a_selection_says_every_method_it_used(trained_like: Tensor) -> None:
    taps = trained_like[:4]
    both = [reduce(taps, 2), reduce(taps, 12, method="hankel")]
    assert select(both, torch.tensor([0, 1, 0, 1])).method == "varpro and hankel"
    assert select(both, torch.tensor([1, 1, 1, 1])).method == "hankel"
