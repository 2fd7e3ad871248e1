"""The spellings of an FFT long convolution in published code; each is one lhc.long_conv of the same taps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import CONTEXT, WIDTH, Mixer, convolve, operators, tiny
from streams import assert_same_model
from torch import Tensor
from torch.fft import fft, ifft, irfft, rfft

from lhcompile.capture import capture
from lhcompile.recognize import recognize


def split(x: Tensor) -> tuple[Tensor, int, int]:
    """(u [batch, WIDTH, time], time, 2 · time)"""
    return x[..., :WIDTH].transpose(1, 2), x.shape[1], 2 * x.shape[1]


class Plain(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(x[..., :WIDTH].transpose(1, 2), self.taps).transpose(1, 2)


class NormInTheFilter(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        spectrum = rfft(self.taps[:, :time], n=n) / n
        y = irfft(rfft(u.to(dtype=self.taps.dtype), n=n) * spectrum, n=n, norm="forward")[..., :time]
        return F.gelu(y + u * self.direct.unsqueeze(-1)).to(dtype=x.dtype).transpose(1, 2)


class NormInTheSignal(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        spectrum = rfft(u, n=n, norm="forward") * rfft(self.taps[:, :time], n=n) * n
        return irfft(spectrum, n=n)[..., :time].transpose(1, 2)


class NormOrtho(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        y = irfft(rfft(u, n=n, norm="ortho") * rfft(self.taps[:, :time], n=n), n=n, norm="ortho")
        return y[..., :time].transpose(1, 2)


class NextPowerOfTwo(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, _ = split(x)
        n = 2 ** math.ceil(math.log2(2 * time))
        return irfft(rfft(u, n=n) * rfft(self.taps[:, :time], n=n), n=n)[..., :time].transpose(1, 2)


class ShortestTransform(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        return irfft(rfft(u, n=n - 1) * rfft(self.taps[:, :time], n=n - 1), n=n - 1)[..., :time].transpose(1, 2)


class PaddedByHand(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, _ = split(x)
        taps = self.taps[:, :time]
        return irfft(rfft(F.pad(u, (0, time))) * rfft(F.pad(taps, (0, time))))[..., :time].transpose(1, 2)


class FullTransform(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        y = ifft(fft(u, n=n) * fft(self.taps[:, :time], n=n)).real[..., :time]
        return (y + u * self.direct[:, None]).transpose(1, 2)


class RealAfterTheCut(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        y = ifft(fft(u, n=n) * fft(self.taps[:, :time], n=n), n=n)[..., :time]
        return torch.view_as_real(y)[..., 0].transpose(1, 2)


class AlongTheMiddleAxis(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time = x[..., :WIDTH], x.shape[1]
        spectrum = rfft(u, n=2 * time, dim=1) * rfft(self.taps[:, :time].T, n=2 * time, dim=0)
        return irfft(spectrum, n=2 * time, dim=1)[:, :time]


class TimeFirst(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = x.transpose(0, 1)[..., :WIDTH]
        time = u.shape[0]
        taps = rfft(self.taps[:, :time].T[:, None], n=2 * time, dim=0)
        return irfft(rfft(u, n=2 * time, dim=0) * taps, n=2 * time, dim=0)[:time].transpose(0, 1)


class EinsumProduct(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        spectrum = torch.einsum("bdf,df->bdf", rfft(u, n=n), rfft(self.taps[:, :time], n=n))
        return irfft(spectrum, n=n)[..., :time].transpose(1, 2)


class EinsumFilterFirst(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        spectrum = torch.einsum("fd, bdf -> bfd", rfft(self.taps[:, :time], n=n).T, rfft(u, n=n))
        return irfft(spectrum, n=n, dim=1)[:, :time]


class EinsumNewAxis(Mixer):
    """The spelling of the S4 family, with one filter bank: 'bhl,chl->bchl'."""

    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        spectrum = torch.einsum("bhl,chl->bchl", rfft(u, n=n), rfft(self.taps[None, :, :time], n=n))
        y = irfft(spectrum, n=n)[..., :time] + torch.einsum("bhl,ch->bchl", u, self.direct[None])
        return y.flatten(1, 2).transpose(1, 2)


class ReshapedSpectra(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        spectrum = rfft(u, n=n).unsqueeze(1) * rfft(self.taps[:, :time], n=n)[None, None]
        return irfft(spectrum.transpose(1, 2), n=n)[..., :time][:, :, 0].transpose(1, 2)


class CutByNarrow(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        return irfft(rfft(u, n=n) * rfft(self.taps[:, :time], n=n), n=n).narrow(-1, 0, time).transpose(1, 2)


class CutAfterTransposing(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        return irfft(rfft(u, n=n) * rfft(self.taps[:, :time], n=n), n=n).transpose(1, 2)[:, :time]


class DoublePrecision(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        y = irfft(rfft(u.double(), n=n) * rfft(self.taps[:, :time].double(), n=n), n=n)[..., :time]
        return (y.to(torch.float32) + u * self.direct[:, None]).transpose(1, 2)


class DoublePrecisionFilterOnly(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        y = irfft(rfft(u, n=n) * rfft(self.taps[:, :time].double(), n=n), n=n)[..., :time]
        return y.type_as(u).transpose(1, 2)


class DoublePrecisionAfterwards(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH].transpose(1, 2).double()
        return (convolve(u, self.taps.double()) * 2 + u * self.direct.double()[:, None]).float().transpose(1, 2)


class InPlace(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        u = u.clone()
        u *= 2
        y = irfft(rfft(u, n=n) * rfft(self.taps[:, :time], n=n), n=n)[..., :time]
        y += u * self.direct[:, None]
        return y.transpose(1, 2)


class DirectInTheTaps(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, _ = split(x)
        taps = self.taps[:, :time].clone()
        taps[:, 0] += self.direct
        return convolve(u, taps).transpose(1, 2)


class DirectInTheSpectrum(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, time, n = split(x)
        spectrum = rfft(self.taps[:, :time], n=n) + self.direct[:, None]
        return irfft(rfft(u, n=n) * spectrum, n=n)[..., :time].transpose(1, 2)


class DirectAfterTransposing(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(x[..., :WIDTH].transpose(1, 2), self.taps).transpose(1, 2) + x[..., :WIDTH] * self.direct


class ImplicitFilter(Mixer):
    """Taps made by a network of the position under a decaying window."""

    def forward(self, x: Tensor) -> Tensor:
        u, time, _ = split(x)
        t = torch.linspace(0, 1, CONTEXT)[:time, None]
        taps = torch.sin(14 * t @ self.direct[None]) @ self.taps[:, :WIDTH] * torch.exp(-t * 5)
        return convolve(u, taps.T).transpose(1, 2)


SPELLINGS = [
    Plain,
    NormInTheFilter,
    NormInTheSignal,
    NormOrtho,
    NextPowerOfTwo,
    ShortestTransform,
    PaddedByHand,
    FullTransform,
    RealAfterTheCut,
    AlongTheMiddleAxis,
    TimeFirst,
    EinsumProduct,
    EinsumFilterFirst,
    EinsumNewAxis,
    ReshapedSpectra,
    CutByNarrow,
    CutAfterTransposing,
    DoublePrecision,
    DoublePrecisionFilterOnly,
    DoublePrecisionAfterwards,
    InPlace,
    DirectInTheTaps,
    DirectInTheSpectrum,
    DirectAfterTransposing,
    ImplicitFilter,
]


@pytest.mark.parametrize("mixer", SPELLINGS, ids=lambda mixer: mixer.__name__)
def test_published_spelling(mixer: type[Mixer]) -> None:
    loaded = tiny(mixer)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert operators(program) == [("long_conv", (WIDTH, CONTEXT))]
