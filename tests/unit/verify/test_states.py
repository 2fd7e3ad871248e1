"""What states in fewer bits may add to what rounded signals do by themselves."""

from __future__ import annotations

import pytest
import torch

from lhcompile.errors import ParityError
from lhcompile.verify.budgets import state_tolerance
from lhcompile.verify.states import check_added

STATES = state_tolerance("float16")


def noise(seed: int, share: float) -> torch.Tensor:
    return share * torch.randn(2, 50, 400, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signals", [1e-4, 0.04, 0.2])
@pytest.mark.parametrize(("times", "passes"), [(1.0, True), (1.2, False)])
def test_errors_add_in_squares(signals: float, times: float, passes: bool) -> None:
    """Other roundings of the same size and what states may do pass, a fifth more does not, whatever that is beside the
    tolerance of the signals."""
    truth = noise(0, 7.0)
    alone, other = truth + 7 * noise(1, signals), 7 * noise(2, signals)
    found = truth + times * (other + 7 * noise(3, STATES.relative))
    if passes:
        check_added(found, alone, truth, STATES)
    else:
        with pytest.raises(ParityError, match=r"float16 states: what is said .* add in squares"):
            check_added(found, alone, truth, STATES)


def test_what_is_no_number() -> None:
    truth = noise(0, 1.0)
    with pytest.raises(ParityError):
        check_added(truth * torch.nan, truth, truth, STATES)
    with pytest.raises(ParityError):
        check_added(truth, truth * torch.nan, truth, STATES)
