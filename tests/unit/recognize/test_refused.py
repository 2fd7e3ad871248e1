"""What mixes time and is not understood stops the build and says where: module path, operator, source line."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from models import CONTEXT, VOCAB, WIDTH, Mixer, convolve, tiny
from torch import Tensor, nn
from torch.fft import irfft, rfft

from lhcompile.artifacts import LoadedModel
from lhcompile.capture import capture
from lhcompile.errors import RecognizeError
from lhcompile.recognize import recognize


def refusal(loaded: LoadedModel) -> RecognizeError:
    program = capture(loaded)
    with pytest.raises(RecognizeError) as caught:
        recognize(program)
    assert caught.value.exit_code == 2
    return caught.value


def signal(x: Tensor) -> Tensor:
    return x[..., :WIDTH].transpose(1, 2)


def transformed(x: Tensor, taps: Tensor) -> Tensor:
    """The convolution before it is cut to the sequence."""
    time = x.shape[1]
    return irfft(rfft(signal(x), n=2 * time) * rfft(taps[:, :time], n=2 * time), n=2 * time)


# ---- looking ahead, picking, comparing ---------------------------------------------------------------------------


class CenteredConvolution(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(signal(x), self.taps[:, None, :3], padding=1, groups=WIDTH).transpose(1, 2)


class SamePadding(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(signal(x), self.taps[:, None, :3], padding="same", groups=WIDTH).transpose(1, 2)


class ShiftBackwards(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[..., :WIDTH], (0, 0, -1, 1))


class Reversed(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH].flip(1)


class Bidirectional(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(signal(x).flip(-1), self.taps).flip(-1).transpose(1, 2)


class RolledByTheTrialLength(Mixer):
    """Five positions: the operator does nothing to a sequence of five."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(x[..., :WIDTH], 5, dims=1)


class LastPosition(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1:, :WIDTH].expand(-1, x.shape[1], -1)


class CumulativeSum(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH].cumsum(1)


class Attention(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, dim=-1)
        return (q @ k.transpose(1, 2)).softmax(-1) @ v


class FusedAttention(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)


class ToeplitzProduct(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1])
        lags = index[:, None] - index
        return torch.where(lags >= 0, self.taps[0][lags.clamp(min=0)], 0.0) @ x[..., :WIDTH]


class MeanOverTime(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] - x[..., :WIDTH].mean(1, keepdim=True)


