"""Decode graphs of models whose short convolutions differ in taps, in lhruntime's loop and engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from lhruntime import DeviceLoop, Engine, Session
from lhruntime.sampling import Sampler
from lhruntime.slots import Prompts
from models import ORDERS, VOCAB, Hyena, RotaryAttention, program_of, with_modal, with_taps
from streams import write_directory
from torch import nn

from lhcompile.config import QuantizeConfig
from lhcompile.lower import complete, lower
from lhcompile.quantize import quantize
from lhcompile.streamify import streamify

MODELS: dict[str, tuple[list[type[nn.Module]], list[int] | None, list[int], int]] = {
    "three, in bfloat16": ([Hyena], None, [2], 4),
    "one tap": ([with_taps(1)], None, [], 2),
    "two": ([with_taps(2)], None, [1], 2),
    "three": ([Hyena], None, [2], 4),
    "eight": ([with_taps(8)], None, [7], 8),
    "nine": ([with_taps(9)], None, [], 2),
    "all": ([with_taps(2), Hyena, with_taps(5), with_taps(9), RotaryAttention], list(ORDERS), [1, 2, 4], 6),
}
"""Mixers, orders of filters, tokens of each past that is in tensors of its own, calls of a period."""


@pytest.fixture(scope="module", params=MODELS)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    mixers, orders, past, _ = MODELS[request.param]
    program = streamify(with_modal(program_of(*mixers), orders=orders))
    lowered = lower(program, "cuda")
    if "bfloat16" in request.param:
        lowered = quantize(lowered, QuantizeConfig(quantize="bf16")).lowered
    lowered = complete(lowered, decode=True)
    assert {each.dtype for each in lowered.past.values()} <= {"bfloat16" if "bfloat16" in request.param else None}
    assert [len(each.inputs) for each in lowered.past.values()] == past
    return request.param, write_directory(program, lowered, tmp_path_factory.mktemp("windows") / "out")


@pytest.mark.parametrize("ahead", [1, 3])
def test_sequences_that_come_and_go_get_their_own_tokens(built: tuple[str, Path], ahead: int) -> None:
    name, directory = built
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, VOCAB, size) for size in (1, 2, 3, 7, 9, 5, 1, 11, 4, 6)]
    counts = [5, 9, 3, 12, 7, 10, 14, 4, 8, 6]
    session, expected = Session.load(directory, threads=1), []
    for seed, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        session.reset()
        expected.append([int(token[0]) for token in session.generate(prompt, count, seed=seed)])
    with Engine.load(directory, slots=3, threads=1, chunk=4, ahead=ahead) as engine:
        assert engine._loop.slots.period == MODELS[name][3]
        handles = [
            engine.submit(prompt, count, seed=seed)
            for seed, (prompt, count) in enumerate(zip(prompts, counts, strict=True))
        ]
        assert [handle.result(60) for handle in handles] == expected


def test_a_slot_takes_over_what_a_prompt_left(built: tuple[str, Path]) -> None:
    """Bit for bit, in every call of a period."""
    _, directory = built
    loop, session = DeviceLoop.load(directory, 2, threads=1), Session.load(directory, threads=1)
    prompts = Prompts(loop._model, 4)
    for seed in range(loop.slots.period):
        prompt = np.random.default_rng(seed).integers(0, VOCAB, (1, 9))
        session.reset()
        for piece in np.split(prompt, [4, 8], axis=1):
            session.prefill(piece)
        for _ in prompts.read(prompt, lambda: loop.slots.writing(1)):
            pass
        for found, state in zip(loop.slots.read(1), session.states().values(), strict=True):
            np.testing.assert_array_equal(found, state)
        loop.run(1)


def test_states_are_written_read_and_cleared_where_they_stand(built: tuple[str, Path]) -> None:
    """In every call of a period, for one of three sequences; the others keep theirs."""
    _, directory = built
    loop = DeviceLoop.load(directory, 3, threads=1)
    for row in range(3):
        loop.place(row, row + 1, Sampler(0.0))
    for call in range(2 * loop.slots.period + 1):
        loop.run(1)
        before = [loop.slots.read(row) for row in range(3)]
        assert len(before[0]) == len(loop._model.manifest.states)
        with loop.slots.writing(1) as values:
            for value, state in zip(values, before[2], strict=True):
                value.update_inplace(np.ascontiguousarray(state))
        for row, wanted in ((0, before[0]), (1, before[2]), (2, before[2])):
            for found, state in zip(loop.slots.read(row), wanted, strict=True):
                np.testing.assert_array_equal(found, state)
        if call % 2:
            loop.slots.clear(1)
            assert not any(state.any() for state in loop.slots.read(1))
            for found, state in zip(loop.slots.read(2), before[2], strict=True):
                np.testing.assert_array_equal(found, state)
