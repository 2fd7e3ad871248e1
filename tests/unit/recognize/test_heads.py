"""Filters shared by many channels: which channel hears which filter, in every layout of the channel axes."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import CONTEXT, HEADS, WIDTH, HeadsInnermost, HeadsOutermost, Hyena, Mixer, convolve, operators, tiny
from streams import assert_same_model
from torch import Tensor

from lhcompile.artifacts import Program
from lhcompile.capture import capture
from lhcompile.recognize import recognize

PER_HEAD = WIDTH // HEADS


def long_convs(program: Program) -> list[tuple[int, int, int]]:
    """(channels, filters, inner) of every long convolution."""
    found = []
    for node in program.graph.graph.nodes:
        if node.target == torch.ops.lhc.long_conv.default:
            u, taps, _, inner = node.args
            found.append((u.meta["sizes"][2].offset, getattr(program.graph, taps.target).shape[0], inner))
    return found


class HigherOrder(Mixer):
    """A Hyena operator of order three: two long convolutions with a gate between them."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.short(x.transpose(1, 2))[..., : x.shape[1]]
        *gates, v = z.split(WIDTH, dim=1)
        for gate, taps in zip(gates, (self.taps, self.taps.flip(0)), strict=True):
            v = gate * (convolve(v, taps) + v * self.direct[:, None])
        return v.transpose(1, 2)


class OrderInTheChannels(Mixer):
    """Both orders' filters applied at once, [batch, order, channels, time]."""

    def forward(self, x: Tensor) -> Tensor:
        u = torch.stack(x.transpose(1, 2).split(WIDTH, dim=1)[:2], dim=1)
        y = convolve(u, torch.stack([self.taps, 2 * self.taps.flip(0)]))
        return y.prod(1).transpose(1, 2)


class HeadsInTheMiddle(Mixer):
    """[batch, d1, heads, d2, time]: shared by what lies before and what lies behind."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        u = x[..., :WIDTH].transpose(1, 2).reshape(batch, 2, HEADS, 2, time)
        return convolve(u, self.head_taps[:, None]).reshape(batch, WIDTH, time).transpose(1, 2)


class HeadsBroadcastFromOne(Mixer):
    """One signal heard through every filter: it is expanded first."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(x[..., :1].transpose(1, 2), self.taps).transpose(1, 2)


class TimeBeforeHeads(Mixer):
    """[batch, time, heads, channels], transformed along axis 1."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        u = x[..., :WIDTH].reshape(batch, time, HEADS, PER_HEAD)
        taps = torch.fft.rfft(self.head_taps[:, :time].T[..., None], n=2 * time, dim=0)
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * time, dim=1) * taps, n=2 * time, dim=1)[:, :time]
        return (y + u * self.direct[:HEADS, None]).reshape(batch, time, WIDTH)


class HeadsMergedIntoBatch(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        u = x[..., :WIDTH].transpose(1, 2).reshape(batch * HEADS, PER_HEAD, time)
        y = convolve(u, self.taps[:PER_HEAD])
        return y.reshape(batch, WIDTH, time).transpose(1, 2)


class OneFilterForAll(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(x[..., :WIDTH].transpose(1, 2), self.head_taps[0]).transpose(1, 2)


class SeveralFiltersPerChannel(Mixer):
    """'bhl,chl->bhcl': every channel heard through two filters of its own."""

    def forward(self, x: Tensor) -> Tensor:
        u, time = x[..., :PER_HEAD].transpose(1, 2), x.shape[1]
        bank = torch.fft.rfft(self.taps.view(2, PER_HEAD, CONTEXT)[..., :time], n=2 * time)
        spectrum = torch.einsum("chl,bhl->bhcl", bank, torch.fft.rfft(u, n=2 * time))
        y = torch.fft.irfft(spectrum, n=2 * time)[..., :time]
        y = y + torch.einsum("bhl,ch->bhcl", u, self.direct.view(2, PER_HEAD))
        return y.flatten(1, 2).transpose(1, 2)


SQUARE = HEADS * PER_HEAD * PER_HEAD  # channels of an outer product

LAYOUTS = [
    (Hyena, [(WIDTH, WIDTH, 1)]),
    (HigherOrder, [(WIDTH, WIDTH, 1), (WIDTH, WIDTH, 1)]),
    (OrderInTheChannels, [(2 * WIDTH, 2 * WIDTH, 1)]),
    (HeadsInnermost, [(SQUARE, HEADS, 1)]),
    (HeadsOutermost, [(SQUARE, HEADS, PER_HEAD * PER_HEAD)]),
    (HeadsInTheMiddle, [(WIDTH, HEADS, 2)]),
    (HeadsBroadcastFromOne, [(WIDTH, WIDTH, 1)]),
    (TimeBeforeHeads, [(WIDTH, HEADS, PER_HEAD)]),
    (HeadsMergedIntoBatch, [(WIDTH, PER_HEAD, 1)]),
    (OneFilterForAll, [(WIDTH, 1, 1)]),
    (SeveralFiltersPerChannel, [(WIDTH, WIDTH, 1)]),
]


@pytest.mark.parametrize(("mixer", "expected"), LAYOUTS, ids=lambda value: getattr(value, "__name__", ""))
def test_channels_hear_their_filters(mixer: type[Mixer], expected: list[tuple[int, int, int]]) -> None:
    loaded = tiny(mixer)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert long_convs(program) == expected


# ---- helpers of published code, compiled by torch.jit.script -----------------------------------------------------

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script
    def mul_sum(q, y):
        return (q * y).sum(dim=1)


class Scripted(Mixer):
    """The multi-head operator with the product of queries in a scripted function."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        z = self.short(x.transpose(1, 2))[..., :time]
        q, k, v = (part.reshape(batch, HEADS, -1, time).transpose(1, 2) for part in z.split(WIDTH, dim=1))
        y = convolve(k[:, :, None] * v[:, None], self.head_taps)
        return mul_sum(q[:, :, None], y).transpose(1, 2).reshape(batch, WIDTH, time).transpose(1, 2)


def test_scripted_functions_are_seen_through() -> None:
    loaded = tiny(Scripted)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert operators(program) == [("fir", (3 * WIDTH, 1, 3)), ("long_conv", (HEADS, CONTEXT))]