class InstanceNorm(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(signal(x)).transpose(1, 2)


class AveragePooling(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool1d(signal(x), 3, stride=1, padding=1).transpose(1, 2)


class TransposedConvolution(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv_transpose1d(signal(x), self.taps[:, None, :3], groups=WIDTH)
        return y[..., : x.shape[1]].transpose(1, 2)


class ConvolutionInTwoDimensions(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(signal(x)[:, :, None], self.taps[:, None, None, :2], padding=(0, 1), groups=WIDTH)
        return y[:, :, 0, : x.shape[1]].transpose(1, 2)


class ViewedWrongly(Mixer):
    """A view where a transpose was meant."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, channels = x.shape
        return x.reshape(batch, channels, time)[:, :WIDTH].transpose(1, 2)


class TimeSplitInTwo(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        batch, time, channels = x.shape
        return x.reshape(batch, 2 * time, channels // 2)[:, :time, :WIDTH]


class FirstHalfOfDoubled(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH].repeat_interleave(2, dim=1)[:, : x.shape[1]]


class EverySecondPosition(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH].repeat_interleave(2, dim=1)[:, ::2]


MIXES_TIME = {
    CenteredConvolution: ("conv1d", "looks ahead by 1 positions"),
    SamePadding: ("conv1d", "looks ahead: padding='same' is not causal"),
    ShiftBackwards: ("pad", "looks ahead by 1 positions"),
    Reversed: ("flip", "looks ahead: a later token changes an earlier output"),
    Bidirectional: ("flip", "looks ahead: a later token changes an earlier output"),
    RolledByTheTrialLength: ("roll", "depends on the length of the sequence"),
    LastPosition: ("slice", "looks ahead by 31 positions"),
    CumulativeSum: ("cumsum", "mixes time in a way that is not understood"),
    Attention: ("softmax", "looks ahead: attention without a causal mask"),
    FusedAttention: ("scaled_dot_product_attention", "looks ahead: attention without a causal mask"),
    ToeplitzProduct: ("matmul", "uses where, a constant that depends on the absolute position"),
    MeanOverTime: ("mean", r"its result \[B, 1, 8\] has no time axis: it reduces or picks over time"),
    InstanceNorm: ("instance_norm", "looks ahead: a later token changes an earlier output"),
    AveragePooling: ("avg_pool1d", "looks ahead: a later token changes an earlier output"),
    TransposedConvolution: ("conv_transpose1d", r"its result has T\+2 positions: it is not one per token"),
    ConvolutionInTwoDimensions: ("conv2d", r"its result has T\+1 positions: it is not one per token"),
    ViewedWrongly: ("reshape", "looks ahead: a later token changes an earlier output"),
    TimeSplitInTwo: ("slice", "cuts an axis of 2·T entries, which is not time alone"),
    FirstHalfOfDoubled: ("slice", "cuts an axis of 2·T entries, which is not time alone"),
    EverySecondPosition: ("slice", "takes every 2th position: the output is not one per token"),
}


# ---- positions, lengths and rows of the batch ----------------------------------------------------------------------


class PositionsFromTheEnd(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] + self.taps.T[: x.shape[1]].flip(0)


class PositionsAsAShare(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] * torch.linspace(0, 1, x.shape[1])[None, :, None]


class PositionsAsChannels(Mixer):
    """A table for positions that lines up with the channels of a turned signal."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btc,t->btc", x[..., :WIDTH], torch.arange(x.shape[1]) * 1.0)


class LengthAsDivisor(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] / x.shape[1]


class LengthAsFactor(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] * (1 / (2 * x.shape[1]))


class LengthAsConstant(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] / torch.ones(x.shape[1]).sum()


class MeanOverRows(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] - x[..., :WIDTH].mean(0, keepdim=True)


class SoftmaxOverRows(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH].softmax(0)


class TrainingBatchNorm(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(signal(x), torch.zeros(WIDTH), torch.ones(WIDTH), training=True).transpose(1, 2)


POSITIONS = {
    PositionsFromTheEnd: ("add", r"uses flip, a constant that depends on the absolute position"),
    PositionsAsAShare: ("mul", r"uses unsqueeze_\d, a constant that depends on the absolute position"),
    PositionsAsChannels: ("einsum", r"uses mul\w*, a constant that depends on the absolute position"),
    LengthAsDivisor: ("div", "depends on the length of the sequence"),
    LengthAsFactor: ("mul", "uses truediv, a number that changes with the length of the sequence"),
    LengthAsConstant: ("div", "uses sum_1, a constant that changes with the length of the sequence"),
    MeanOverRows: ("mean", r"its result \[1, T, 8\] has 0 batch axes instead of one"),
    SoftmaxOverRows: ("softmax", "mixes the rows of the batch"),
    TrainingBatchNorm: ("batch_norm", "looks ahead: a later token changes an earlier output"),
}


# ---- signals and spectra that are not cut, joined or read as they should be ----------------------------------------


class NeverCut(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        y = self.short(x.transpose(1, 2))[:, :WIDTH].softmax(1).sum(-1, keepdim=True)
        return y.transpose(1, 2) + x[..., :WIDTH]


class PaddedAndNotCut(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool1d(F.pad(signal(x), (2, 0)), 3, stride=1).transpose(1, 2)


class CutTooShort(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(signal(x)[..., :-1].sin(), (0, 1)).transpose(1, 2)


class ChangedInPart(Mixer):
    """The positions behind the sequence are written around, and read again."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.short(x.transpose(1, 2))
        y[..., : x.shape[1]] *= 2
        return y.sin()[:, :WIDTH, : x.shape[1]].transpose(1, 2)


class CutFromTheMiddle(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return self.short(x.transpose(1, 2)).sin()[:, :WIDTH, 1:-1].transpose(1, 2)


class CutUnevenly(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        y = F.conv1d(signal(x), self.taps[:, None, :2], padding=1, groups=WIDTH)
        z = F.conv1d(signal(x), self.taps[:, None, :3], padding=2, groups=WIDTH)
        return (y.sin() + z.sin()[..., :-1])[..., :-1].transpose(1, 2)


class CutBeforeATransform(Mixer):
    """The last position would hear the transform's zero in place of its own input."""

    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        spectrum = rfft(signal(x)[..., :-1], n=n) * rfft(self.taps[:, :time], n=n)
        return irfft(spectrum, n=n)[..., :time].transpose(1, 2)


class CutAndChangedBeforeATransform(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        spectrum = rfft(signal(x)[..., :-1].sin(), n=n) * rfft(self.taps[:, :time], n=n)
        return irfft(spectrum, n=n)[..., :time].transpose(1, 2)


class NotCutBeforeATransform(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u, n = self.short(x.transpose(1, 2)).sin()[:, :WIDTH], 2 * x.shape[1] + 4
        return irfft(rfft(u, n=n) * rfft(self.taps, n=n), n=n)[..., : x.shape[1]].transpose(1, 2)


class ActivationBeforeTheCut(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(transformed(x, self.taps))[..., : x.shape[1]].transpose(1, 2)


class TransformTooShort(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], x.shape[1] - 2
        y = irfft(rfft(signal(x), n=n) * rfft(self.taps[:, :time], n=n), n=n)
        return F.pad(y, (0, 2)).transpose(1, 2)


class InvertedAtAnotherLength(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        return irfft(rfft(signal(x), n=n) * rfft(self.taps[:, :time], n=n), n=n - 1)[..., :time].transpose(1, 2)


class InvertedAsAFullSpectrum(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        spectrum = rfft(signal(x), n=n) * rfft(self.taps[:, :time], n=n)
        return torch.fft.ifft(spectrum, n=n).real[..., :time].transpose(1, 2)


class SpectraAdded(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        spectrum = rfft(signal(x), n=n)
        return irfft(spectrum + spectrum * self.direct[:, None], n=n)[..., :time].transpose(1, 2)


class SpectraContracted(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        time, n = x.shape[1], 2 * x.shape[1]
        kernel = rfft(self.taps[:, None, :time].expand(-1, WIDTH, -1), n=n)
        return irfft(torch.einsum("bdf,edf->bef", rfft(signal(x), n=n), kernel), n=n)[..., :time].transpose(1, 2)


class FourierMixing(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(torch.fft.fft(x[..., :WIDTH], dim=-1), dim=1).real


class PaddedByReflection(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = F.pad(signal(x), (2, 0), mode="reflect")
        return F.conv1d(u, self.taps[:, None, :3], groups=WIDTH).transpose(1, 2)


class PaddedWithOnes(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = F.pad(signal(x), (2, 0), value=1.0)
        return F.conv1d(u, self.taps[:, None, :3], groups=WIDTH).transpose(1, 2)


class PaddedInBothAxes(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[..., : WIDTH - 1], (0, 1, 1, -1))


class StartsWithALearnedToken(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        start = self.direct.expand(x.shape[0], 1, WIDTH)
        return torch.cat([start, x[:, :-1, :WIDTH]], dim=1)


class SignalsJoined(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        a, b, _ = x.chunk(3, dim=-1)
        return torch.cat([a, b], dim=1)[:, : x.shape[1]]


MALFORMED = {
    NeverCut: ("sum", r"its result \[B, 8, 1\] has no time axis"),
    PaddedAndNotCut: ("pad", "is 34 positions long where the sequence has 32, and never cut"),
    CutTooShort: ("pad", "pads a signal with zeros where positions were cut off"),
    ChangedInPart: ("slice_scatter", "joins signals cut to 32 and 34 positions where the sequence has 32"),
    CutFromTheMiddle: ("slice", "cuts positions 1 to 33 of a signal that is 2 positions too long"),
    CutUnevenly: ("slice", "cuts positions 0 to 33 of a signal that is 2 positions too long"),
    NotCutBeforeATransform: ("fft_rfft", "transforms a signal 2 positions longer than the sequence"),
    CutBeforeATransform: ("fft_rfft", "its input lacks the last 1 positions of the sequence"),
    CutAndChangedBeforeATransform: ("fft_rfft", "transforms a signal 1 positions shorter than the sequence"),
    ActivationBeforeTheCut: ("fft_irfft", "is 64 positions long where the sequence has 32, and read before a cut"),
    TransformTooShort: ("fft_rfft", "a transform of length 30 drops part of the sequence of 32"),
    InvertedAtAnotherLength: ("fft_irfft", "has length 63 where the forward transform has 64"),
    InvertedAsAFullSpectrum: ("fft_ifft", "inverts a one-sided spectrum as a full one, or the other way round"),
    SpectraAdded: ("add", "reads a spectrum in a way that is not understood"),
    SpectraContracted: ("einsum", "combines spectra as 'bdf,edf->bef', which is not a product bin by bin"),
    FourierMixing: ("real", "reads a spectrum in a way that is not understood"),
    PaddedByReflection: ("pad", "pads time by reflect, not with zeros"),
    PaddedWithOnes: ("pad", r"pads time with 1\.0, not with zeros"),
    PaddedInBothAxes: ("pad", "pads time and channels at once"),
    StartsWithALearnedToken: ("cat", "joins a signal along time with a constant that is not zero"),
    SignalsJoined: ("cat", "joins signals along time"),
}

REFUSED = MIXES_TIME | POSITIONS | MALFORMED


@pytest.mark.parametrize("mixer", REFUSED, ids=lambda mixer: mixer.__name__)
def test_message(mixer: type[Mixer]) -> None:
    operator, reason = REFUSED[mixer]
    error = refusal(tiny(mixer))
    pattern = rf"layers\.0\.mixer: {operator}: {reason}.* \(.*/test_refused\.py:\d+: .+\)"
    assert re.fullmatch(pattern, str(error)), error
    assert "\n" not in str(error)
    assert (error.module, error.operator) == ("layers.0.mixer", operator)


def test_the_source_line_is_the_operators_own() -> None:
    error = refusal(tiny(Reversed))
    assert error.line.endswith(": return x[..., :WIDTH].flip(1)")


class CenteredModule(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.short = nn.Conv1d(3 * WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x.transpose(1, 2)).transpose(1, 2)


def test_the_module_is_the_innermost_one() -> None:
    error = refusal(tiny(CenteredModule))
    assert str(error).startswith("layers.0.mixer.short: conv1d: looks ahead by 1 positions (")
    assert error.line.endswith(": return self.short(x.transpose(1, 2)).transpose(1, 2)")


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed(input_ids).flip(1)


class Wrapped(nn.Module):
    """As `load` hands modules over: the user's own is `inner`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(input_ids)


def test_the_models_own_code_is_called_the_model() -> None:
    bare = Bare().eval()
    for module in (bare, Wrapped(bare)):
        error = refusal(LoadedModel(module, "module", CONTEXT, 0, "tests"))
        assert str(error).startswith("the model: flip: looks ahead")
