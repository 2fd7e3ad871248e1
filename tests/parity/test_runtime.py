"""The built directory as a user drives it: lhruntime against the torch program, by state names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lhruntime import Session
from models import VOCAB
from streams import assert_close, feed, torch_stream, write_directory, zero_states

from lhcompile.artifacts import Program

CASES = [("per channel", "modal"), ("shared", "modal"), ("shared", "packed"), ("per channel", "exact")]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: ", ".join(case))
def directory(
    request: pytest.FixtureRequest, built: Callable, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Program, Path]:
    """(streamed program, built directory)"""
    model = built(*request.param)
    return model.program, write_directory(model.program, model.lowered, tmp_path_factory.mktemp("built") / "out")


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_then_steps(directory: tuple[Program, Path], batch: int) -> None:
    program, path = directory
    session = Session.load(path, batch=batch, threads=1)
    tokens = torch.randint(0, VOCAB, (batch, 90), generator=torch.Generator().manual_seed(0))
    expected, states = feed(torch_stream(program), tokens, zero_states(program.states, batch), [])
    parts = [session.prefill(tokens[:, :70].numpy(), chunk=33)]
    parts += [session.step(tokens[:, t].numpy())[:, None] for t in range(70, 90)]
    logits = torch.cat([torch.from_numpy(part) for part in parts], dim=1)
    assert_close(logits, expected, "logits")
    assert session.position == 90
    found = session.states()
    assert list(found) == [state.name for state in program.states]
    for state, value in zip(program.states, states, strict=True):
        assert_close(torch.from_numpy(found[state.name]), value, state.name)


def test_reset_is_a_fresh_session(directory: tuple[Program, Path]) -> None:
    session = Session.load(directory[1], batch=2, threads=1)
    tokens = torch.randint(0, VOCAB, (2, 40)).numpy()
    first = session.prefill(tokens)
    session.reset()
    assert not any(value.any() for value in session.states().values())
    assert (session.prefill(tokens) == first).all()


def test_a_fork_goes_its_own_way(directory: tuple[Program, Path]) -> None:
    program, path = directory
    session = Session.load(path, threads=1)
    session.prefill(torch.randint(0, VOCAB, (1, 40)).numpy())
    fork = session.fork()
    one, other = session.step([3]), fork.step([3])
    assert (one == other).all()
    session.step([5])
    fork.step([7])
    assert any((session.states()[state.name] != fork.states()[state.name]).any() for state in program.states)
