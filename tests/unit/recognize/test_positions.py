"""Constants that depend on the absolute position become tables that are read by position."""

from __future__ import annotations

import re

import pytest
import torch
from models import CONTEXT, VOCAB, WIDTH, Hyena, LearnedPositions, Mixer, RotaryAttention, tiny, turned
from streams import assert_same_model
from torch import Tensor, nn

from lhcompile.artifacts import LoadedModel, Program
from lhcompile.capture import capture
from lhcompile.recognize import recognize
from lhcompile.streamify import streamify


def tables(program: Program) -> list[tuple[int, ...]]:
    """Shapes of what is read by position, in order."""
    nodes = list(program.graph.graph.nodes)
    counted = [node for node in nodes if node.target == torch.ops.lhc.position.default]
    assert len(counted) == 1
    (places,) = (user for user in counted[0].users if user.args[1] == 0)
    return [tuple(getattr(program.graph, node.args[0].target).shape) for node in nodes if node.args[1:2] == (places,)]


class AddedBehind(Mixer):
    """With axes of size 1 for rows and channels, and as a number."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :WIDTH] * torch.arange(x.shape[1])[None, :, None] * 0.1


class AlongTheLastAxis(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return (x[..., :WIDTH].transpose(1, 2) + self.taps[:, : x.shape[1]]).transpose(1, 2)


class PerHead(Mixer):
    """[batch, heads, time, width] with tables [time, width]"""

    def forward(self, x: Tensor) -> Tensor:
        heads = x[..., :WIDTH].unflatten(-1, (2, 4)).transpose(1, 2)
        angle = torch.arange(x.shape[1])[:, None] * torch.tensor([1.0, 0.1])
        return turned(heads, angle.cos(), angle.sin()).transpose(1, 2).flatten(2)


class Interleaved(Mixer):
    """Neighbours turn together, positions are scaled, heads stand behind time."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        pairs = x[..., :WIDTH].reshape(batch, time, 2, 2, 2)
        angle = (torch.arange(time) / 16)[:, None, None] * torch.tensor([1.0, 0.1])
        a, b = pairs.unbind(-1)
        return torch.stack([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1).flatten(2)


class JoinedToTheSignal(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.mix = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        places = self.places(torch.arange(x.shape[1]).expand(x.shape[0], -1))
        return self.mix(torch.cat([x[..., :WIDTH], places], dim=-1))


class ChosenByParity(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        even = torch.arange(x.shape[1])[:, None] % 2 == 0
        return torch.where(even, x[..., :WIDTH], -x[..., WIDTH : 2 * WIDTH])


class BehindAnUncutConvolution(Mixer):
    """A table as long as the padded signal, which is cut later."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.short(x.transpose(1, 2))[:, :WIDTH].sin()
        return (y * (torch.arange(y.shape[-1]) * 0.1))[..., : x.shape[1]].transpose(1, 2)


@pytest.mark.parametrize(
    ("mixer", "found"),
    [
        (LearnedPositions, [(CONTEXT, WIDTH)]),
        (AddedBehind, [(CONTEXT, 1)]),
        (AlongTheLastAxis, [(CONTEXT, WIDTH)]),
        (PerHead, [(CONTEXT, 2)] * 4),
        (Interleaved, [(CONTEXT, 2)] * 4),
        (JoinedToTheSignal, [(CONTEXT, WIDTH)]),
        (ChosenByParity, [(CONTEXT, 1)]),
        (BehindAnUncutConvolution, [(CONTEXT, 1)]),
    ],
)
def test_table(mixer: type[Mixer], found: list[tuple[int, ...]]) -> None:
    loaded = tiny(mixer)
    program = recognize(capture(loaded))
    assert tables(program) == found
    assert_same_model(program, loaded.module)


def test_the_operators() -> None:
    """
    before                       after
    x + table[:t]                places, _ = lhc.position(input_ids, None)
                                 x + embedding(table, places)
    """
    code = recognize(capture(tiny(LearnedPositions))).graph.code
    assert re.search(r"(position\w*) = torch\.ops\.lhc\.position\.default\(input_ids, None\)", code)
    assert re.search(r"aten\.embedding\.default\(slice_\w+, getitem\w*\)", code)


def test_layers_share_one_counter_and_equal_tables() -> None:
    program = recognize(capture(tiny(RotaryAttention, Hyena, RotaryAttention, LearnedPositions)))
    reads = tables(program)
    assert set(reads) == {(CONTEXT, 1), (CONTEXT, WIDTH)}
    nodes = program.graph.graph.nodes
    names = {node.args[0].target for node in nodes if node.target == torch.ops.aten.embedding.default}
    assert len(names) == 4  # tokens, cosines, sines, learned rows


def test_tables_are_cut_to_the_room_of_the_states() -> None:
    program = recognize(capture(tiny(LearnedPositions)))
    streamed = streamify(program, 12)
    assert tables(streamed) == [(12, WIDTH)]
    assert tables(program) == [(CONTEXT, WIDTH)]
    (state,) = streamed.states
    assert (state.name, state.kind, state.shape, state.dtype, state.capacity) == (
        "past.position",
        "position",
        (1,),
        "int64",
        12,
    )


class PositionsInTheEmbedding(nn.Module):
    """A model whose own forward adds learned positions to its tokens, as the first thing it does."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCAB, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1])))


def test_the_models_own_positions() -> None:
    module = PositionsInTheEmbedding().eval().requires_grad_(False)
    program = recognize(capture(LoadedModel(module, "module", CONTEXT, 0, "tests")))
    assert_same_model(program, module)
