"""Allocation of orders and the search for the cheapest that passes."""

from __future__ import annotations

import itertools

import pytest
import torch

from lhcompile.distill.bank import Allocation, allocations, uniform
from lhcompile.distill.search import _cheapest

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


@pytest.mark.parametrize("exponent", [-1, 0.3, 0.8, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 7, 23])
def test_the_first_within_the_limit_is_found_from_anywhere(count: int, exponent: float) -> None:
    """Whatever the bound has to do with the prediction, 0.7^(exponent · place), as long as it falls."""
    ladder = [Allocation(ORDERS, torch.tensor([0]), 0.7 ** (exponent * i)) for i in range(count)]
    bounds = {step.predicted: 0.7**i for i, step in enumerate(ladder)}
    for first in range(count + 1):
        for start in range(count):
            seen: list[float] = []

            def bound(step: Allocation, seen: list[float] = seen) -> float:
                seen.append(step.predicted)
                return bounds[step.predicted]

            found = _cheapest(ladder, start, bound, limit=0.7 ** (first - 0.5))
            assert found is (ladder[first] if first < count else None)
            assert len(set(seen)) == len(seen) <= 13
            assert exponent != 1 or len(seen) <= 3


def test_a_ladder_goes_as_far_where_filters_are_shared() -> None:
    """A state of 64 channels is 64 states: what it is worth falls by as much."""
    alone, shared = (allocations(costs(20), ORDERS, torch.full((20,), float(channels))) for channels in (1, 64))
    assert len(shared) == pytest.approx(len(alone), abs=3)
    assert shared[-2].mean == pytest.approx(alone[-2].mean, abs=0.3)


def test_states_of_shared_filters_cost_as_much_as_they_take() -> None:
    """Of two filters alike, the one that serves one channel gets more order than the one that serves many."""
    table = torch.tensor([[1.0, 0.3, 0.1, 0.01]] * 2, dtype=torch.float64)
    sharing = torch.tensor([1.0, 30.0])
    orders = torch.tensor(ORDERS)
    chosen = [orders[step.choice].tolist() for step in allocations(table, ORDERS, sharing)]
    assert all(alone >= shared for alone, shared in chosen)
    assert any(alone > shared for alone, shared in chosen)
