"""What the benchmark of prefill compares does the same work."""

from __future__ import annotations

import pytest
import torch

from bench.prefill_fft import COMPETITORS, error, truth
from bench.prefill_graphs import poles_of


@pytest.mark.parametrize("name", COMPETITORS)
def test_every_way_gives_outputs_and_states(name: str) -> None:
    system = poles_of(3, 4, 0.9, 3.1)
    u = torch.randn(1, 50, 3, generator=torch.Generator().manual_seed(0))
    found, expected = COMPETITORS[name](system, 50)(u), truth(system, u)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.shape == theirs.shape
        assert error(mine, theirs) < 2e-5


def test_the_companion_form_loses_its_digits_where_poles_are_slow() -> None:
    system = poles_of(8, 8, 0.99, 0.1)
    u = torch.randn(1, 400, 8, generator=torch.Generator().manual_seed(0))
    expected = truth(system, u)[1]
    lost, kept = (error(COMPETITORS[name](system, 400)(u)[1], expected) for name in ("companion alone", "chunks"))
    assert lost > 1e3 * kept
