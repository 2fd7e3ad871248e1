"""StripedHyena, Evo-1 and Evo 2 as programs: the module's logits, whole and in cuts, and the states they need."""

from __future__ import annotations

from pathlib import Path

import pytest
from streams import assert_same_model
from striped_checkpoints import PUBLISHED, published, write

from lhcompile.artifacts import State
from lhcompile.capture import capture
from lhcompile.load import load
from lhcompile.recognize import recognize
from lhcompile.streamify import streamify

CONTEXT = 24
States = list[tuple[str, tuple[int, ...]]]


def convolution(kind: str, states: int) -> States:
    """The short filter, then the long one."""
    return [("fir", (2, 96)), (kind, (states, 32))]


def attention(kv_heads: int, dim: int) -> States:
    return [("key", (kv_heads, CONTEXT, dim)), ("value", (kv_heads, CONTEXT, dim))]


STATES = {
    "sh-7b": [*convolution("modal", 4), *attention(2, 4), *convolution("modal", 4)],
    "evo-1": [*convolution("modal", 16), *attention(4, 8), *convolution("modal", 16)],
    "evo-2": [*convolution("fir", 6), *convolution("fir", 127), *convolution("modal", 16), *attention(4, 8)],
}
"""Two real states for a complex pole, one for a real pole. The position is one state of the whole model."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_programs_are_the_models(tmp_path: Path, name: str) -> None:
    weights, config = write(published(name), tmp_path)
    loaded = load(str(weights), config=config, context=CONTEXT)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    *states, position = streamify(program).states
    assert [kind_and_shape(state) for state in states] == STATES[name]
    assert kind_and_shape(position) == ("position", (1,))


def kind_and_shape(state: State) -> tuple[str, tuple[int, ...]]:
    return state.kind, state.shape
