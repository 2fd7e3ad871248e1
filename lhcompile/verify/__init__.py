"""Stage: is the built model the model it came from? Parity gates after every stage, figures on held-out sequences.

Parity means the whole sequence against every way of cutting it, outputs and final states, several rows at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lhruntime import Session
from torch import Tensor

from lhcompile.artifacts import Program
from lhcompile.errors import ParityError
from lhcompile.measure import Agreement, Deviation, Model, Reference, compare
from lhcompile.parallel import threads_for
from lhcompile.verify.budgets import (
    CAPTURED,
    ONNX,
    RECOGNIZED,
    STREAMED,
    Tolerance,
    quantized_tolerance,
    rounded_to,
    state_tolerance,
)
from lhcompile.verify.model import StageFidelity

__all__ = [
    "CAPTURED",
    "ONNX",
    "RECOGNIZED",
    "STREAMED",
    "Fed",
    "Reference",
    "SessionModel",
    "Tolerance",
    "assert_close",
    "check_cuts",
    "check_finite",
    "check_session",
    "check_stage",
    "check_streamed",
    "cuts_of",
    "describe",
    "fed",
    "fidelity",
    "quantized_tolerance",
    "rounded_to",
    "said",
    "state_tolerance",
]

ROWS = 3


def assert_close(value: Tensor, reference: Tensor, tolerance: Tolerance, what: str) -> None:
    """Raise ParityError when |value − reference| exceeds the tolerance times the reference's RMS, or is not finite.

    Its maximum, or where the tolerance is one on average its root mean square. Where it is one of each number, a number
    larger than the RMS may differ by that share of itself. Whole numbers must be the same.
    """
    if value.shape != reference.shape:
        raise ParityError(f"{tolerance.name}: {what} has shape {list(value.shape)}, not {list(reference.shape)}")
    if not reference.numel():
        return
    share = tolerance.relative if reference.is_floating_point() else 0.0
    scale = float(reference.double().square().mean().sqrt())
    error = value.double() - reference.double()
    worst = float(error.square().mean().sqrt() if tolerance.on_average else error.abs().max())
    if worst <= share * scale < math.inf:
        return
    size = f"{share:g} of its RMS"
    if tolerance.of_each and math.isfinite(scale):
        sizes = reference.double().abs().clamp(min=scale)
        if (error.abs() <= share * sizes).all():
            return
        at = (error.abs() / sizes).argmax()
        worst, scale = float(error.abs().flatten()[at]), float(sizes.flatten()[at])
        size = f"{share:g} of its RMS or of the number itself, whichever is larger"
    average = " on average" * tolerance.on_average
    raise ParityError(
        f"{tolerance.name}: {what} differs by {worst:.3g}{average} where {share * scale:.3g} is allowed "
        f"({size}: {tolerance.reason})"
    )


@torch.no_grad()
def check_stage(model: Model, reference: Model, inputs: Tensor, tolerance: Tolerance) -> None:
    """A stage's outputs against those of the stage before, on sequences [rows, time, …] and on a shorter piece."""
    unit = "positions" if inputs.is_floating_point() else "tokens"
    for time in (inputs.shape[1], max(1, inputs.shape[1] // 2 - 1)):
        rows = inputs[:, :time]
        assert_close(model(rows), reference(rows), tolerance, f"{said(rows)} of {len(rows)} × {time} {unit}")


def cuts_of(length: int) -> list[list[int]]:
    """Ways to cut a sequence: one by one at its start, odd pieces around powers of two, two unequal halves."""
    ragged = [1, 2, 31, 33, 1, 64, 7]
    pieces: list[int] = []
    while sum(pieces) < length:
        pieces.append(min(ragged[len(pieces) % len(ragged)], length - sum(pieces)))
    ones, third = min(length, 16), max(1, length // 3)
    return [pieces, [1] * ones + [length - ones] * (length > ones), [third, length - third]]


@torch.no_grad()
def check_streamed(program: Program, reference: Model, tokens: Tensor) -> None:
    """The streamed program fed whole and in cuts against the whole-sequence program: logits and final states."""
    with threads_for(program.graph):
        _check_streamed(program, reference, tokens)


def _check_streamed(program: Program, reference: Model, tokens: Tensor) -> None:
    zero = program.start(len(tokens))
    truth = reference(tokens)
    _, *final = program.graph(tokens, *zero)
    for cuts in ([tokens.shape[1]], *cuts_of(tokens.shape[1])):
        states, logits = list(zero), []
        for piece in tokens.split([cut for cut in cuts if cut], dim=1):
            part, *states = program.graph(piece, *states)
            logits.append(part)
        how = describe(cuts)
        assert_close(torch.cat(logits, 1), truth, STREAMED, f"{said(tokens)} fed {how}")
        for state, value, expected in zip(program.states, states, final, strict=True):
            assert_close(value, expected, STREAMED, f"state {state.name} after feeding {how}")


def said(inputs: Tensor) -> str:
    """What a model says to token ids, or to features."""
    return "values" if inputs.is_floating_point() else "logits"


def describe(cuts: Sequence[int]) -> str:
    if len(cuts) == 1:
        return "whole"
    return f"in {len(cuts)} pieces ({', '.join(map(str, cuts[:5]))}{', …' * (len(cuts) > 5)})"


@dataclass(frozen=True)
class Fed:
    """What comes of feeding tokens [rows, time]: logits [rows, time, vocab], and every state at the end by name."""

    tokens: Tensor
    logits: Tensor
    states: dict[str, Tensor]


class SessionModel:
    """A built directory as a Model: tokens or features to logits or values, from zero states.

    load: a session for so many rows; one is open at a time, since each may hold the weights of both graphs
    rows: how many the graphs are for, None for any number
    """

    def __init__(self, load: Callable[[int], Session], rows: int | None = None) -> None:
        self._load = load
        self._rows = rows
        self._session: Session | None = None

    def session(self, batch: int) -> Session:
        """The session for this batch, freshly reset."""
        if self._session is None or self._session.batch != batch:
            self._session = None  # before another takes its memory
            self._session = self._load(batch)
        self._session.reset()
        return self._session

    def close(self) -> None:
        """Gives the session's memory back; another is opened when it is needed."""
        self._session = None

    def __call__(self, tokens: Tensor) -> Tensor:
        return self.feed(tokens, [tokens.shape[1]]).logits

    def feed(self, tokens: Tensor, cuts: Sequence[int]) -> Fed:
        """Logits and final states after feeding tokens [rows, time] in pieces of these lengths."""
        parts = [self._feed(rows, cuts) for rows in tokens.split(self._rows or len(tokens))]
        states = {name: torch.cat([part.states[name] for part in parts]) for name in parts[0].states}
        return Fed(tokens, torch.cat([part.logits for part in parts]), states)

    def _feed(self, tokens: Tensor, cuts: Sequence[int]) -> Fed:
        session = self.session(len(tokens))
        pieces = tokens.split([cut for cut in cuts if cut], dim=1)
        logits = [torch.from_numpy(np.array(session.prefill(piece.numpy()))) for piece in pieces]
        states = {name: torch.from_numpy(np.array(value)) for name, value in session.states().items()}
        return Fed(tokens, torch.cat(logits, 1), states)


@torch.no_grad()
def fed(program: Program, tokens: Tensor) -> Fed:
    """A streamed torch program fed whole, from zero states."""
    logits, *final = program.graph(tokens, *program.start(len(tokens)))
    return Fed(tokens, logits, dict(zip((state.name for state in program.states), final, strict=True)))


def check_session(model: SessionModel, expected: Fed, tolerance: Tolerance = ONNX) -> int:
    """The ONNX graphs against what is expected, fed whole and in cuts: logits and final states.

    Returns the number of ways the tokens were cut.
    """
    ways = [[expected.tokens.shape[1]], *cuts_of(expected.tokens.shape[1])]
    for cuts in ways:
        found = model.feed(expected.tokens, cuts)
        assert_close(found.logits, expected.logits, tolerance, f"{said(expected.tokens)} fed {describe(cuts)}")
        for name, state in expected.states.items():
            what = f"state {name} after feeding {describe(cuts)}"
            assert_close(_numbers(found.states[name]), _numbers(state), tolerance, what)
    return len(ways)


def _numbers(state: Tensor) -> Tensor:
    """Codes of a state in fewer bits as numbers; counters stay whole."""
    return state if state.dtype == torch.int64 else state.float()


def check_cuts(model: SessionModel, tokens: Tensor, tolerance: Tolerance = ONNX) -> int:
    """A built directory against itself: every way of cutting tokens [rows, time] against feeding them whole.

    Returns the number of ways.
    """
    return check_session(model, model.feed(tokens, [tokens.shape[1]]), tolerance)


def fidelity(reference: Reference, stages: Mapping[str, Model]) -> list[StageFidelity]:
    """The reference and every stage on the reference's inputs, as they stand in the report."""
    return [_stage(name, result) for name, result in compare(reference, stages).items()]


def check_finite(stages: Sequence[StageFidelity]) -> None:
    """Raise ParityError for a stage that said something that is no number."""
    for stage in stages:
        figures = (stage.loss, stage.kl_mean, stage.relative_error, stage.max_difference)
        if not all(math.isfinite(figure) for figure in figures if figure is not None):
            raise ParityError(f"{stage.name}: outputs on held-out sequences are not finite")


def _stage(name: str, result: Agreement | Deviation) -> StageFidelity:
    if isinstance(result, Deviation):
        return StageFidelity(
            name=name,
            tokens=result.positions,
            relative_error=result.relative_error,
            max_difference=result.max_difference,
        )
    return StageFidelity(
        name=name,
        tokens=result.tokens,
        loss=result.loss,
        kl_mean=max(result.kl_mean, 0.0),
        top1_agreement=result.top1_agreement,
        max_difference=result.max_logit_difference,
    )
