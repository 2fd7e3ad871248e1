"""States in and out: their names, shapes, order, and that the source program is left as it was."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from models import (
    CONTEXT,
    HEADS,
    ORDERS,
    VOCAB,
    WIDTH,
    HeadsBetween,
    HeadsInnermost,
    Hyena,
    Mixed,
    Mixer,
    program_of,
    tiny,
    with_modal,
)
from streams import assert_parity, feed, torch_stream, zero_states
from torch import Tensor, nn

from lhcompile.artifacts import LoadedModel, Program
from lhcompile.capture import capture
from lhcompile.recognize import recognize
from lhcompile.streamify import streamify


def names(program: Program) -> list[tuple[str, str]]:
    return [(state.name, state.output) for state in program.states]


def test_every_operator_gets_its_state() -> None:
    """
    before                                       after
    y, _ = lhc.fir(x, w, b, None, groups)        y, s' = lhc.fir(x, w, b, s, groups)      s a graph input
    return logits                                return logits, s', …
    """
    program = program_of(Hyena)
    streamed = streamify(program)
    before, after = (re.sub(r";  [\w =]+None", "", part.graph.code) for part in (program, streamed))
    fir, long_conv = "past_layers_0_mixer_short_fir", "past_layers_0_mixer_long_conv"
    assert "def forward(self, input_ids):" in before
    assert f"def forward(self, input_ids, {fir}, {long_conv}):" in after
    assert re.search(r"lhc\.fir\.default\(\w+, weight_\d, bias_\d, None, 24\)", before)
    assert re.search(rf"lhc\.fir\.default\(\w+, weight_\d, bias_\d, {fir}, 24\)", after)
    assert re.search(r"lhc\.long_conv\.default\(\w+, taps_\d_with_skip, None, 1\)", before)
    assert re.search(rf"lhc\.long_conv\.default\(\w+, taps_\d_with_skip, {long_conv}, 1\)", after)
    successors = re.findall(r"(getitem_\w+) = (fir\w+|long_conv\w+)\[1\]", after)
    assert [source for _, source in successors] == ["fir_default", "long_conv_default"]
    assert re.search(rf"return \(\w+, {', '.join(name for name, _ in successors)}\)", after)


def test_the_source_program_is_left_as_it_was() -> None:
    program = program_of(Hyena)
    code, tokens = program.graph.code, torch.zeros(1, 3, dtype=torch.int64)
    expected = program.graph(tokens)
    first, second = streamify(program), streamify(program)
    assert program.graph.code == code
    assert torch.equal(program.graph(tokens), expected)
    assert first.graph.code == second.graph.code
    assert first.states == second.states


@pytest.mark.parametrize("modal", [False, True])
def test_shapes_and_kinds(modal: bool) -> None:
    program = program_of(HeadsInnermost, Mixed)
    streamed = streamify(with_modal(program) if modal else program)
    square = WIDTH * WIDTH // HEADS
    kind, rows = ("modal", 6) if modal else ("long_conv", CONTEXT - 1)
    assert [(state.kind, state.shape) for state in streamed.states] == [
        ("fir", (2, 3 * WIDTH)),
        (kind, (rows, square)),
        ("fir", (3, WIDTH)),
        ("fir", (1, WIDTH)),
        ("fir", (1, WIDTH)),
        (kind, (rows, WIDTH)),
        ("fir", (10, WIDTH)),
    ]
    tokens = torch.randint(0, VOCAB, (2, 5))
    logits, after = feed(torch_stream(streamed), tokens, zero_states(streamed.states, 2), [])
    assert logits.shape == (2, 5, VOCAB)
    assert [tuple(state.shape) for state in after] == [(2, *state.shape) for state in streamed.states]


def test_none_and_zeros_are_the_same_beginning() -> None:
    program = program_of(Hyena, Mixed)
    streamed = streamify(program)
    tokens = torch.randint(0, VOCAB, (2, 9))
    logits, _ = feed(torch_stream(streamed), tokens, zero_states(streamed.states, 2), [])
    torch.testing.assert_close(logits, program.graph(tokens))


def test_packed_states_hold_what_filters_use() -> None:
    """Orders by filter: 8 channels, 2 heads on 16 channels each, one filter for 8 channels."""
    program = with_modal(program_of(Hyena, HeadsInnermost, HeadsBetween, Mixed), orders=ORDERS)
    streamed = streamify(program)
    square = WIDTH * WIDTH // HEADS
    shapes = [state.shape for state in streamed.states if state.kind == "modal"]
    per_head = sum(ORDERS[:HEADS]) * square // HEADS
    assert shapes == [(1, sum(ORDERS) + ORDERS[0]), (1, per_head), (1, per_head), (1, ORDERS[0] * WIDTH)]
    tokens = torch.randint(0, VOCAB, (2, 5))
    _, after = feed(torch_stream(streamed), tokens, zero_states(streamed.states, 2), [])
    assert [tuple(state.shape) for state in after] == [(2, *state.shape) for state in streamed.states]


@pytest.mark.parametrize("modal", [False, True])
def test_token_by_token(modal: bool) -> None:
    program = program_of(Hyena, HeadsInnermost)
    streamed = streamify(with_modal(program) if modal else program)
    stream = torch_stream(streamed)
    tokens = torch.randint(0, VOCAB, (2, CONTEXT + 9), generator=torch.Generator().manual_seed(0))
    assert_parity(stream, stream, streamed.states, tokens, [1] * tokens.shape[1])


# ---- names -----------------------------------------------------------------------------------------------------------


def test_a_layer_of_one_fir_and_one_modal_state_has_the_names_generators_look_for() -> None:
    streamed = streamify(with_modal(program_of(Hyena, Hyena)))
    assert names(streamed) == [
        ("past_key_values.0.conv_state", "present.0.conv_state"),
        ("past_key_values.0.recurrent_state", "present.0.recurrent_state"),
        ("past_key_values.1.conv_state", "present.1.conv_state"),
        ("past_key_values.1.recurrent_state", "present.1.recurrent_state"),
    ]
    assert [state.module for state in streamed.states[:2]] == ["layers.0.mixer.short", "layers.0.mixer"]


def test_an_exact_layer_is_named_by_module_and_kind() -> None:
    assert names(streamify(program_of(Hyena))) == [
        ("past.layers.0.mixer.short.fir", "present.layers.0.mixer.short.fir"),
        ("past.layers.0.mixer.long_conv", "present.layers.0.mixer.long_conv"),
    ]


class TwoOfAKind(Mixer):
    """The same module twice, and two shifts in one module."""

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        z = self.short(self.short(x.transpose(1, 2))[..., :time])[..., :time].transpose(1, 2)
        return F.pad(z, (0, 0, 1, -1))[..., :WIDTH] + F.pad(z, (0, 0, 2, 0))[:, :time, :WIDTH]


def test_states_of_one_module_and_kind_are_counted() -> None:
    assert [name for name, _ in names(streamify(program_of(TwoOfAKind)))] == [
        "past.layers.0.mixer.short.fir",
        "past.layers.0.mixer.short.fir.1",
        "past.layers.0.mixer.fir",
        "past.layers.0.mixer.fir.1",
    ]


def test_a_layer_with_more_than_two_states_is_named_by_module_and_kind() -> None:
    streamed = streamify(with_modal(program_of(Hyena, Mixed)))
    assert [name for name, _ in names(streamed)] == [
        "past_key_values.0.conv_state",
        "past_key_values.0.recurrent_state",
        "past.layers.1.mixer.dense.fir",
        "past.layers.1.mixer.grouped.fir",
        "past.layers.1.mixer.fir",
        "past.layers.1.mixer.modal",
        "past.layers.1.mixer.dilated.fir",
    ]


class Arranged(nn.Module):
    """The same two mixers under names given by `places`, dotted for nesting."""

    def __init__(self, *places: str) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(VOCAB, 3 * WIDTH), []
        for place in places:
            *folders, name = place.split(".")
            home: nn.Module = self
            for folder in folders:
                if not hasattr(home, folder):
                    home.add_module(folder, nn.Module())
                home = getattr(home, folder)
            home.add_module(name, Hyena())
            self.mix.append(getattr(home, name))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for mixer in self.mix[:-1]:
            x = x + mixer(x).repeat(1, 1, 3)
        return self.head(self.mix[-1](x))


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (("encoder.0", "decoder.0"), ["past.encoder.0.short.fir", "past.encoder.0.modal"]),
        (("first", "second"), ["past.first.short.fir", "past.first.modal"]),
        (("h1", "h2"), ["past.h1.short.fir", "past.h1.modal"]),
        (("3.a", "12.a"), ["past_key_values.3.conv_state", "past_key_values.3.recurrent_state"]),
        (("a.7.b.0", "a.8.b.0"), ["past_key_values.7.conv_state", "past_key_values.7.recurrent_state"]),
        (("a.0.x", "a.0.y"), ["past.a.0.x.short.fir", "past.a.0.x.modal"]),
    ],
    ids=["same number twice", "no numbers", "numbers in words", "bare numbers", "nested", "two in one layer"],
)
def test_names_of_other_layouts(places: tuple[str, ...], expected: list[str]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Arranged(*places).eval().requires_grad_(False)
    streamed = streamify(with_modal(recognize(capture(LoadedModel(module, "module", CONTEXT, 0, "tests")))))
    found = [name for name, _ in names(streamed)]
    assert found[:2] == expected
    assert len({*found, *(output for _, output in names(streamed))}) == 8


class Direct(nn.Module):
    """A model whose own forward does everything."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.head(x + F.pad(x, (0, 0, 1, -1)))


def test_the_models_own_states() -> None:
    module = Direct().eval().requires_grad_(False)
    streamed = streamify(recognize(capture(LoadedModel(module, "module", CONTEXT, 0, "tests"))))
    assert names(streamed) == [("past.the_model.fir", "present.the_model.fir")]
    assert streamed.states[0].module == "the model"


def test_a_model_without_memory_has_no_states() -> None:
    class Pointwise(Mixer):
        def forward(self, x: Tensor) -> Tensor:
            return x[..., :WIDTH].tanh()

    streamed = streamify(recognize(capture(tiny(Pointwise))))
    assert streamed.states == ()
    tokens = torch.randint(0, VOCAB, (2, 3))
    logits, after = feed(torch_stream(streamed), tokens, [], [1, 1])
    assert logits.shape == (2, 3, VOCAB)
    assert after == []
