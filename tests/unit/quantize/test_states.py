"""States in fewer bits: graphs leave what `State.kept` says, moving a number rounds it once, and zero stays zero."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lhcompile.artifacts import LARGEST_HALF, Lowered, State
from lhcompile.quantize import keep_states, kept_in, state_ranges
from lhcompile.verify import rounded_to

from .toy import inputs, session

TYPES = ("float16", "int8")


def ranges_of(states: tuple[State, ...], largest: float = 4.0) -> dict[str, Tensor]:
    return {state.name: torch.full(state.shape, largest) for state in states}


@pytest.fixture(scope="module")
def graphs(built: Callable) -> Lowered:
    return built("hybrid", "packed").lowered


@pytest.mark.parametrize("graph", ["step", "prefill"])
@pytest.mark.parametrize("dtype", TYPES)
def test_graphs_round_as_states_say(graphs: Lowered, dtype: str, graph: str) -> None:
    states = kept_in(graphs.states, dtype, ranges_of(graphs.states))  # type: ignore[arg-type]
    kept = keep_states(graphs, states)
    plain, short = session(getattr(graphs, graph)), session(getattr(kept, graph))
    feeds = inputs(graphs, 1 if graph == "step" else 9)
    codes = {state.name: state.kept(torch.from_numpy(feeds[state.name])) for state in states}
    meant = {state.name: state.meant(codes[state.name]).numpy() for state in states}
    logits, *after = plain.run(None, feeds | meant)
    found, *left = short.run(None, feeds | {name: value.numpy() for name, value in codes.items()})
    np.testing.assert_allclose(found, logits, atol=1e-6 * np.abs(logits).max())
    for state, new, value in zip(states, left, after, strict=True):
        assert new.dtype == np.dtype(state.dtype)
        wanted = state.kept(torch.from_numpy(value))
        apart = np.abs(new.astype(np.float64) - wanted.numpy().astype(np.float64))
        assert (apart > 0).mean() < 1e-3
        assert apart.max(initial=0) <= (1 if dtype == "int8" else 1e-2 * np.abs(value).max(initial=1))


@pytest.mark.parametrize("dtype", TYPES)
def test_what_came_in_stays(graphs: Lowered, dtype: str) -> None:
    before = [value.dtype for value in graphs.step.graph.inputs]
    states = kept_in(graphs.states, dtype, ranges_of(graphs.states))  # type: ignore[arg-type]
    kept = keep_states(graphs, states)
    assert [value.dtype for value in graphs.step.graph.inputs] == before
    assert [value.name for value in kept.step.graph.outputs] == [value.name for value in graphs.step.graph.outputs]
    assert {state.dtype for state in states} == {dtype, "int64"}
    assert sum(state.bytes for state in states) < sum(state.bytes for state in graphs.states)


def state_of(kind: str, dtype: str = "float32") -> State:
    return State(kind, f"{kind}'", (2, 3), kind, "m", dtype)


def test_pasts_are_kept_as_they_are_where_floats_are_asked_for() -> None:
    states = state_of("fir"), state_of("modal")
    for named, asked, kept in (
        ("halves", "float32", "float16"),
        ("halves", "float16", "float16"),
        ("halves", "int8", "int8"),
        ("apart", "float32", "float32"),
        ("apart", "float16", "float32"),
        ("apart", "int8", "int8"),
    ):
        window, modal = kept_in(states, asked, ranges_of(states), **{named: {"fir"}})  # type: ignore[arg-type]
        assert (window.dtype, modal.dtype) == (kept, asked)


@pytest.mark.parametrize(
    ("dtypes", "rounded"),
    [
        ({"fir": "float32", "modal": "float32"}, None),
        ({"fir": "float16", "modal": "float32"}, None),
        ({"fir": "float32", "modal": "float16"}, "float16"),
        ({"fir": "float16", "modal": "float16", "position": "int64"}, "float16"),
        ({"fir": "float16", "position": "int64"}, "float16"),
        ({"fir": "int8", "modal": "int8"}, "int8"),
    ],
)
def test_what_states_are_rounded_to(dtypes: dict[str, str], rounded: str | None) -> None:
    assert rounded_to([state_of(*each) for each in dtypes.items()]) == rounded


def test_numbers_that_move_share_a_scale(graphs: Lowered) -> None:
    """So that what is read, moved and left is the same code again."""
    generator = torch.Generator().manual_seed(0)
    ranges = {state.name: torch.rand(state.shape, generator=generator) for state in graphs.states}
    moved = {"fir", "key", "value"}
    for state in kept_in(graphs.states, "int8", ranges):
        if state.scales is None:
            continue
        assert (state.scales.shape[-2] == 1) == (state.kind in moved or state.shape[-2] == 1)
        codes = torch.arange(-128, 128, dtype=torch.int8).reshape(-1, *[1] * len(state.shape))
        assert torch.equal(state.kept(state.meant(codes)), codes.expand(-1, *state.scales.shape))


def test_what_does_not_fit_is_the_largest_that_does() -> None:
    state = State("s", "t", (1, 2), "modal", "layer")
    (half,) = kept_in((state,), "float16", None)
    (byte,) = kept_in((state,), "int8", {"s": torch.tensor([[0.0, 2.0]])})
    loud = torch.tensor([[[1e9, -1e9]]])
    assert half.meant(half.kept(loud)).tolist() == [[[LARGEST_HALF, -LARGEST_HALF]]]
    assert byte.kept(loud).tolist() == [[[127, -128]]]
    assert torch.equal(byte.kept(torch.zeros(1, 1, 2)), torch.zeros(1, 1, 2, dtype=torch.int8))


def test_ranges_are_those_of_the_states(built: Callable) -> None:
    """After every token: what states are in between counts as well."""
    program = built("per channel", "modal").program
    tokens = torch.randint(0, 20, (3, 32), generator=torch.Generator().manual_seed(0))
    found = state_ranges(program, tokens)
    states = program.start(3)
    expected = {state.name: torch.zeros(state.shape) for state in program.states}
    for token in tokens.split(1, dim=1):
        with torch.no_grad():
            _, *states = program.graph(token, *states)
        for state, value in zip(program.states, states, strict=True):
            expected[state.name] = torch.maximum(expected[state.name], value.abs().amax(0))
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
