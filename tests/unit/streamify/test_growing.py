"""States that grow with the sequence: caches of attention, and one counter for all that depends on the position."""

from __future__ import annotations

import re

import pytest
import torch
from models import (
    CONTEXT,
    VOCAB,
    WIDTH,
    GivenModal,
    Hyena,
    LearnedPositions,
    Mixer,
    RotaryAttention,
    program_of,
    with_modal,
)
from streams import assert_parity, torch_stream
from torch import Tensor, nn

from lhcompile.artifacts import LoadedModel, Program, Signal
from lhcompile.capture import capture
from lhcompile.errors import ConfigError
from lhcompile.recognize import recognize
from lhcompile.streamify import check_capacity, streamify


def names(program: Program) -> list[str]:
    return [state.name for state in program.states]


def test_attention_has_caches_and_the_program_a_counter() -> None:
    """
    before                                              after
    y, _, _ = lhc.attention(q, k, v, None, …, a)        y, k', v' = lhc.attention(q, k, v, keys, values, at, a)
    places, _ = lhc.position(ids, None)                 places, at' = lhc.position(ids, at)
    """
    program = program_of(RotaryAttention, RotaryAttention)
    streamed = streamify(program)
    names = [f"past_key_values_{i}_{kind}" for i in (0, 1) for kind in ("key", "value")]
    code = re.sub(r";  [\w =]+None", "", streamed.graph.code)
    assert f"def forward(self, input_ids, {', '.join(names)}, past_position):" in code
    assert re.search(r"lhc\.position\.default\(input_ids, past_position\)", code)
    assert code.count("lhc.position") == 1
    for i in (0, 1):
        caches = f"past_key_values_{i}_key, past_key_values_{i}_value, past_position"
        assert re.search(rf"lhc\.attention\.default\(\w+, \w+, \w+, {caches}, [\d.]+\)", code)
    assert "None, None, None" in program.graph.code


def test_names_shapes_and_dtypes() -> None:
    streamed = streamify(with_modal(program_of(Hyena, RotaryAttention, GivenModal)), 20)
    assert [(s.name, s.output, s.kind, s.shape, s.dtype, s.capacity) for s in streamed.states] == [
        ("past_key_values.0.conv_state", "present.0.conv_state", "fir", (2, 24), "float32", None),
        ("past_key_values.0.recurrent_state", "present.0.recurrent_state", "modal", (6, 8), "float32", None),
        ("past_key_values.1.key", "present.1.key", "key", (2, 20, 2), "float32", 20),
        ("past_key_values.1.value", "present.1.value", "value", (2, 20, 2), "float32", 20),
        ("past.layers.2.mixer.modal", "present.layers.2.mixer.modal", "modal", (6, 8), "float32", None),
        ("past.position", "present.position", "position", (1,), "int64", 20),
    ]
    assert streamed.capacity == 20
    start = streamed.start(3)
    assert [tuple(state.shape) for state in start] == [(3, *state.shape) for state in streamed.states]
    assert [str(state.dtype).removeprefix("torch.") for state in start] == [state.dtype for state in streamed.states]
    assert not any(bool(state.any()) for state in start)
    assert [state.bytes for state in streamed.states] == [192, 192, 320, 320, 192, 8]


class AttentionTwice(RotaryAttention):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + super().forward(x.flip(-1))


class AttentionBesideAConvolution(RotaryAttention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.short(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))


@pytest.mark.parametrize(
    ("mixer", "expected"),
    [
        (AttentionTwice, ["key", "value", "key.1", "value.1"]),
        (AttentionBesideAConvolution, ["short.fir", "key", "value"]),
    ],
)
def test_an_attention_that_is_not_alone_in_its_layer_is_named_by_module(
    mixer: type[Mixer], expected: list[str]
) -> None:
    streamed = streamify(program_of(mixer))
    assert names(streamed) == [*(f"past.layers.0.mixer.{name}" for name in expected), "past.position"]


class PlainAttention(Mixer):
    """Knows no positions besides the order of its caches."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(*x.chunk(3, dim=-1), is_causal=True)


@pytest.mark.parametrize("mixers", [[PlainAttention], [LearnedPositions], [Hyena, PlainAttention, PlainAttention]])
def test_one_counter_serves_caches_and_tables(mixers: list[type[Mixer]]) -> None:
    streamed = streamify(program_of(*mixers))
    assert names(streamed).count("past.position") == 1
    assert names(streamed)[-1] == "past.position"
    tokens = torch.randint(0, VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(0))
    for cuts in ([1] * CONTEXT, [5, 1, 9]):
        assert_parity(torch_stream(streamed), torch_stream(streamed), streamed.states, tokens, cuts)


def test_the_source_program_keeps_its_tables() -> None:
    program = program_of(LearnedPositions, RotaryAttention)
    before = {name: buffer.shape for name, buffer in program.graph.named_buffers()}
    code = program.graph.code
    short, long = streamify(program, 5), streamify(program)
    assert {name: buffer.shape for name, buffer in program.graph.named_buffers()} == before
    assert program.graph.code == code
    assert (short.capacity, long.capacity) == (5, CONTEXT)
    assert streamify(program, 10 * CONTEXT).capacity == CONTEXT


def test_a_program_without_positions_has_no_counter() -> None:
    streamed = streamify(program_of(Hyena), 5)
    assert streamed.capacity is None
    assert [state.capacity for state in streamed.states] == [None, None]


def test_room_that_cannot_be_had() -> None:
    program = program_of(RotaryAttention)
    check_capacity(program, None)
    check_capacity(program, CONTEXT)
    with pytest.raises(ConfigError, match="--max-context 33 is above the model's context of 32 positions"):
        check_capacity(program, CONTEXT + 1)
    with pytest.raises(ConfigError, match="--max-context: no state of this model grows with the sequence"):
        check_capacity(program_of(Hyena), 5)


class Features(nn.Module):
    """A continuous signal through attention."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, signal: Tensor) -> Tensor:
        x = self.into(signal) + torch.arange(signal.shape[1])[:, None] * 0.1
        return self.out(nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True))


def test_positions_of_a_continuous_signal() -> None:
    signal = Signal(3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Features().eval().requires_grad_(False)
    loaded = LoadedModel(module, "module", CONTEXT, 0, "tests", signal=signal)
    streamed = streamify(recognize(capture(loaded)))
    given = signal.random(2, CONTEXT, tokens=0)
    assert names(streamed)[-1] == "past.position"
    for cuts in ([1] * CONTEXT, [5, 1, 9]):
        assert_parity(torch_stream(streamed), torch_stream(streamed), streamed.states, given, cuts)
    torch.testing.assert_close(streamed(given), module(given))
