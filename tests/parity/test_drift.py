"""A hundred thousand steps in single precision stay where double precision goes."""

from __future__ import annotations

import copy

import numpy as np
import onnxruntime
import torch
from models import VOCAB, Hyena, program_of, with_modal
from streams import feed, serialized, torch_stream, zero_states

from lhcompile.artifacts import Program
from lhcompile.lower.export import export_onnx
from lhcompile.lower.portable import Step
from lhcompile.streamify import streamify

STEPS, EVERY = 100_000, 1_000
DRIFT = 5e-6
"""Largest difference as a share of the largest value. A pole of modulus 0.999 keeps a rounding error of 6e-8 for a
thousand steps; measured was 1e-7, at the first thousand as at the last."""


def test_a_hundred_thousand_steps() -> None:
    program = streamify(with_modal(program_of(Hyena), largest=0.999))
    session = onnxruntime.InferenceSession(
        serialized(export_onnx(program, Step, one_token=True)), providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_inputs()]
    tokens = torch.randint(0, VOCAB, (1, STEPS), generator=torch.Generator().manual_seed(0))

    exact = Program(copy.deepcopy(program.graph).double(), program.context, program.states)
    zero = [state.double() for state in zero_states(program.states, 1)]
    expected, final = feed(torch_stream(exact), tokens, zero, [EVERY] * (STEPS // EVERY))

    states = [state.numpy() for state in zero_states(program.states, 1)]
    largest, worst, norms = float(expected.abs().max()), [], []
    for t, token in enumerate(tokens[0].numpy()):
        logits, *states = session.run(None, dict(zip(names, [token.reshape(1, 1), *states], strict=True)))
        if t % EVERY == EVERY - 1:
            worst.append(np.abs(logits[0, 0] - expected[0, t].numpy()).max() / largest)
            norms.append(max(float(np.abs(state).max()) for state in states))
    assert max(worst) <= DRIFT
    assert max(worst[-10:]) <= 4 * max(worst[:10])
    assert max(norms[-10:]) <= 4 * max(norms[:10])
    for mine, theirs in zip(states, final, strict=True):
        assert np.abs(mine - theirs.numpy()).max() <= DRIFT * float(theirs.abs().max())
