"""The states: whole = cuts = steps, rows are independent, reset and fork."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lhruntime import ArgumentError, Session
from toy_models import Toy, save, toy

# float32 accumulation over a few hundred positions of values of order 1 to 10
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 5e-5}

Array = np.ndarray[Any, np.dtype[Any]]


def tokens_of(batch: int, seq: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (batch, seq))


def assert_states(session: Session, expected: dict[str, Array]) -> None:
    found = session.states()
    assert list(found) == list(expected)
    for name, state in expected.items():
        np.testing.assert_allclose(found[name], state, err_msg=name, **TOLERANCE)


@pytest.fixture(scope="module")
def loaded(built: Path) -> Session:
    return Session.load(built, threads=1)


@pytest.fixture
def session(loaded: Session) -> Session:
    fresh = loaded.fork()
    fresh.reset()
    return fresh


@given(cuts=st.lists(st.integers(1, 17), min_size=1, max_size=6), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25)
def test_whole_cuts_and_steps_agree_with_the_reference(
    loaded: Session, model: Toy, cuts: list[int], seed: int
) -> None:
    tokens = tokens_of(1, sum(cuts), seed)
    expected, states = model.reference(tokens)
    whole, in_cuts, in_steps = (loaded.fork() for _ in range(3))
    edges = np.cumsum([0, *cuts])
    results = [
        whole.prefill(tokens),
        np.concatenate([in_cuts.prefill(tokens[:, a:b]) for a, b in pairwise(edges)], 1),
        np.stack([in_steps.step(tokens[:, t]) for t in range(tokens.shape[1])], 1),
    ]
    for used, logits in zip((whole, in_cuts, in_steps), results, strict=True):
        assert logits.shape == expected.shape
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, **TOLERANCE)
        assert_states(used, states)
        assert used.position == tokens.shape[1]


@pytest.mark.parametrize("chunk", [1, 2, 7, 30, 31, 1000])
@pytest.mark.parametrize("batch", [1, 3])
def test_chunks_change_nothing(built: Path, model: Toy, chunk: int, batch: int) -> None:
    session = Session.load(built, batch=batch, threads=1)
    tokens = tokens_of(batch, 31)
    expected, states = model.reference(tokens)
    np.testing.assert_allclose(session.prefill(tokens, chunk=chunk), expected, **TOLERANCE)
    assert_states(session, states)
    assert session.position == 31
    session.reset()
    last = session.prefill(tokens, last_only=True, chunk=chunk)
    assert last.shape == (batch, 256)
    np.testing.assert_allclose(last, expected[:, -1], **TOLERANCE)
    assert_states(session, states)


def test_rows_of_a_batch_equal_batch_one(built: Path, session: Session) -> None:
    together = Session.load(built, batch=3, threads=1)
    tokens = tokens_of(3, 20)
    logits = [together.prefill(tokens), together.step(tokens[:, 0])[:, None]]
    for row in range(3):
        session.reset()
        np.testing.assert_allclose(logits[0][row], session.prefill(tokens[row])[0], **TOLERANCE)
        np.testing.assert_allclose(logits[1][row, 0], session.step(tokens[row, :1])[0], **TOLERANCE)
        for name, state in session.states().items():
            np.testing.assert_allclose(together.states()[name][row], state[0], **TOLERANCE)


def test_long_run_of_steps_does_not_drift(session: Session, model: Toy) -> None:
    tokens = tokens_of(1, 1500)
    expected, states = model.reference(tokens)
    logits = np.stack([session.step(tokens[:, t]) for t in range(1500)], 1)
    np.testing.assert_allclose(logits, expected, **TOLERANCE)
    assert_states(session, states)


def test_reset_equals_fresh(loaded: Session, session: Session) -> None:
    tokens = tokens_of(1, 9)
    first = session.prefill(tokens)
    second = session.prefill(tokens)
    assert np.abs(first - second).max() > 1e-3
    session.reset()
    assert session.position == 0
    assert all((state == 0).all() for state in session.states().values())
    np.testing.assert_array_equal(session.prefill(tokens), first)


@pytest.mark.parametrize(
    "consume",
    [
        lambda session: session.step([1]),
        lambda session: session.prefill([1]),
        lambda session: session.prefill([1, 2]),
        lambda session: session.prefill([1], last_only=True),
        lambda session: session.prefill([1, 2, 3], chunk=2, last_only=True),
    ],
)
def test_results_are_the_callers_own(session: Session, consume: Callable[[Session], Array]) -> None:
    first = consume(session)
    kept, states = first.copy(), session.states()
    kept_states = {name: state.copy() for name, state in states.items()}
    session.step([2])
    session.step([3])
    np.testing.assert_array_equal(first, kept)
    for name, state in states.items():
        np.testing.assert_array_equal(state, kept_states[name])


def test_forks_diverge_independently(session: Session, model: Toy) -> None:
    tokens = tokens_of(1, 12)
    session.prefill(tokens)
    fork = session.fork()
    assert fork.position == 12
    for token in (5, 6, 7):
        fork.step([token])
    session.step([200])
    assert (session.position, fork.position) == (13, 15)
    assert_states(session, model.reference(np.append(tokens, 200)[None])[1])
    assert_states(fork, model.reference(np.append(tokens, [5, 6, 7])[None])[1])


def test_forks_run_in_parallel(session: Session, model: Toy) -> None:
    prompts = [tokens_of(1, 300, seed) for seed in range(4)]
    forks = [session.fork() for _ in prompts]

    def feed(fork: Session, tokens: Array) -> None:
        for token in tokens[0]:
            fork.step([token])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(feed, forks, prompts))
    for fork, tokens in zip(forks, prompts, strict=True):
        assert_states(fork, model.reference(tokens)[1])


def test_a_fork_shares_the_graphs(session: Session) -> None:
    assert session.fork()._model is session._model


@pytest.mark.parametrize("batch", [1, 2])
def test_feature_models(built_features: Path, feature_model: Toy, batch: int) -> None:
    session = Session.load(built_features, batch=batch, threads=1)
    values = np.random.default_rng(0).normal(size=(batch, 10, 3))
    expected, states = feature_model.reference(values)
    first = session.prefill(values[:, :6], chunk=4)
    middle = session.step(values[:, 6])[:, None]
    outputs = np.concatenate([first, middle, session.prefill(values[:, 7:])], 1)
    assert outputs.dtype == np.float32
    np.testing.assert_allclose(outputs, expected, **TOLERANCE)
    assert_states(session, states)
    with pytest.raises(ArgumentError, match="there are no tokens to generate"):
        session.generate(values, 4)
    with pytest.raises(ArgumentError, match="kind 'none': text is not supported, pass token ids"):
        session.tokenizer.encode("text")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 4)), "got 4 channels, the model has 3"),
        (np.zeros((2, 4, 3)), "got a batch of 2, this session has batch 1"),
        (np.zeros(3), r"got an array of shape \[3\], expected \[batch, seq, 3\] with batch 1"),
        (np.zeros((1, 0, 3)), "the prompt is empty"),
        (np.zeros((1, 2, 3), complex), "got features of dtype complex128, expected real numbers"),
    ],
)
def test_bad_features(built_features: Path, values: Array, message: str) -> None:
    session = Session.load(built_features, threads=1)
    with pytest.raises(ArgumentError, match=message):
        session.prefill(values)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "the prompt is empty: give at least one position"),
        (np.zeros((1, 0), int), "the prompt is empty: give at least one position"),
        ([[1], [2]], "got a batch of 2, this session has batch 1"),
        ([[[1]]], r"got an array of shape \[1, 1, 1\], expected \[batch, seq\] with batch 1"),
        ([1, 256], r"token id 256 at \[0, 1\] is outside 0..255"),
        ([3, 4, -1], r"token id -1 at \[0, 2\] is outside 0..255"),
        (np.array([2**63], np.uint64), r"token id 9223372036854775808 at \[0, 0\] is outside"),
        ([1.5, 2.0], "got token ids of dtype float64, expected integers"),
        ([[1, 2], [3]], "not an array"),
        ("text", "text is not a prompt: encode it with session.tokenizer.encode first"),
    ],
)
def test_bad_prompts_consume_nothing(session: Session, tokens: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        session.prefill(tokens)
    with pytest.raises(ArgumentError, match=message):
        session.generate(tokens, 3)
    assert session.position == 0


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, 2], "got a batch of 2, this session has batch 1"),
        (1, r"got an array of shape \[\], expected \[batch\] with batch 1"),
        ([[1]], r"got an array of shape \[1, 1\], expected \[batch\] with batch 1"),
        ([999], r"token id 999 at \[0\] is outside 0..255"),
        ([0.5], "got token ids of dtype float64"),
    ],
)
def test_bad_steps(session: Session, tokens: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        session.step(tokens)
    assert session.position == 0


def test_a_bare_sequence_needs_batch_one(built: Path) -> None:
    with pytest.raises(ArgumentError, match=r"expected \[batch, seq\] with batch 2"):
        Session.load(built, batch=2).prefill([1, 2])


@pytest.mark.parametrize("chunk", [0, -3, 1.5, True])
def test_bad_chunk(session: Session, chunk: Any) -> None:
    with pytest.raises(ArgumentError, match=f"chunk is {chunk}, expected a whole number of at least 1"):
        session.prefill([1], chunk=chunk)


def test_fixed_batch_graphs(tmp_path: Path) -> None:
    directory = save(toy(), tmp_path / "fixed", batch="2")
    assert Session.load(directory, batch=2).prefill(tokens_of(2, 5)).shape == (2, 5, 256)
