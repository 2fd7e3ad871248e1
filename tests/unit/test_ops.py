"""The eager bodies of the three operators: what they compute, and that it does not depend on how time is cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import ORDERS, of_orders, random_modal
from torch import Tensor

from lhcompile import ops
from lhcompile.ops import fft_convolve
from lhcompile.ssm import ModalSSM, RealModal

lhc = torch.ops.lhc
BATCH, FILTERS, TIME = 2, 3, 23


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def direct_convolution(u: Tensor, taps: Tensor) -> Tensor:
    """y_t = Σ_j taps_j u_{t-j}, by its definition; u [batch, time, channels], taps [channels, length]."""
    y = torch.zeros_like(u)
    for lag in range(min(taps.shape[-1], u.shape[1])):
        y[:, lag:] += taps[:, lag] * u[:, : u.shape[1] - lag]
    return y


def heard_through(outer: int, inner: int) -> list[int]:
    """The filter of each channel: channel n is heard through filter (n // inner) % FILTERS."""
    return [(n // inner) % FILTERS for n in range(outer * FILTERS * inner)]


Operator = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def fir(outer: int, inner: int) -> tuple[Operator, int, tuple[int, ...]]:
    channels = 2 * outer * inner
    weight, bias = draw(6, channels // 2, 4), draw(6, seed=1)
    return lambda u, state: lhc.fir(u, weight, bias, state, 2), channels, (3, channels)


def long_conv(outer: int, inner: int) -> tuple[Operator, int, tuple[int, ...]]:
    channels = outer * FILTERS * inner
    taps = draw(FILTERS, 7)
    return lambda u, state: lhc.long_conv(u, taps, state, inner), channels, (6, channels)


def modal_ssm(outer: int, inner: int) -> tuple[Operator, int, tuple[int, ...]]:
    channels = outer * FILTERS * inner
    real = random_modal(FILTERS, 2, torch.Generator().manual_seed(0)).real()
    weights = (real.own, real.other, real.readout, real.direct)
    return lambda u, state: lhc.modal_ssm(u, *weights, None, state, inner), channels, (4, channels)


def mixed() -> ModalSSM:
    """Filters of orders 5, 2 and 0."""
    return of_orders(random_modal(FILTERS, 3, torch.Generator().manual_seed(0)), ORDERS[:FILTERS])


def packed(outer: int, inner: int) -> tuple[Operator, int, tuple[int, ...]]:
    """`modal_ssm` with filters of different orders."""
    real = mixed().real()
    weights = (real.own, real.other, real.readout, real.direct, real.kept)
    shape = (1, outer * len(real.kept) * inner)
    return lambda u, state: lhc.modal_ssm(u, *weights, state, inner), outer * FILTERS * inner, shape


KINDS = pytest.mark.parametrize("kind", [fir, long_conv, modal_ssm, packed], ids=lambda kind: kind.__name__)
SHARING = pytest.mark.parametrize(("outer", "inner"), [(1, 1), (4, 1), (1, 4), (2, 5)])


@KINDS
@SHARING
@pytest.mark.parametrize("cuts", [[1] * TIME, [1, 22], [22, 1], [2, 3, 5, 13], [4, 1, 1, 17], [6, 7, 8, 2]], ids=str)
def test_cuts(kind: Callable, outer: int, inner: int, cuts: list[int]) -> None:
    operator, channels, shape = kind(outer, inner)
    u, state = draw(BATCH, TIME, channels, seed=2), draw(BATCH, *shape, seed=3)
    whole, last = operator(u, state)
    assert last.shape == state.shape
    parts = []
    for part in u.split(cuts, dim=1):
        y, state = operator(part, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)


@KINDS
@SHARING
@pytest.mark.parametrize("time", [1, 2, TIME])
def test_no_state_is_a_state_of_zeros(kind: Callable, outer: int, inner: int, time: int) -> None:
    operator, channels, shape = kind(outer, inner)
    u = draw(BATCH, time, channels, seed=2)
    for mine, theirs in zip(operator(u, None), operator(u, torch.zeros(BATCH, *shape).double()), strict=True):
        torch.testing.assert_close(mine, theirs)


@KINDS
def test_rows_and_inputs_are_left_alone(kind: Callable) -> None:
    """A row's result is its own, and neither input is written to."""
    operator, channels, shape = kind(2, 2)
    u, state = draw(BATCH, TIME, channels, seed=2), draw(BATCH, *shape, seed=3)
    kept = u.clone(), state.clone()
    y, last = operator(u, state)
    assert torch.equal(u, kept[0])
    assert torch.equal(state, kept[1])
    row, row_last = operator(u[1:], state[1:])
    torch.testing.assert_close(row, y[1:])
    torch.testing.assert_close(row_last, last[1:])


def test_fir_is_conv1d_over_what_came_before() -> None:
    operator, channels, shape = fir(2, 3)
    u, state = draw(BATCH, TIME, channels), draw(BATCH, *shape, seed=3)
    window = torch.cat([state, u], 1)
    y, last = operator(u, state)
    expected = F.conv1d(window.mT, draw(6, channels // 2, 4), draw(6, seed=1), groups=2)
    torch.testing.assert_close(y, expected.mT)
    torch.testing.assert_close(last, window[:, -3:])
    assert lhc.fir(u, draw(channels, 1, 1), None, None, channels)[1].shape == (BATCH, 0, channels)


@SHARING
def test_long_conv_by_its_definition(outer: int, inner: int) -> None:
    operator, channels, _ = long_conv(outer, inner)
    u = draw(BATCH, TIME, channels, seed=2)
    expected = direct_convolution(u, draw(FILTERS, 7)[heard_through(outer, inner)])
    torch.testing.assert_close(operator(u, None)[0], expected)


@SHARING
def test_modal_ssm_is_a_convolution_with_its_taps(outer: int, inner: int) -> None:
    operator, channels, _ = modal_ssm(outer, inner)
    u = draw(BATCH, TIME, channels, seed=2)
    taps = random_modal(FILTERS, 2, torch.Generator().manual_seed(0)).taps(TIME)
    expected = direct_convolution(u, taps[heard_through(outer, inner)])
    torch.testing.assert_close(operator(u, None)[0], expected)


@SHARING
@pytest.mark.parametrize("time", [1, 2, TIME])
def test_packed_and_rectangular_states_are_the_same_states(outer: int, inner: int, time: int) -> None:
    """The state of an entry stands at (outer, its place, inner); what the rectangle holds elsewhere is noise."""
    real = mixed().real()
    order, weights = real.own.shape[0], (real.own, real.other, real.readout, real.direct)
    u = draw(BATCH, time, outer * FILTERS * inner)
    rectangle = draw(BATCH, order, outer * FILTERS * inner, seed=1)
    entries = [divmod(entry, FILTERS) for entry in real.kept.tolist()]
    places = [(row, (o * FILTERS + f) * inner + i) for o in range(outer) for row, f in entries for i in range(inner)]
    rows, channels = (list(axis) for axis in zip(*places, strict=True))
    y, last = lhc.modal_ssm(u, *weights, None, rectangle, inner)
    mine, state = lhc.modal_ssm(u, *weights, real.kept, rectangle[:, None, rows, channels], inner)
    torch.testing.assert_close(mine, y)
    torch.testing.assert_close(state, last[:, None, rows, channels])


@SHARING
def test_packed_modal_ssm_is_a_convolution_with_its_taps(outer: int, inner: int) -> None:
    operator, channels, _ = packed(outer, inner)
    u = draw(BATCH, TIME, channels, seed=2)
    expected = direct_convolution(u, mixed().taps(TIME)[heard_through(outer, inner)])
    torch.testing.assert_close(operator(u, None)[0], expected)


@pytest.mark.parametrize("time", [1, 4])
def test_filters_without_states(time: int) -> None:
    """Only their direct terms are heard; the state there is, says nothing."""
    zero, direct = torch.zeros(2, FILTERS).double(), draw(FILTERS)
    kept = RealModal(zero, zero, zero, direct).kept
    u, state = draw(BATCH, time, FILTERS), draw(BATCH, 1, 1)
    y, last = lhc.modal_ssm(u, zero, zero, zero, direct, kept, state, 1)
    torch.testing.assert_close(y, direct * u)
    assert last.shape == (BATCH, 1, 1)


@pytest.mark.parametrize(("time", "length"), [(1, 1), (1, 9), (9, 1), (9, 4), (4, 9), (8, 8)])
def test_fft_convolve(time: int, length: int) -> None:
    u, taps = draw(2, 3, time), draw(3, length, seed=1)
    torch.testing.assert_close(fft_convolve(u, taps).mT, direct_convolution(u.mT, taps))


def test_single_precision_stays_single_precision() -> None:
    for kind in (long_conv, modal_ssm, packed):
        operator, channels, shape = kind(1, 1)
        y, last = operator(draw(1, 5, channels).float(), draw(1, *shape).float())
        assert (y.dtype, last.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("time", [1, 5])
@pytest.mark.parametrize("fresh", [True, False])
def test_shapes_are_known_without_running(time: int, fresh: bool) -> None:
    """torch's own check of schema and fake bodies."""
    real = mixed().real()
    tables = (real.own, real.other, real.readout, real.direct)
    u = draw(BATCH, time, 2 * FILTERS)
    for operator, weights, shape, last in (
        (ops.fir, (draw(6, 1, 4), draw(6)), (3, 6), 6),
        (ops.long_conv, (draw(FILTERS, 7),), (6, 6), 1),
        (ops.modal_ssm, (*tables, None), (len(real.own), 6), 2),
        (ops.modal_ssm, (*tables, real.kept), (1, 2 * len(real.kept)), 2),
    ):
        state = None if fresh else draw(BATCH, *shape)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(operator, (u, *weights, state, last), test_utils=checks)
