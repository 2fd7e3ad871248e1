"""Rows that are stopped by the mask, in the step and in prefill."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from models import VOCAB
from numpy.typing import NDArray
from streams import serialized

from lhcompile.artifacts import MASK
from lhcompile.lower.masked import masked

Arrays = list[NDArray[np.generic]]
CASES = [("per channel", "packed"), ("shared", "modal"), ("hybrid", "exact")]
LENGTHS = (11, 4, 1)
"""Real tokens of each row, the others are behind them."""
ROWS, TIME = len(LENGTHS), max(LENGTHS)


class Graphs:
    """The four graphs of a model, run from states given as arrays."""

    def __init__(self, built: Callable, name: str, form: str) -> None:
        lowered = built(name, form).lowered
        stopped = masked(lowered)
        self.states = lowered.states
        self.models = {
            "step": serialized(lowered.step),
            "prefill": serialized(lowered.prefill),
            "masked step": serialized(stopped.step),
            "masked prefill": serialized(stopped.prefill),
        }
        self._sessions = {key: onnxruntime.InferenceSession(model) for key, model in self.models.items()}

    def start(self) -> Arrays:
        return [state.zeros(ROWS).numpy() for state in self.states]

    def run(self, graph: str, ids: NDArray[np.int64], states: Arrays, mask: NDArray[np.int64] | None = None) -> Arrays:
        feeds = dict(zip(["input_ids", *(state.name for state in self.states)], [ids, *states], strict=True))
        return self._sessions[graph].run(None, feeds if mask is None else feeds | {MASK: mask})


@pytest.fixture(scope="module", params=CASES, ids=", ".join)
def graphs(request: pytest.FixtureRequest, built: Callable) -> Graphs:
    return Graphs(built, *request.param)


@pytest.fixture
def ids() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, VOCAB, (ROWS, TIME))


def padding() -> NDArray[np.int64]:
    return (np.arange(TIME) < np.array(LENGTHS)[:, None]).astype(np.int64)


def test_the_contract(graphs: Graphs) -> None:
    for kind in ("step", "prefill"):
        before, after = (onnx.load_from_string(graphs.models[key]).graph for key in (kind, f"masked {kind}"))
        names = [value.name for value in before.input]
        assert [value.name for value in after.input] == [names[0], MASK, *names[1:]]
        assert list(after.output) == list(before.output)
        onnx.checker.check_model(graphs.models[f"masked {kind}"], full_check=True)


def test_a_stopped_row_stays_bit_for_bit(graphs: Graphs, ids: NDArray[np.int64]) -> None:
    old = graphs.run("prefill", ids, graphs.start())[1:]
    token = ids[:, :1]
    free = graphs.run("step", token, old)
    mask = np.array([[1, 1], [1, 0], [0, 1]])
    logits, *new = graphs.run("masked step", token, old, mask)
    np.testing.assert_array_equal(logits[::2], free[0][::2])
    for before, after, unmasked in zip(old, new, free[1:], strict=True):
        np.testing.assert_array_equal(after[1], before[1])
        np.testing.assert_array_equal(after[::2], unmasked[::2])
        assert (unmasked[1] != before[1]).any()


def test_without_padding_prefill_is_what_it_was(graphs: Graphs, ids: NDArray[np.int64]) -> None:
    old = graphs.run("prefill", ids[:, :3], graphs.start())[1:]
    free = graphs.run("prefill", ids, old)
    mask = np.concatenate([padding()[:, -3:], np.ones_like(ids)], axis=1)
    for value, same in zip(free, graphs.run("masked prefill", ids, old, mask), strict=True):
        np.testing.assert_array_equal(same, value)


def test_padding_changes_nothing(graphs: Graphs, ids: NDArray[np.int64]) -> None:
    """Each row ends in the states of its own tokens, bit for bit as the step leaves them, whatever stands behind."""
    old = graphs.run("prefill", ids[:, ::-1].copy(), graphs.start())[1:]
    results = []
    for other in (0, 1):
        filled = np.where(padding(), ids, (ids + other) % VOCAB)
        results.append(graphs.run("masked prefill", filled, old, padding()))
    states = old
    for time in range(TIME):
        logits, *after = graphs.run("step", ids[:, time : time + 1], states)
        heard = padding()[:, time] == 1
        np.testing.assert_allclose(results[0][0][heard, time], logits[heard, 0], atol=1e-5)
        states = [
            np.where(heard.reshape(-1, *[1] * (new.ndim - 1)), new, before)
            for new, before in zip(after, states, strict=True)
        ]
    for one, two, state in zip(results[0][1:], results[1][1:], states, strict=True):
        np.testing.assert_array_equal(one, two)
        np.testing.assert_allclose(one, state, atol=1e-5)


def test_weights_of_both_branches_are_there_once(graphs: Graphs) -> None:
    stored = {kind: weights(graphs.models[kind]) for kind in graphs.models}
    assert sorted(stored["masked prefill"]) == sorted({*stored["prefill"], *stored["step"]})
    assert sorted(stored["masked step"]) == sorted(stored["step"])


def weights(model: bytes) -> list[tuple[tuple[int, ...], bytes]]:
    arrays = map(onnx.numpy_helper.to_array, onnx.load_from_string(model).graph.initializer)
    return [(array.shape, array.tobytes()) for array in arrays]
