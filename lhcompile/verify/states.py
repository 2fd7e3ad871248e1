"""States that are kept in fewer bits: graphs that keep them so against graphs whose states are rounded from outside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from lhruntime import Session
from lhruntime.snapshot import pack, unpack
from torch import Tensor

from lhcompile.artifacts import State
from lhcompile.verify import Fed, SessionModel, assert_close, cuts_of, describe, said
from lhcompile.verify.budgets import Tolerance, added_tolerance, kept_tolerance

__all__ = ["RoundedBetween", "Stepped", "check_added", "check_drift", "check_kept"]


class Stepped(SessionModel):
    """A built directory fed one token a call, which rounds its states most."""

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.feed(tokens, [1] * tokens.shape[1]).logits


class RoundedBetween(SessionModel):
    """A built directory with float32 states, which are rounded after every call as `states` keep them."""

    def __init__(self, load: Callable[[int], Session], states: Sequence[State], rows: int | None = None) -> None:
        super().__init__(load, rows)
        self._kept = states

    def _feed(self, tokens: Tensor, cuts: Sequence[int]) -> Fed:
        session = self.session(len(tokens))
        logits = []
        calls = [call for cut in cuts for call in _calls(cut, session.piece)]
        for piece in tokens.split(calls, dim=1):
            logits.append(torch.from_numpy(np.array(session.prefill(piece.numpy()))))
            _round_states(session, self._kept)
        states = {name: torch.from_numpy(np.array(value)) for name, value in session.states().items()}
        return Fed(tokens, torch.cat(logits, 1), states)


def _calls(length: int, piece: int | None) -> list[int]:
    """The calls of the graphs in which a session takes so many tokens."""
    if piece is None:
        return [length] * (length > 0)
    return [piece] * (length // piece) + [1] * (length % piece)


def _round_states(session: Session, states: Sequence[State]) -> None:
    """The session's states as if they had been kept in `states`."""
    specs = session.manifest.states
    content = unpack(session.snapshot(), session.manifest.fingerprint, session.batch, specs)
    values = [torch.from_numpy(np.array(value)) for value in content.states]
    kept = [state.meant(state.kept(value)).numpy() for state, value in zip(states, values, strict=True)]
    session.restore(pack(replace(content, states=kept), specs))


def check_kept(model: SessionModel, rounded: SessionModel, states: Sequence[State], tokens: Tensor) -> None:
    """Raise ParityError unless a directory keeps its states as `states` say, whole and in every way of cutting tokens.

    rounded: the same with states that are rounded from outside; it is closed when it has been heard
    """
    tolerance, ways = kept_tolerance(states), [[tokens.shape[1]], *cuts_of(tokens.shape[1])]
    meant = [rounded.feed(tokens, cuts) for cuts in ways]
    rounded.close()
    for cuts, expected in zip(ways, meant, strict=True):
        found = model.feed(tokens, cuts)
        assert_close(found.logits, expected.logits, tolerance, f"{said(tokens)} fed {describe(cuts)}")
        for state in states:
            value = found.states[state.name]
            if value.dtype != expected.states[state.name].dtype:
                value = state.meant(value)
            truth = expected.states[state.name]
            assert_close(value, truth, tolerance, f"state {state.name} after feeding {describe(cuts)}")


def check_drift(
    stepped: SessionModel, plain: SessionModel, tolerance: Tolerance, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Raise ParityError when states in fewer bits carry a directory, fed token by token, away from one with float32
    states that is fed tokens [rows, time] whole. One is open at a time: `stepped`, in the end.

    Returns the outputs of both in the later half of the time, where drift would show, [rows, time − time // 2, …].
    """
    half = tokens.shape[1] // 2
    stepped.close()
    expected = plain.feed(tokens, [tokens.shape[1]]).logits[:, half:].clone()
    plain.close()
    found = stepped.feed(tokens, [1] * tokens.shape[1]).logits[:, half:].clone()
    assert_close(found, expected, tolerance, f"{said(tokens)} after {tokens.shape[1]} steps")
    return found, expected


def check_added(found: Tensor, signals: Tensor, truth: Tensor, states: Tolerance) -> None:
    """Raise ParityError when outputs of rounded signals and states in fewer bits are further from the truth than those
    of the rounded signals alone and what the states may add.

    found, signals, truth: outputs of both, of rounded signals with float32 states, and of neither, alike in shape
    states: what states in fewer bits may do where signals are not rounded
    """
    alone = float((signals - truth).double().square().mean().sqrt() / truth.double().square().mean().sqrt())
    assert_close(found, truth, added_tolerance(alone, states), "what is said beside signals that are rounded")
