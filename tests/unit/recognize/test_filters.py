"""Filters at the edges: their taps are read off whatever made them, and refused where there are none."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from models import CONTEXT, WIDTH, Mixer, convolve, operators, tiny
from streams import assert_same_model
from torch import Tensor
from torch.fft import irfft, rfft

from lhcompile.artifacts import Program
from lhcompile.capture import capture
from lhcompile.errors import RecognizeError
from lhcompile.recognize import recognize


def signal(x: Tensor) -> Tensor:
    return x[..., :WIDTH].transpose(1, 2)


class Longer(Mixer):
    """A table of more taps than positions; those that no position hears do not exist."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(signal(x), torch.cat([self.taps, 10 * self.taps], dim=-1)).transpose(1, 2)


class Shorter(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(signal(x), self.taps[:, :7]).transpose(1, 2)


class EndingInZeros(Mixer):
    """Trailing zeros need no memory."""

    def forward(self, x: Tensor) -> Tensor:
        return convolve(signal(x), self.taps * (torch.arange(CONTEXT) < 11)).transpose(1, 2)


class OneFilterLongerThanTheOthers(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        last = torch.tensor([20] + [5] * (WIDTH - 1))[:, None]
        return convolve(signal(x), self.taps * (torch.arange(CONTEXT) < last)).transpose(1, 2)


class SomeFiltersAreZero(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(signal(x), self.taps * (torch.arange(WIDTH) % 2)[:, None]).transpose(1, 2)


class VeryDifferentScales(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        scale = 10.0 ** torch.arange(-4, 4)[:, None]
        return (convolve(signal(x), self.taps * scale) / scale).transpose(1, 2)


@pytest.mark.parametrize(
    ("mixer", "shape"),
    [
        (Longer, (WIDTH, CONTEXT)),
        (Shorter, (WIDTH, 7)),
        (EndingInZeros, (WIDTH, 11)),
        (OneFilterLongerThanTheOthers, (WIDTH, 20)),
        (SomeFiltersAreZero, (WIDTH, CONTEXT)),
        (VeryDifferentScales, (WIDTH, CONTEXT)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_taps_kept(mixer: type[Mixer], shape: tuple[int, int]) -> None:
    loaded = tiny(mixer)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert operators(program) == [("long_conv", shape)]


# ---- a single tap remembers nothing --------------------------------------------------------------------------------


class OneTap(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return (convolve(signal(x), self.taps[:, :1]) + signal(x) * self.direct[:, None]).transpose(1, 2)


class ZeroFilter(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(signal(x), self.taps * 0).transpose(1, 2)


class OneTapForAllHeads(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = signal(x).unflatten(1, (2, -1))
        return convolve(u, self.head_taps[:, None, :1]).flatten(1, 2).transpose(1, 2)


class OneTapConvolution(Mixer):
    """The short convolution's cut leaves its newest tap alone."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(signal(x), self.taps[:, None, :1], self.direct, groups=WIDTH).transpose(1, 2)


@pytest.mark.parametrize(
    "mixer", [OneTap, ZeroFilter, OneTapForAllHeads, OneTapConvolution], ids=lambda mixer: mixer.__name__
)
def test_one_tap_is_a_multiplication(mixer: type[Mixer]) -> None:
    loaded = tiny(mixer)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert operators(program) == []


class OneTapLate(Mixer):
    """A single tap that is heard two positions later does need memory."""

    def forward(self, x: Tensor) -> Tensor:
        late = F.pad(signal(x), (2, 0))[..., : x.shape[1]]
        return convolve(late, self.taps[:, :1]).transpose(1, 2)


def test_one_tap_heard_later_is_a_delay() -> None:
    loaded = tiny(OneTapLate)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert operators(program) == [("fir", (WIDTH, 1, 3))]


# ---- the direct term -----------------------------------------------------------------------------------------------


def calls(program: Program, name: str) -> int:
    return sum(str(node.target).startswith(name) for node in program.graph.graph.nodes)


class DirectBeside(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = signal(x)
        return (convolve(u, self.taps) + u * self.direct[:, None]).transpose(1, 2)


class DirectFirst(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = signal(x)
        return (self.direct[:, None] * u + convolve(u, self.taps)).transpose(1, 2)


class DirectPerHead(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = signal(x).unflatten(1, (2, -1))
        y = convolve(u, self.head_taps[:, None]) + u * self.direct[:2, None, None]
        return y.flatten(1, 2).transpose(1, 2)


class DirectInAnotherLayout(Mixer):
    """time in the middle: the convolution's input and output are permuted forth and back"""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        u = x[..., :4].view(batch, time, 2, 2)
        y = convolve(u.permute(0, 2, 3, 1), self.taps[:4].view(2, 2, CONTEXT)).permute(0, 3, 1, 2)
        return (y + u * self.direct[:4].view(2, 2)).flatten(2).repeat(1, 1, 2)


@pytest.mark.parametrize(
    "mixer", [DirectBeside, DirectFirst, DirectPerHead, DirectInAnotherLayout], ids=lambda mixer: mixer.__name__
)
def test_direct_term_joins_the_first_tap(mixer: type[Mixer]) -> None:
    """
    before                                     after
    y = lhc.long_conv(u, taps, None, R)        y = lhc.long_conv(u, taps + D·δ₀, None, R)
    z = y + u · D                              z = y
    """
    loaded = tiny(mixer)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert calls(program, "aten.mul") == 0
    assert calls(program, "aten.add") == 1  # the residual connection


class DirectDiffersWithinAFilter(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = signal(x)
        return (convolve(u, self.head_taps[0]) + u * self.direct[:, None]).transpose(1, 2)


class DirectOfAnotherSignal(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = signal(x)
        return (convolve(u, self.taps) + u.sin() * self.direct[:, None]).transpose(1, 2)


class DirectOfSwappedChannels(Mixer):
    """The output's channel axes stand the other way round than the input's, and have the same sizes."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        u = x[..., :4].view(batch, time, 2, 2)
        y = convolve(u.permute(0, 2, 3, 1), self.head_taps[0]).permute(0, 3, 2, 1)
        return (y + u * self.direct[0]).flatten(2).repeat(1, 1, 2)


class DirectHeardTwice(Mixer):
    """The convolution's output is also used without the direct term."""

    def forward(self, x: Tensor) -> Tensor:
        u = signal(x)
        y = convolve(u, self.taps)
        return ((y + u * self.direct[:, None]) * y).transpose(1, 2)


class DirectWithAFactor(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = signal(x)
        return torch.add(convolve(u, self.taps), u * self.direct[:, None], alpha=0.5).transpose(1, 2)


@pytest.mark.parametrize(
    "mixer",
    [DirectDiffersWithinAFilter, DirectOfAnotherSignal, DirectOfSwappedChannels, DirectHeardTwice, DirectWithAFactor],
    ids=lambda mixer: mixer.__name__,
)
def test_direct_term_that_is_none_stays_outside(mixer: type[Mixer]) -> None:
    loaded = tiny(mixer)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert calls(program, "aten.add") == 2


# ---- filters there are no taps of ----------------------------------------------------------------------------------


class WrapsAround(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        return irfft(rfft(signal(x), n=n) * rfft(self.taps[:, :n], n=n), n=n).transpose(1, 2)


class LooksAhead(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        spectrum = rfft(signal(x), n=n) * rfft(self.taps[:, :time], n=n).conj()
        return irfft(spectrum, n=n)[..., :time].transpose(1, 2)


class OneSmallFilterLooksAhead(Mixer):
    """Its taps are a hundred thousand times smaller than those of the others."""

    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        bank = rfft(self.taps[:, :time], n=n)
        bank = torch.cat([1e5 * bank[1:], bank[:1] + bank[:1].conj()])
        return irfft(rfft(signal(x), n=n) * bank, n=n)[..., :time].transpose(1, 2)


class UncutFilter(Mixer):
    """All taps at any length: at short lengths the last ones wrap around."""

    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        return irfft(rfft(signal(x), n=n) * rfft(self.taps, n=n), n=n)[..., :time].transpose(1, 2)


class StretchesWithTheLength(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(signal(x), torch.exp(-5 * torch.linspace(0, 1, x.shape[1]))).transpose(1, 2)


class OneSmallFilterStretches(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        stretched = torch.exp(-5 * torch.linspace(0, 1, time))[None]
        return convolve(signal(x), torch.cat([1e5 * self.taps[1:, :time], stretched])).transpose(1, 2)


class StretchesAsConv1d(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        kernel = torch.exp(-5 * torch.linspace(1, 0, time)).expand(WIDTH, 1, time)
        return F.conv1d(F.pad(signal(x), (time - 1, 0)), kernel, groups=WIDTH).transpose(1, 2)


class HoldsNan(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(signal(x), self.taps / (self.taps * 0)).transpose(1, 2)


class Overflows(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(signal(x), torch.exp(10.0 * torch.arange(x.shape[1]))).transpose(1, 2)


class NotReal(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        spectrum = torch.fft.fft(signal(x), n=n) * torch.fft.fft(self.taps[:, :time], n=n) * 1j
        return torch.fft.ifft(spectrum, n=n).real[..., :time].transpose(1, 2)


class DependsOnTheTokens(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        u = signal(x)
        spectrum = rfft(u, n=n) * rfft(u.cos(), n=n)
        return irfft(spectrum, n=n)[..., :time].transpose(1, 2)


class DependsOnTheTokensByEinsum(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        u = signal(x)
        spectrum = torch.einsum("bdf,bdf->bdf", rfft(u, n=n), rfft(u.cos(), n=n))
        return irfft(spectrum, n=n)[..., :time].transpose(1, 2)


class DividesByTheTokens(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        return irfft(rfft(self.taps[:, :time], n=n) / rfft(signal(x), n=n), n=n)[..., :time].transpose(1, 2)


class WeightFromTheTokens(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = signal(x)
        kernel = u.mean((0, 2))[:, None, None].expand(WIDTH, 1, 3)
        return F.conv1d(F.pad(u, (2, 0)), kernel, groups=WIDTH).transpose(1, 2)


REFUSED = {
    WrapsAround: ("fft_irfft", "a transform of length 32 wraps the end of a sequence of 32 .*; it takes 63 or more"),
    LooksAhead: ("fft_irfft", "looks ahead: its filter has taps at negative lags"),
    OneSmallFilterLooksAhead: ("fft_irfft", "looks ahead: its filter has taps at negative lags"),
    UncutFilter: ("fft_irfft", "looks ahead: its filter has taps at negative lags"),
    StretchesWithTheLength: ("fft_irfft", "its filter is another one at length 16 than at length 32"),
    OneSmallFilterStretches: ("fft_irfft", "its filter is another one at length 16 than at length 32"),
    StretchesAsConv1d: ("conv1d", "its weights at length 16 are others than at length 32"),
    HoldsNan: ("fft_irfft", "its filter holds NaN or infinite taps"),
    Overflows: ("fft_irfft", "its filter holds NaN or infinite taps"),
    NotReal: ("fft_ifft", "its filter is not real"),
    DependsOnTheTokens: ("mul", "its filter depends on the tokens"),
    DependsOnTheTokensByEinsum: ("einsum", "its filter depends on the tokens"),
    DividesByTheTokens: ("div", "its filter depends on the tokens"),
    WeightFromTheTokens: ("mean", r"its result \[8\] has no time axis"),
}


@pytest.mark.parametrize("mixer", REFUSED, ids=lambda mixer: mixer.__name__)
def test_filter_without_taps(mixer: type[Mixer]) -> None:
    operator, reason = REFUSED[mixer]
    with pytest.raises(RecognizeError) as caught:
        recognize(capture(tiny(mixer)))
    pattern = rf"layers\.0\.mixer: {operator}: {reason}.* \(.*/test_filters\.py:\d+: .+\)"
    assert re.fullmatch(pattern, str(caught.value)), caught.value
    assert (caught.value.module, caught.value.operator) == ("layers.0.mixer", operator)
