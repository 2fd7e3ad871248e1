"""Any cut of a stream equals one shot, whatever the operator, its sharing and the state it starts from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import VOCAB, of_orders, random_modal
from streams import assert_parity, onnx_stream, torch_stream
from torch import Tensor

lhc = torch.ops.lhc
Operator = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
Drawn = tuple[Operator, int, tuple[int, int]]
"""(operator, its channels, shape of its state without batch)"""


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def operators(draw: st.DrawFn) -> Drawn:
    seed, filters = draw(st.integers(0, 2**31)), draw(st.integers(1, 4))
    outer, inner, length = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(2, 9))
    channels = outer * filters * inner
    kind = draw(st.sampled_from(["fir", "long_conv", "modal_ssm", "packed"]))
    if kind == "fir":
        weight, bias = noise(2 * outer, filters * inner, length, seed=seed), noise(2 * outer, seed=seed)
        return lambda u, s: lhc.fir(u, weight, bias, s, outer), channels, (length - 1, channels)
    if kind == "long_conv":
        taps = noise(filters, length, seed=seed)
        return lambda u, s: lhc.long_conv(u, taps, s, inner), channels, (length - 1, channels)
    slots = draw(st.integers(1, 3))
    system = random_modal(filters, slots, torch.Generator().manual_seed(seed))
    if kind == "packed":
        system = of_orders(system, draw(st.lists(st.integers(0, 2 * slots), min_size=filters, max_size=filters)))
    real = system.real()
    kept = real.kept if kind == "packed" else None
    weights = (real.own, real.other, real.readout, real.direct, kept)
    shape = (len(real.own), channels) if kept is None else (1, outer * len(kept) * inner)
    return lambda u, s: lhc.modal_ssm(u, *weights, s, inner), channels, shape


CUTS = st.lists(st.integers(1, 12), min_size=1, max_size=5)


@settings(max_examples=80, deadline=None)
@given(which=operators(), cuts=CUTS, batch=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_any_cut_equals_one_shot(which: Drawn, cuts: list[int], batch: int, seed: int) -> None:
    operator, channels, shape = which
    u, state = noise(batch, sum(cuts), channels, seed=seed), noise(batch, *shape, seed=seed + 1)
    whole, last = operator(u, state)
    parts = []
    for part in u.split(cuts, dim=1):
        y, state = operator(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)


@settings(max_examples=40, deadline=None)
@given(which=operators(), time=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_a_zero_state_is_a_fresh_start(which: Drawn, time: int, seed: int) -> None:
    operator, channels, shape = which
    u = noise(2, time, channels, seed=seed)
    zero = torch.zeros(2, *shape, dtype=torch.float64)
    for mine, theirs in zip(operator(u, zero), operator(u, None), strict=True):
        torch.testing.assert_close(mine, theirs)


@settings(max_examples=40, deadline=None)
@given(which=operators(), time=st.integers(1, 20), seed=st.integers(0, 2**31))
def test_operators_are_linear_in_signal_and_state(which: Drawn, time: int, seed: int) -> None:
    """But for a bias, which the difference of two answers does not hold."""
    operator, channels, shape = which
    signals = [noise(1, time, channels, seed=seed + i) for i in range(3)]
    states = [noise(1, *shape, seed=seed + 3 + i) for i in range(3)]
    a, b, c = (operator(u, s) for u, s in zip(signals, states, strict=True))
    mixed = operator(signals[0] + 2 * (signals[1] - signals[2]), states[0] + 2 * (states[1] - states[2]))
    for i in (0, 1):
        torch.testing.assert_close(mixed[i], a[i] + 2 * (b[i] - c[i]))


@pytest.mark.parametrize("form", ["modal", "packed"])
@settings(max_examples=15, deadline=None)
@given(cuts=st.lists(st.integers(1, 70), min_size=1, max_size=4), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_cut_of_a_built_model(built: Callable, form: str, cuts: list[int], batch: int, seed: int) -> None:
    model = built("shared", form)
    tokens = torch.randint(0, VOCAB, (batch, sum(cuts)), generator=torch.Generator().manual_seed(seed))
    reference = torch_stream(model.program)
    assert_parity(reference, reference, model.program.states, tokens, cuts)
    assert_parity(onnx_stream(model.lowered), reference, model.program.states, tokens, cuts)
