"""A model of everything at once: short and long convolutions, a given modal system, attention and positions.

Whole against cuts, in torch and in onnxruntime, and rows that stand at different positions.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import CONTEXT, VOCAB
from streams import Stream, assert_close, assert_parity, feed, onnx_stream, torch_stream
from torch import Tensor

from lhcompile.artifacts import Program

CUTS = {
    "whole": [],
    "ones": [1] * CONTEXT,
    "odd": [3, 5, 1, 1, 7],
    "all but one": [CONTEXT - 1],
    "one, then all": [1, CONTEXT - 1],
    "steps after a prompt": [20, *[1] * 12],
}


def tokens(batch: int, time: int = CONTEXT) -> Tensor:
    return torch.randint(0, VOCAB, (batch, time), generator=torch.Generator().manual_seed(time))


@pytest.fixture(scope="module")
def case(built: Callable) -> tuple[Program, Stream]:
    """(streamed program, its onnxruntime stream)"""
    made = built("hybrid", "modal")
    return made.program, onnx_stream(made.lowered)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_cuts(case: tuple[Program, Stream], cuts: list[int], batch: int) -> None:
    program, onnx = case
    reference = torch_stream(program)
    for stream in (reference, onnx):
        assert_parity(stream, reference, program.states, tokens(batch), cuts)


@pytest.mark.parametrize("pieces", [[1, 1, 1, 1], [4], [3, 1]], ids=["steps", "prompt", "prompt and step"])
def test_rows_at_different_positions(case: tuple[Program, Stream], pieces: list[int]) -> None:
    """Two sequences that began at different times go on side by side as they would alone."""
    program, onnx = case
    ids, ends = tokens(2), (5, 17)
    before = [feed(onnx, ids[row : row + 1, :end], program.start(1), []) for row, end in enumerate(ends)]
    states = [torch.cat(rows) for rows in zip(*(states for _, states in before), strict=True)]
    assert states[-1].tolist() == [[5], [17]]
    rest = torch.stack([ids[row, end : end + 4] for row, end in enumerate(ends)])
    together, after = feed(onnx, rest, states, pieces)
    for row, end in enumerate(ends):
        alone, final = feed(torch_stream(program), ids[row : row + 1, : end + 4], program.start(1), [])
        assert_close(together[row : row + 1], alone[:, end:], f"row {row}")
        for mine, theirs, state in zip(after, final, program.states, strict=True):
            assert_close(mine[row : row + 1], theirs, f"{state.name} of row {row}")


def test_what_stands_behind_the_position_is_not_heard(case: tuple[Program, Stream]) -> None:
    """A cache may hold anything behind the row's own position."""
    program, onnx = case
    ids = tokens(2)
    _, states = feed(onnx, ids[:, :9], program.start(2), [])
    expected = [onnx(ids[:, 9 : 9 + count], states)[0] for count in (1, 4)]
    for state, value in zip(program.states, states, strict=True):
        if state.kind in ("key", "value"):
            value[:, :, 9:] = 1e3
    for count, logits in zip((1, 4), expected, strict=True):
        torch.testing.assert_close(onnx(ids[:, 9 : 9 + count], states)[0], logits)
