"""Short convolutions and shifts; each is one lhc.fir."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import CONTEXT, WIDTH, Mixed, Mixer, convolve, operators, tiny
from streams import assert_same_model
from torch import Tensor, nn

from lhcompile.capture import capture
from lhcompile.recognize import recognize


class Short(Mixer):
    """A base with more convolutions; `fir` lists what recognition has to find."""

    fir: tuple[tuple[int, ...], ...]

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, 3, groups=WIDTH, bias=False)
        self.dense = nn.Conv1d(3 * WIDTH, WIDTH, 4)
        self.grouped = nn.Conv1d(WIDTH, 2 * WIDTH, 2, groups=2, padding=1)
        self.single = nn.Conv1d(3 * WIDTH, WIDTH, 1)


class CutByLength(Short):
    fir = ((3 * WIDTH, 1, 3),)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x.transpose(1, 2))[..., : x.shape[1]][:, :WIDTH].transpose(1, 2)


class CutByPadding(Short):
    fir = ((3 * WIDTH, 1, 3),)

    def forward(self, x: Tensor) -> Tensor:
        return self.short(x.transpose(1, 2))[..., :-2][:, :WIDTH].transpose(1, 2)


class CutByNegativePad(Short):
    fir = ((3 * WIDTH, 1, 3),)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.short(x.transpose(1, 2)), (0, -2))[:, :WIDTH].transpose(1, 2)


class CutLate(Short):
    """Everything before the cut treats each position on its own."""

    fir = ((3 * WIDTH, 1, 3),)

    def forward(self, x: Tensor) -> Tensor:
        z = F.silu(self.short(x.transpose(1, 2)).transpose(1, 2))
        return (z[..., :WIDTH] * z[..., WIDTH : 2 * WIDTH])[:, : x.shape[1]]


class SplitThenCut(Short):
    fir = ((3 * WIDTH, 1, 3),)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.short(x.transpose(1, 2)).split(WIDTH, dim=1)
        time = x.shape[1]
        return ((a * b)[..., :time] + c[..., :time]).transpose(1, 2)


class CutInPlace(Short):
    fir = ((3 * WIDTH, 1, 3),)

    def forward(self, x: Tensor) -> Tensor:
        y = self.short(x.transpose(1, 2))[..., : x.shape[1]]
        y += 1
        y[:, 0] = 0
        return y[:, :WIDTH].transpose(1, 2)


class PaddedLeft(Short):
    fir = ((WIDTH, 1, 3),)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(F.pad(x[..., :WIDTH].transpose(1, 2), (2, 0))).transpose(1, 2)


class PaddedLeftByModule(Short):
    fir = ((WIDTH, 1, 3),)

    def forward(self, x: Tensor) -> Tensor:
        u = nn.ConstantPad1d((2, 0), 0.0)(x[..., :WIDTH].transpose(1, 2))
        return F.conv1d(u, self.depthwise.weight, padding="valid", groups=WIDTH).transpose(1, 2)


class PaddedWithZerosByCat(Short):
    fir = ((WIDTH, 1, 3),)

    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH].transpose(1, 2)
        return self.depthwise(torch.cat([u.new_zeros(u.shape[0], WIDTH, 2), u], dim=-1)).transpose(1, 2)


class PaddedTooMuch(Short):
    """Three positions more than a causal convolution needs: the output is three positions late."""

    fir = ((WIDTH, 1, 6),)

    def forward(self, x: Tensor) -> Tensor:
        return self.depthwise(F.pad(x[..., :WIDTH].transpose(1, 2), (5, 0)))[..., : x.shape[1]].transpose(1, 2)


class Dense(Short):
    fir = ((WIDTH, 3 * WIDTH, 4),)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(F.pad(x.transpose(1, 2), (3, 0))).transpose(1, 2)


class Grouped(Short):
    fir = ((2 * WIDTH, WIDTH // 2, 2),)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(x[..., :WIDTH].transpose(1, 2))[..., :-1]
        return (y[:, :WIDTH] * y[:, WIDTH:]).transpose(1, 2)


class Dilated(Short):
    fir = ((WIDTH, 1, 9),)

    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH].transpose(1, 2)
        y = F.conv1d(u, self.depthwise.weight, padding=8, dilation=4, groups=WIDTH)
        return y[..., : x.shape[1]].transpose(1, 2)


class Twice(Short):
    fir = ((3 * WIDTH, 1, 3), (WIDTH, 3 * WIDTH, 4))

    def forward(self, x: Tensor) -> Tensor:
        z = self.short(x.transpose(1, 2))[..., : x.shape[1]]
        return self.dense(F.pad(z, (3, 0))).transpose(1, 2)


class ThenSingle(Short):
    """A convolution of one tap treats each position on its own, cut or not."""

    fir = ((3 * WIDTH, 1, 3),)

    def forward(self, x: Tensor) -> Tensor:
        return self.single(self.short(x.transpose(1, 2)))[..., : x.shape[1]].transpose(1, 2)


class SingleOnly(Short):
    fir = ()

    def forward(self, x: Tensor) -> Tensor:
        return self.single(x.transpose(1, 2)).transpose(1, 2)


class ShiftByPad(Short):
    fir = ((WIDTH, 1, 2),)

    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH]
        return F.pad(u, (0, 0, 1, -1)) * u


class ShiftByZeroPad(Short):
    fir = ((WIDTH, 1, 2),)

    def forward(self, x: Tensor) -> Tensor:
        return nn.ZeroPad2d((0, 0, 1, -1))(x[..., :WIDTH])


class ShiftByCat(Short):
    fir = ((WIDTH, 1, 3),)

    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH]
        return torch.cat([torch.zeros_like(u[:, :2]), u[:, :-2]], dim=1)


class ShiftOfWhatWasCutBefore(Short):
    """Between the cut and the shift stand operators that treat each position on its own."""

    fir = ((WIDTH, 1, 2),)

    def forward(self, x: Tensor) -> Tensor:
        u = F.silu(x[:, :-1, :WIDTH] * 2)
        return torch.cat([u.new_zeros(u.shape[0], 1, WIDTH), u], dim=1)


class ShiftByAssignment(Short):
    fir = ((WIDTH, 1, 2),)

    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH]
        shifted = torch.zeros_like(u)
        shifted[:, 1:] = u[:, :-1]
        return shifted + u


class ShiftOfAConvolution(Short):
    fir = ((3 * WIDTH, 1, 3), (WIDTH, 1, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.short(x.transpose(1, 2))[:, :WIDTH, : x.shape[1]]
        return F.pad(y, (1, -1)).transpose(1, 2)


class HeadsInTheBatch(Short):
    """The same filters for each half of the channels, which stand in the batch axis."""

    fir = ((WIDTH, 1, 3),)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        u = x[..., :WIDTH].transpose(1, 2).reshape(2 * batch, WIDTH // 2, time)
        y = F.conv1d(F.pad(u, (2, 0)), self.depthwise.weight[: WIDTH // 2], groups=WIDTH // 2)
        return y.reshape(batch, WIDTH, time).transpose(1, 2)


SPELLINGS = [
    CutByLength,
    CutByPadding,
    CutByNegativePad,
    CutLate,
    SplitThenCut,
    CutInPlace,
    PaddedLeft,
    PaddedLeftByModule,
    PaddedWithZerosByCat,
    PaddedTooMuch,
    Dense,
    Grouped,
    Dilated,
    Twice,
    ThenSingle,
    SingleOnly,
    ShiftByPad,
    ShiftByZeroPad,
    ShiftByCat,
    ShiftOfWhatWasCutBefore,
    ShiftByAssignment,
    ShiftOfAConvolution,
    HeadsInTheBatch,
]


@pytest.mark.parametrize("mixer", SPELLINGS, ids=lambda mixer: mixer.__name__)
def test_published_spelling(mixer: type[Short]) -> None:
    loaded = tiny(mixer)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert operators(program) == [("fir", shape) for shape in mixer.fir]


def test_every_kind_in_one_mixer() -> None:
    loaded = tiny(Mixed)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert sorted(operators(program)) == [
        ("fir", (WIDTH, 1, 2)),
        ("fir", (WIDTH, 1, 11)),
        ("fir", (WIDTH, WIDTH // 2, 2)),
        ("fir", (WIDTH, WIDTH, 4)),
        ("long_conv", (1, CONTEXT)),
    ]


class ShiftOfALongConvolution(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return F.pad(convolve(x[..., :WIDTH].transpose(1, 2), self.taps), (1, -1)).transpose(1, 2)


class LongConvolutionOfAShift(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return convolve(F.pad(x[..., :WIDTH].transpose(1, 2), (1, -1)), self.taps).transpose(1, 2)


class Cascade(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH].transpose(1, 2)
        return convolve(convolve(u, self.taps), self.head_taps[0]).transpose(1, 2)


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        (ShiftOfALongConvolution, [("long_conv", (WIDTH, CONTEXT)), ("fir", (WIDTH, 1, 2))]),
        (LongConvolutionOfAShift, [("fir", (WIDTH, 1, 2)), ("long_conv", (WIDTH, CONTEXT))]),
        (Cascade, [("long_conv", (WIDTH, CONTEXT)), ("long_conv", (1, CONTEXT))]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_operators_in_a_row(mixer: type[Mixer], expected: list[tuple[str, tuple[int, ...]]]) -> None:
    loaded = tiny(mixer)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert operators(program) == expected


class LongByConv1d(Mixer):
    """A filter as long as the context, written as conv1d: exact, and kept as a fir."""

    def forward(self, x: Tensor) -> Tensor:
        u, time = x[..., :WIDTH].transpose(1, 2), x.shape[1]
        kernel = self.taps[:, None, :time].flip(-1)
        return F.conv1d(u, kernel, padding=time - 1, groups=WIDTH)[..., :time].transpose(1, 2)


def test_long_filter_spelled_as_conv1d() -> None:
    loaded = tiny(LongByConv1d)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert operators(program) == [("fir", (WIDTH, 1, CONTEXT))]
