"""Permutes move down until they meet and cancel."""

from __future__ import annotations

import re

import pytest
import torch
from models import CONTEXT, HEADS, WIDTH, HeadsInnermost, HeadsOutermost, Hyena, Mixer, program_of, tiny
from streams import assert_same_model
from torch import Tensor

from lhcompile.artifacts import Program
from lhcompile.capture import capture
from lhcompile.recognize import recognize


def permutes(program: Program) -> int:
    return len(re.findall(r"aten\.(permute|transpose)\.", program.graph.code))


class Gated(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.permute(0, 2, 1).split(WIDTH, dim=1)
        return (a * b + c).permute(0, 2, 1)


def test_permutes_cancel() -> None:
    """
    before                                          after
    p = permute(x, [0, 2, 1])                       a, b = split(x, d, 2)
    a, b = split(p, d, 1)                           y = mul(a, b)
    y = permute(mul(a, b), [0, 2, 1])
    """
    loaded = tiny(Gated)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert permutes(program) == 0
    assert re.findall(r"aten\.split\.Tensor\(\w+, 8, (\d)\)", program.graph.code) == ["2"]


def test_a_hyena_layer_turns_nothing_over() -> None:
    assert permutes(program_of(Hyena, Hyena)) == 0


class ConstantsOfEveryRank(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH].transpose(1, 2)
        u = u * self.direct[:, None] + 2.0
        u = u - self.direct[None, :, None].exp()
        u = u * self.direct[0]
        return torch.where(u > self.taps[:, :1], u, u.tanh()).mT


class ConstantOfHigherRank(Mixer):
    """The constant gives the product an axis that the signal does not have."""

    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH].transpose(1, 2) * self.direct.view(1, 1, WIDTH, 1)
        return u[0].transpose(1, 2)


class DifferentOrders(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        u = x[..., :4].view(batch, time, 2, 2)
        a, b = u.permute(0, 2, 3, 1), u.permute(0, 3, 2, 1)
        return (a * b).permute(0, 3, 1, 2).flatten(2).repeat(1, 1, 2)


class UsedTwice(Mixer):
    """A permuted tensor that is also read as it is, and two splits of it."""

    def forward(self, x: Tensor) -> Tensor:
        p = x.transpose(1, 2)
        a, b, c = p.split(WIDTH, dim=1)
        d, e = p.chunk(2, dim=1)
        f = p.split([WIDTH, 2 * WIDTH], dim=-2)[0]
        return ((a * b + c + f) + (d * e)[:, :WIDTH] + p[:, :WIDTH].flip(1)).mT


class Softmax(Mixer):
    """Not elementwise: it names the axis it runs along."""

    def forward(self, x: Tensor) -> Tensor:
        return (x[..., :WIDTH].transpose(1, 2) * 2).softmax(1).transpose(1, 2)


class BroadcastAxes(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH].unflatten(-1, (HEADS, -1)).permute(0, 2, 3, 1)
        return (u * u[:, :, :1] + u.sum(2, keepdim=True)).flatten(1, 2).mT


@pytest.mark.parametrize(
    "mixer",
    [
        ConstantsOfEveryRank,
        ConstantOfHigherRank,
        DifferentOrders,
        UsedTwice,
        Softmax,
        BroadcastAxes,
        HeadsInnermost,
        HeadsOutermost,
    ],
    ids=lambda mixer: mixer.__name__,
)
def test_the_program_stays_the_same(mixer: type[Mixer]) -> None:
    loaded = tiny(mixer, mixer)
    assert_same_model(recognize(capture(loaded)), loaded.module)


def test_every_node_keeps_the_sizes_it_has() -> None:
    """meta["sizes"] is what later stages read; it has to be true after the rewrite."""
    for mixer in (Hyena, HeadsInnermost, HeadsOutermost, UsedTwice, BroadcastAxes):
        program = program_of(mixer)

        class Checked(torch.fx.Interpreter):
            def run_node(self, n: torch.fx.Node) -> object:
                value = super().run_node(n)
                laws = n.meta.get("sizes")
                if isinstance(value, Tensor) and isinstance(laws, tuple):
                    expected = [law.offset if law.fixed else None for law in laws]
                    found = [size if law.fixed else None for size, law in zip(value.shape, laws, strict=True)]
                    assert found == expected, n
                return value

        Checked(program.graph).run(torch.zeros(3, CONTEXT, dtype=torch.int64))
