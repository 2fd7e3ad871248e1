"""Allocation of orders and the search for the cheapest that passes."""

from __future__ import annotations

import itertools

import pytest
import torch

from lhcompile.distill.bank import Allocation, allocations, uniform
from lhcompile.distill.search import _cheapest, expected

ORDERS = (0, 1, 2, 4)


def costs(filters: int) -> torch.Tensor:
    """Falling costs of filters that differ by orders of magnitude, [filters, orders]."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-3, 0, filters, dtype=torch.float64).unsqueeze(1)
    falling = torch.rand(filters, len(ORDERS), generator=generator, dtype=torch.float64).cumprod(1)
    return size * falling


def test_a_ladder_falls_in_cost_and_grows_in_state() -> None:
    for ladder in (allocations(costs(20), ORDERS, torch.ones(20)), uniform(costs(20), ORDERS)):
        assert len(ladder) > 3
        for one, other in itertools.pairwise(ladder):
            assert one.mean <= other.mean
            assert one.predicted >= other.predicted - 1e-15
        assert ladder[-1].predicted == pytest.approx(float(costs(20)[:, -1].sum()))


def test_no_other_choice_of_the_same_state_is_cheaper() -> None:
    table = costs(5)
    states = torch.tensor(ORDERS)
    every = torch.tensor(list(itertools.product(range(len(ORDERS)), repeat=5)))
    total = table[torch.arange(5), every].sum(1)
    for step in allocations(table, ORDERS, torch.ones(5)):
        rivals = total[states[every].sum(1) <= states[step.choice].sum()]
        assert step.predicted <= float(rivals.min()) + 1e-12


def test_an_order_that_makes_a_filter_worse_is_not_paid_for() -> None:
    table = torch.tensor([[1.0, 0.1, 0.5, 0.1]], dtype=torch.float64)
    assert all(int(step.choice) != 2 for step in allocations(table, ORDERS, torch.ones(1)))


@pytest.mark.parametrize("count", [1, 2, 7, 23])
def test_the_first_that_passes_is_found_from_anywhere(count: int) -> None:
    ladder = [Allocation(ORDERS, torch.tensor([0]), float(i)) for i in range(count)]
    for first in range(count + 1):
        for start in range(count):
            seen: list[float] = []

            def passes(step: Allocation, first: int = first, seen: list[float] = seen) -> bool:
                seen.append(step.predicted)
                return step.predicted >= first

            found = _cheapest(ladder, start, passes)
            assert found is (ladder[first] if first < count else None)
            assert len(set(seen)) == len(seen) <= 10


def test_what_is_expected_lies_between_both_estimates_and_grows_with_the_noise() -> None:
    steady, noisy = torch.full((16,), 0.1), 0.1 + torch.linspace(-1, 1, 16)
    assert expected(steady, torch.full((4,), 0.3)) == pytest.approx(0.2)
    assert expected(noisy, torch.full((4,), 0.3)) == pytest.approx(0.2 + float(noisy.std()) / 4)
    assert expected(noisy, None) == pytest.approx(0.1 + 2 * float(noisy.std()) / 4)
    assert expected(steady[:1], torch.tensor([0.3])) == pytest.approx(0.3)
    spread = float(noisy.std()) / 4
    assert expected(noisy - 9, torch.full((4,), 0.3)) == pytest.approx((0.3 - 2 * spread) / 2 + spread)


def test_states_of_shared_filters_cost_as_much_as_they_take() -> None:
    """Of two filters alike, the one that serves one channel gets more order than the one that serves many."""
    table = torch.tensor([[1.0, 0.3, 0.1, 0.01]] * 2, dtype=torch.float64)
    sharing = torch.tensor([1.0, 30.0])
    orders = torch.tensor(ORDERS)
    chosen = [orders[step.choice].tolist() for step in allocations(table, ORDERS, sharing)]
    assert all(alone >= shared for alone, shared in chosen)
    assert any(alone > shared for alone, shared in chosen)
