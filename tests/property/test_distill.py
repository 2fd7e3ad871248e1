"""Distillation holds its promises on whatever taps come along."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lhcompile.distill import METHODS, reduce
from lhcompile.distill.norm import tap_norm

FAST = [method for method in METHODS if not method.startswith("gradient")]


@st.composite
def banks(draw: st.DrawFn) -> Tensor:
    """Taps [filters, length] of very different kinds and scales."""
    filters, length = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    noise = torch.randn(filters, length, generator=generator, dtype=torch.float64)
    time = torch.arange(length, dtype=torch.float64)
    kind = draw(st.sampled_from(["white", "decaying", "impulse", "constant", "zeros", "tones", "sparse"]))
    delay = draw(st.integers(0, length - 1))
    taps = {
        "white": noise,
        "decaying": noise * torch.exp(-0.2 * time),
        "impulse": (time == delay).double().expand(filters, -1),
        "constant": noise[:, :1].expand(-1, length),
        "zeros": torch.zeros_like(noise),
        "tones": torch.cos(noise[:, :1] * time) + torch.cos(noise[:, -1:] * time),
        "sparse": noise * (noise > 1.5),
    }[kind]
    return taps * 10.0 ** draw(st.integers(-12, 6))


@pytest.mark.parametrize("method", FAST)
@settings(max_examples=60, deadline=None)
@given(taps=banks(), order=st.integers(0, 20), weighted=st.booleans())
def test_every_reduction_is_stable_real_and_honest(method: str, taps: Tensor, order: int, weighted: bool) -> None:
    filters, length = taps.shape
    weights = torch.rand(filters, 17, generator=torch.Generator().manual_seed(order)) if weighted else None
    result = reduce(taps, order, weights=weights, method=method)
    system = result.system
    assert bool((system.poles.abs() < 1).all())
    first, second = system.poles.unflatten(-1, (-1, 2)).unbind(-1)
    pair = first.imag != 0
    assert bool(((second == first.conj()) | ~pair).all())
    assert bool(((second.imag == 0) | pair).all())
    assert bool((system.orders <= order).all())
    recomputed = tap_norm(taps, weights).relative(taps - system.taps(length))
    torch.testing.assert_close(result.error, recomputed, rtol=1e-6, atol=1e-9)
    assert bool((result.error <= 1 + 1e-9).all())
    assert bool((result.bound <= result.error + 1e-7).all())
