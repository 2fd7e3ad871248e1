"""The published gradient fit descends as automatic differentiation says, and is compared with the default method."""

from __future__ import annotations

import math
from operator import truediv

import pytest
import torch
from torch import Tensor

from bench.distill_published import BETAS, LAST_RATE, RATE, _start, compare, published_fit
from bench.distill_report import tables


def ringing(filters: int, length: int) -> Tensor:
    """Two decaying waves each, and a first tap that is neither's."""
    lag = torch.arange(length, dtype=torch.float64)
    pitch = 0.2 + 0.1 * torch.arange(filters, dtype=torch.float64).unsqueeze(-1)
    taps = 0.95**lag * torch.cos(pitch * lag) + 0.5 * 0.8**lag * torch.cos(3 * pitch * lag)
    taps[:, 0] += 2
    return taps


@pytest.mark.parametrize("order", [2, 6])
def test_steps_are_those_of_automatic_differentiation(order: int) -> None:
    taps, steps = ringing(3, 40), 25
    r, theta, real, imag = parameters = [x.requires_grad_() for x in _start(taps, order // 2, 0)]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=LAST_RATE)
    lag = torch.arange(39).view(-1, 1, 1)

    def missed() -> Tensor:
        return (torch.complex(real, imag) * torch.polar(r, theta) ** lag).sum(-1).real.T - taps[:, 1:]

    for _ in range(steps):
        optimizer.zero_grad()
        missed().square().mean(-1).sum().backward()
        optimizer.step()
        schedule.step()
    error, moduli = published_fit(taps, order, steps)
    torch.testing.assert_close(error, missed().detach().norm(dim=-1) / taps.norm(dim=-1))
    torch.testing.assert_close(moduli, r.detach())
    start, _ = published_fit(taps, order, 0)
    assert bool((error < start).all())


def test_a_start_near_the_filter_ends_at_it() -> None:
    """One mode, 0.95 e^{0.4 i}: of twenty starts the nearest come to it."""
    lag = torch.arange(100, dtype=torch.float64)
    taps = (0.95**lag * torch.cos(0.4 * lag)).expand(20, -1)
    error, moduli = published_fit(taps, 2, 4000)
    best = int(error.argmin())
    assert float(error[best]) < 1e-3
    assert math.isclose(float(moduli[best, 0]), 0.95, abs_tol=1e-3)


def test_the_table_is_that_of_the_comparison() -> None:
    layer = torch.tensor([0, 0, 1])
    rows = list(compare(ringing(3, 64), layer, quick=True))
    assert [(row["settings"], row["order"]) for row in rows] == [("published", 2), ("tuned", 2)]
    machine = {"processor": "none", "cores": 1, "versions": {"torch": "none"}}
    text = tables({"patience": {"command": "this", "machine": machine, "rows": rows}})
    for row in rows:
        assert all(theirs >= 0.99 * own for own, theirs in zip(row["default_layers"], row["layers"], strict=True))
        share = max(map(truediv, row["default_layers"], row["layers"]))
        cells = [row["settings"], "2", f"{row['error']:.4f}", f"{row['default_error']:.4f}", f"{share:.2f}"]
        assert f"| {' | '.join(cells)} | {row['reached']} of 3 |" in text
