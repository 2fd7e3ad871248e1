"""Decode graphs against step graphs: with temperature 0 they choose the most likely token, and keep the same states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from lhruntime.bfloat16 import array_of, value_of
from lhruntime.model import SETTINGS
from numpy.typing import NDArray

from lhcompile.errors import ParityError
from lhcompile.verify import SessionModel, Tolerance, assert_close

__all__ = ["check_decode"]

Array = NDArray[Any]
CALLS = 6
"""At least; so many more as a past has tokens."""


def check_decode(
    step: Path,
    decode: Path,
    past: Mapping[str, Sequence[str]],
    plain: SessionModel,
    tokens: torch.Tensor,
    tolerance: Tolerance,
) -> None:
    """Raise ParityError unless a decode graph is its step graph and the choice of a token behind it.

    Both are fed the same tokens [rows, time], the first few one by one, from zero states and on a CPU. Among equal
    logits the lowest id is chosen.

    step, decode: files of one target; plain: the model of that target, whose memory is given back
    past: states, by their input in the step, that decode has in tensors of their own: their inputs, the oldest first
    """
    ids = tokens[:, : CALLS + max(map(len, past.values()), default=0)].numpy()
    zero = {name: np.array(value) for name, value in plain.session(len(ids)).states().items()}
    plain.close()  # one graph's weights at a time
    greedy = {name: np.zeros(len(ids), dtype) for name, dtype in SETTINGS.items()} | {"top_p": np.ones(len(ids), "f4")}
    expected, found = _feed(step, ids, zero, {}, {}), _feed(decode, ids, zero, past, greedy)
    for call, ((logits, *states), (chosen, *kept)) in enumerate(zip(expected, found, strict=True), start=1):
        best = logits.argmax(-1)
        if not np.array_equal(chosen, best):
            raise ParityError(f"decode: call {call} chose {chosen.ravel()}, the most likely are {best.ravel()}")
        for name, mine, truth in zip(zero, kept, states, strict=True):
            what = f"decode: state {name} after call {call}"
            assert_close(_numbers(mine), _numbers(truth), tolerance, what)


def _feed(
    path: Path,
    ids: Array,
    states: Mapping[str, Array],
    past: Mapping[str, Sequence[str]],
    settings: Mapping[str, Array],
) -> list[list[Array]]:
    """Outputs of every call: logits or tokens, and the states."""
    graph = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (first, *_), outputs = graph.get_inputs(), []
    types = {value.name: value.type for value in graph.get_inputs()}
    for column in range(ids.shape[1]):
        carried: dict[str, Array] = {}
        for name, state in states.items():
            positions = np.split(state, state.shape[1], axis=1) if name in past else [state]
            carried |= dict(zip(past.get(name, [name]), positions, strict=True))
        feeds = {first.name: ids[:, column : column + 1], **carried, **settings}
        given = {name: value_of(array, types[name]) for name, array in feeds.items()}
        said, *after = map(array_of, graph.run_with_ort_values(None, given))
        states = {
            name: np.concatenate([state[:, 1:], new], axis=1) if name in past else new
            for (name, state), new in zip(states.items(), after, strict=True)
        }
        outputs.append([said, *states.values()])
    return outputs


def _numbers(state: Array) -> torch.Tensor:
    """Codes of a state in fewer bits as numbers; counters stay whole."""
    return torch.from_numpy(state if state.dtype == np.int64 else state.astype(np.float32))
