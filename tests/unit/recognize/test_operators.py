"""Operators of our own in a module are taken over, their constants folded."""

from __future__ import annotations

import re

import pytest
import torch
from models import CONTEXT, WIDTH, GivenModal, Mixer, operators, tiny
from streams import assert_same_model
from torch import Tensor, nn

from lhcompile.capture import capture
from lhcompile.errors import RecognizeError
from lhcompile.load.modal import complex_modes, real_modes
from lhcompile.recognize import recognize

lhc = torch.ops.lhc


class RealPoles(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.log_poles = nn.Parameter(-torch.rand(WIDTH, 3) - 0.05)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.chunk(3, dim=-1)
        return c * real_modes(a * b, self.log_poles.exp(), self.taps[:, :3], self.direct)


class Fir(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return lhc.fir(x, self.short.weight.flip(-1) * 2, self.short.bias, None, 3 * WIDTH)[0][..., :WIDTH]


class LongConvolution(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return lhc.long_conv(x[..., :WIDTH], self.head_taps.abs(), None, 2)[0]


class AfterAShortConvolution(GivenModal):
    """Reads a signal that is cut, and turned over."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.short(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))


@pytest.mark.parametrize(
    ("mixer", "found"),
    [
        (GivenModal, [("modal_ssm", (6, WIDTH))]),
        (RealPoles, [("modal_ssm", (3, WIDTH))]),
        (Fir, [("fir", (3 * WIDTH, 1, 3))]),
        (LongConvolution, [("long_conv", (2, CONTEXT))]),
        (AfterAShortConvolution, [("fir", (3 * WIDTH, 1, 3)), ("modal_ssm", (6, WIDTH))]),
    ],
)
def test_taken_over(mixer: type[Mixer], found: list[tuple[str, tuple[int, ...]]]) -> None:
    loaded = tiny(mixer)
    program = recognize(capture(loaded))
    assert operators(program) == found
    assert_same_model(program, loaded.module)


def test_the_tables_are_buffers() -> None:
    code = recognize(capture(tiny(GivenModal))).graph.code
    assert re.search(r"modal_ssm\.default\(\w+, own_\d, other_\d, readout_\d, direct_\d, None, None, 1\)", code)
    assert not re.search(r"view_as_complex|cat\.default", code)


class Growing(GivenModal):
    def forward(self, x: Tensor) -> Tensor:
        poles, residues = torch.full((WIDTH, 1), 1.0 + 0j), torch.ones(WIDTH, 1) + 0j
        return complex_modes(x[..., :WIDTH], poles, residues, self.direct)


class NotFinite(GivenModal):
    def forward(self, x: Tensor) -> Tensor:
        return real_modes(x[..., :WIDTH], self.taps[:, :2] * float("nan"), self.taps[:, :2], self.direct)


class NoSlots(GivenModal):
    def forward(self, x: Tensor) -> Tensor:
        own, other = torch.full((2, WIDTH), 0.5), torch.full((2, WIDTH), 0.1)
        return lhc.modal_ssm(x[..., :WIDTH], own, other, own, self.direct, None, None, 1)[0]


class FromTheTokens(GivenModal):
    def forward(self, x: Tensor) -> Tensor:
        own = x[..., 0].sigmoid()
        return lhc.modal_ssm(x[..., :WIDTH], own, own, own, self.direct, None, None, 1)[0]


class WithAState(GivenModal):
    def forward(self, x: Tensor) -> Tensor:
        return lhc.long_conv(x[..., :WIDTH], self.taps, x[..., :WIDTH], 1)[0]


class StateRead(GivenModal):
    def forward(self, x: Tensor) -> Tensor:
        y, state = lhc.fir(x[..., :WIDTH], self.taps[:, None, :2], None, None, WIDTH)
        return y + state


class TimeLast(GivenModal):
    def forward(self, x: Tensor) -> Tensor:
        return lhc.long_conv(x[..., :WIDTH].transpose(1, 2), self.taps, None, 1)[0].transpose(1, 2)


class TapsByLength(GivenModal):
    def forward(self, x: Tensor) -> Tensor:
        return lhc.long_conv(x[..., :WIDTH], self.taps / x.shape[1], None, 1)[0]


class NoSignal(GivenModal):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] + lhc.long_conv(self.taps.T[None], self.taps, None, 1)[0].sum()


@pytest.mark.parametrize(
    ("mixer", "operator", "reason"),
    [
        (Growing, "modal_ssm", "has a pole of modulus 1: its state would grow without bound"),
        (NotFinite, "modal_ssm", "its poles or residues hold NaN or infinite numbers"),
        (NoSlots, "modal_ssm", "its tables hold neither conjugate pairs nor real poles"),
        (FromTheTokens, "modal_ssm", "its filter depends on the tokens"),
        (WithAState, "long_conv", "is given a state: a sequence begins from none"),
        (TimeLast, "long_conv", "its signal is [B, 8, T], not [B, T, channels]"),
        (TapsByLength, "long_conv", "its argument 'taps' changes with the length of the sequence"),
        (StateRead, "getitem", "reads the state of an operator: sequences end with their outputs"),
    ],
)
def test_refused(mixer: type[Mixer], operator: str, reason: str) -> None:
    program = capture(tiny(mixer))
    with pytest.raises(RecognizeError, match=re.escape(reason)) as caught:
        recognize(program)
    assert str(caught.value).startswith("layers.0.mixer: ")
    assert caught.value.operator == operator


def test_a_convolution_of_weights_alone_is_a_constant() -> None:
    loaded = tiny(NoSignal)
    program = recognize(capture(loaded))
    assert operators(program) == []
    assert_same_model(program, loaded.module)
