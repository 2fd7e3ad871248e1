"""Gradient descent: its slopes, its two losses, and what it makes of degenerate taps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lhcompile.distill import METHODS, factorize
from lhcompile.distill.gradient import _add_slopes, _start, descend, tail_energy
from lhcompile.distill.norm import tap_norm
from lhcompile.ssm import ModalSSM


def modes_of(system: ModalSSM) -> tuple[Tensor, Tensor]:
    """Poles and residues as  Re Σ r λ^t  takes them: one of each pair."""
    return system.poles[:, ::2], system.residues[:, ::2] * torch.where(system.poles[:, ::2].imag != 0, 2.0, 1.0)


def h2(system: ModalSSM, taps: Tensor) -> Tensor:
    """Σ_{0<t<length} (h_t − ĥ_t)² + the tail, summed over 200 lengths."""
    length = taps.shape[1]
    fitted = system.taps(200 * length)
    fitted[:, :length] -= taps
    return fitted[:, 1:].square().sum(-1)


def test_the_tail_is_the_sum_it_stands_for() -> None:
    generator = torch.Generator().manual_seed(0)
    moduli, angles = (torch.rand(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    poles = torch.polar(0.1 + 0.89 * moduli, 3 * angles)
    residues = torch.randn(3, 4, generator=generator, dtype=torch.complex128)
    time = torch.arange(20, 6000, dtype=torch.float64)
    summed = (residues.unsqueeze(1) @ poles.unsqueeze(-1) ** time).squeeze(1).real.square().sum(-1)
    torch.testing.assert_close(tail_energy(poles, residues, 20), summed)


@pytest.mark.parametrize("order", [1, 4, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_slopes_are_the_derivatives_of_the_loss(trained_like: Tensor, order: int, weighted: bool) -> None:
    weights = torch.linspace(2, 0.1, 30, dtype=torch.float64).expand(24, -1) if weighted else None
    norm = tap_norm(trained_like[:, :50], weights, head=3)
    modes, time = _start(norm, order), torch.arange(50, dtype=torch.float64)
    target = norm.rows(norm.taps.unsqueeze(1)).squeeze(1)
    taps = (modes.residues.unsqueeze(1) @ modes.poles.unsqueeze(-1) ** time).real
    loss = (norm.rows(taps).squeeze(1) - target).square().sum()
    expected = torch.autograd.grad(loss, modes.parameters)
    _add_slopes(modes, norm, target, time)
    for parameter, slope in zip(modes.parameters, expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, slope)
    assert all(bool((slope != 0).any()) for slope in expected[:1] + expected[2:3])


def test_h2_minds_what_comes_after_the_last_tap() -> None:
    """Of a filter cut off before it has decayed: l2 goes on ringing, H2 pays for it."""
    time = torch.arange(64, dtype=torch.float64)
    taps = torch.stack([0.99**time * torch.cos(0.3 * time), 0.98**time * torch.cos(0.1 * time)])
    norm = tap_norm(taps, None)
    (plain, close), (heeding, far) = (descend(norm, 2, steps=800, tail=tail) for tail in (False, True))
    assert bool((close < far).all())
    assert bool((h2(heeding, taps) < 0.9 * h2(plain, taps)).all())
    rest = taps - heeding.taps(64)
    closed = rest[:, 1:].square().sum(-1) + tail_energy(*modes_of(heeding), 64)
    torch.testing.assert_close(closed, h2(heeding, taps))


def test_both_losses_are_methods(trained_like: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    import lhcompile.distill.reduction as reduction

    asked: list[bool] = []

    def briefly(norm: object, order: int, tail: bool = False) -> object:
        asked.append(tail)
        return descend(norm, order, steps=3, tail=tail)  # type: ignore[arg-type]

    monkeypatch.setattr(reduction, "descend", briefly)
    assert {"gradient", "gradient-h2"} < set(METHODS)
    reducer = factorize(trained_like[:2], 2)
    assert reducer.reduce(2, "gradient").method == "gradient"
    assert reducer.reduce(2, "gradient-h2").method == "gradient-h2"
    assert asked == [False, True]


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize(
    "taps",
    [
        torch.zeros(2, 40),
        torch.full((2, 60), 0.05),
        torch.eye(40)[:1],
        torch.eye(40)[39:],
        torch.randn(2, 40, generator=torch.Generator().manual_seed(3)),
        torch.ones(1, 1),
        torch.ones(1, 2),
    ],
    ids=["zeros", "constant", "one tap", "last tap", "white", "1", "2"],
)
def test_degenerate_taps(taps: Tensor, tail: bool) -> None:
    for order in (0, 1, 3, 8):
        system, error = descend(tap_norm(taps, None), order, steps=150, tail=tail)
        assert bool((system.poles.abs() < 1).all())
        assert bool(torch.isfinite(system.residues.abs()).all())
        assert bool((system.orders <= order).all())
        torch.testing.assert_close(error, tap_norm(taps, None).relative(taps - system.taps(taps.shape[1])))


def test_a_head_is_free(trained_like: Tensor) -> None:
    norm = tap_norm(trained_like[:4], None, head=5)
    system, error = descend(norm, 2, steps=50)
    rest = norm.taps - system.taps(256)
    torch.testing.assert_close(error, rest[:, 5:].norm(dim=-1) / norm.taps.norm(dim=-1))
