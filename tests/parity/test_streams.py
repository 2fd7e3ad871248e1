"""Whole against cuts: the same logits and the same final states, in torch and in onnxruntime.

torch: each streamed program fed in cuts against itself fed whole. onnxruntime: step and prefill graphs fed in cuts
against the torch program fed whole.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import VOCAB, HeadsOutermost, Hyena, program_of, with_modal
from streams import Stream, assert_parity, onnx_stream, torch_stream
from torch import Tensor

from lhcompile.artifacts import Program
from lhcompile.lower import lower
from lhcompile.streamify import streamify

CASES = [(name, form) for name in ("per channel", "shared") for form in ("exact", "modal", "packed")]
LENGTHS = [1, 31, 32, 33, 63, 64, 65, 100]  # around the 32 tokens of a chunk
CUTS = {
    "whole": [],
    "ones": [1] * 100,
    "odd": [3, 5, 1, 31, 33, 7],
    "chunks": [32, 32, 32],
    "chunk and one": [33, 32, 31, 1],
    "prefill, then steps": [64, *[1] * 36],
    "steps, then prefill": [*[1] * 5, 95],
}


def tokens(batch: int, time: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(time))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: ", ".join(case))
def case(request: pytest.FixtureRequest, built: Callable) -> tuple[Program, Stream, Stream]:
    """(streamed program, its torch stream, its onnxruntime stream)"""
    model = built(*request.param)
    return model.program, torch_stream(model.program), onnx_stream(model.lowered)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_torch_in_cuts(case: tuple[Program, Stream, Stream], cuts: list[int], batch: int) -> None:
    program, stream, _ = case
    assert_parity(stream, stream, program.states, tokens(batch, 100), cuts)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_onnx_in_cuts(case: tuple[Program, Stream, Stream], cuts: list[int], batch: int) -> None:
    program, reference, stream = case
    assert_parity(stream, reference, program.states, tokens(batch, 100), cuts)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", LENGTHS)
def test_onnx_prefill_of_any_length(case: tuple[Program, Stream, Stream], length: int, batch: int) -> None:
    program, reference, stream = case
    assert_parity(stream, reference, program.states, tokens(batch, length))


@pytest.mark.parametrize("length", LENGTHS)
def test_onnx_prefill_of_any_length_continues_any_other(case: tuple[Program, Stream, Stream], length: int) -> None:
    program, reference, stream = case
    assert_parity(stream, reference, program.states, tokens(2, 37 + length), [37])


def test_onnx_prefill_takes_single_tokens(case: tuple[Program, Stream, Stream], built: Callable) -> None:
    """A prompt of one token goes through the prefill graph of a runtime that knows no better."""
    program, reference, _ = case
    model = next(built(*which) for which in CASES if built(*which).program is program)
    prefill_only = onnx_stream(type(model.lowered)(model.lowered.prefill, model.lowered.prefill, "portable", ()))
    assert_parity(prefill_only, reference, program.states, tokens(2, 5), [1, 1, 2, 1])


@pytest.mark.parametrize("orders", [[0], [1, 0, 1], [0, 6], [2, 1]], ids=str)
def test_packed_states_of_any_orders(orders: list[int]) -> None:
    """A layer without any state, real poles alone, and filters of one order beside filters without."""
    streamed = streamify(with_modal(program_of(Hyena, HeadsOutermost), orders=orders))
    stream = onnx_stream(lower(streamed, "portable"))
    for cuts in ([1] * 40, [33], [3, 35]):
        assert_parity(stream, torch_stream(streamed), streamed.states, tokens(2, 40), cuts)


def test_rows_do_not_hear_each_other(case: tuple[Program, Stream, Stream]) -> None:
    program, _, stream = case
    ids = tokens(3, 50)
    states = [torch.randn(3, *state.shape) for state in program.states]
    together, after = stream(ids, states)
    alone, alone_after = stream(ids[1:2], [state[1:2] for state in states])
    torch.testing.assert_close(together[1:2], alone)
    for mine, theirs in zip(after, alone_after, strict=True):
        torch.testing.assert_close(mine[1:2], theirs)
