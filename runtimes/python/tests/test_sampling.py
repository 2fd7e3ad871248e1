"""Sampling by its properties, and generation on a toy model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from lhruntime import ArgumentError, Sampler, Session
from lhruntime.sampling import row_generators

Array = np.ndarray[Any, np.dtype[Any]]

logit_arrays = arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.integers(1, 20)),
    elements=st.floats(-1e4, 1e4, width=32) | st.integers(-2, 2).map(float),
)
temperatures = st.sampled_from([1e-300, 1e-3, 0.7, 1.0, 3.0, 1e6])
top_ks = st.integers(0, 25)
top_ps = st.floats(1e-6, 1.0)


@settings(deadline=None)
@given(logits=logit_arrays, temperature=temperatures, top_k=top_ks, top_p=top_ps)
def test_probabilities(logits: Array, temperature: float, top_k: int, top_p: float) -> None:
    probabilities = Sampler(temperature, top_k, top_p).probabilities(logits)
    assert probabilities.dtype == np.float64
    assert (probabilities >= 0).all()
    np.testing.assert_allclose(probabilities.sum(1), 1.0)
    assert ((probabilities > 0).sum(1) >= 1).all()
    if top_k:
        assert ((probabilities > 0).sum(1) <= top_k).all()
    for row, weights in zip(logits, probabilities, strict=True):
        kept, cut = row[weights > 0], row[weights == 0]
        assert cut.size == 0 or kept.min() >= cut.max()


@settings(deadline=None)
@given(logits=logit_arrays)
def test_temperature_one_is_the_softmax(logits: Array) -> None:
    exact = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    softmax = exact / exact.sum(1, keepdims=True)
    np.testing.assert_allclose(Sampler().probabilities(logits), softmax, rtol=1e-12)


@settings(deadline=None)
@given(logits=logit_arrays, temperature=temperatures, top_p=top_ps, seed=st.integers(0, 2**70))
def test_top_k_one_and_temperature_zero_are_greedy(
    logits: Array, temperature: float, top_p: float, seed: int
) -> None:
    greedy = logits.argmax(1)
    for sampler in (Sampler(temperature, 1, top_p), Sampler(0.0, 0, top_p), Sampler(0.0)):
        chosen = sampler.sample(logits, row_generators(seed, len(logits)))
        np.testing.assert_array_equal(chosen, greedy)


@settings(deadline=None)
@given(logits=logit_arrays, top_p=top_ps)
def test_top_p_keeps_the_fewest_that_reach_it(logits: Array, top_p: float) -> None:
    everything = Sampler().probabilities(logits)
    kept = Sampler(top_p=top_p).probabilities(logits) > 0
    for probabilities, keep in zip(everything, kept, strict=True):
        mass, least = probabilities[keep].sum(), probabilities[keep].min()
        assert mass >= top_p - 1e-9
        assert keep.sum() == 1 or mass - least < top_p + 1e-9


@settings(deadline=None)
@given(
    logits=logit_arrays,
    seed=st.integers(0, 1000),
    temperature=temperatures,
    top_k=top_ks,
    top_p=top_ps,
)
def test_samples_stay_in_the_support_and_repeat(
    logits: Array, seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    sampler = Sampler(temperature, top_k, top_p)
    chosen = sampler.sample(logits, row_generators(seed, len(logits)))
    assert (np.take_along_axis(sampler.probabilities(logits), chosen[:, None], 1) > 0).all()
    np.testing.assert_array_equal(chosen, sampler.sample(logits, row_generators(seed, len(logits))))


@settings(deadline=None)
@given(logits=logit_arrays, seed=st.integers(0, 1000))
def test_a_row_does_not_depend_on_its_neighbours(logits: Array, seed: int) -> None:
    together = Sampler().sample(logits, row_generators(seed, len(logits)))
    for row, logit in enumerate(logits):
        alone = Sampler().sample(logit[None], [np.random.default_rng([seed, row])])
        assert together[row] == alone[0]


def test_frequencies_follow_the_probabilities() -> None:
    logits = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    generators = row_generators(0, 1)
    draws = np.array([Sampler().sample(logits, generators)[0] for _ in range(4000)])
    # four standard deviations of a frequency out of 4000 draws are at most 0.032
    np.testing.assert_allclose(np.bincount(draws) / 4000, [0.5, 0.3, 0.15, 0.05], atol=0.032)


def test_masked_logits_are_never_drawn() -> None:
    logits = np.array([[-np.inf, 0.0, -np.inf, 0.0]])
    generators = row_generators(1, 1)
    assert {int(Sampler().sample(logits, generators)[0]) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize("row", [[np.nan, 1.0], [np.inf, 1.0], [-np.inf, -np.inf]])
def test_logits_without_a_largest(row: list[float]) -> None:
    with pytest.raises(ArgumentError, match=r"the largest logit is .*: there is nothing to sample from"):
        Sampler().probabilities(np.array([row]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1, expected a whole number of at least 0"),
        ({"top_k": 1.5}, "top_k is 1.5, expected a whole number"),
        ({"top_p": 0.0}, "top_p is 0.0, expected more than 0 and at most 1"),
        ({"top_p": 1.1}, "top_p is 1.1, expected more than 0 and at most 1"),
        ({"seed": -1}, "seed is -1, expected a whole number of at least 0"),
        ({"stop_tokens": [256]}, r"stop_tokens is \[256\], expected ids below 256"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number of at least 1"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_bad_options_are_told_at_once(built: Path, options: dict[str, Any], message: str) -> None:
    session = Session.load(built)
    with pytest.raises(ArgumentError, match=message):
        session.generate([1], **({"max_new_tokens": 3} | options))


def run(session: Session, prompt: Any, count: int = 12, **options: Any) -> Array:
    session.reset()
    return np.stack(list(session.generate(prompt, count, **options)), 1)


def test_greedy_generation_is_argmax_step_by_step(built: Path) -> None:
    session, other = Session.load(built), Session.load(built)
    generated = run(session, [1, 2, 3], temperature=0)
    logits = other.prefill([1, 2, 3])[:, -1]
    for token in generated[0]:
        assert token == logits.argmax()
        logits = other.step([token])
    assert session.snapshot() == other.snapshot()


def test_a_yielded_token_has_been_consumed(built: Path) -> None:
    session = Session.load(built)
    for count, _ in enumerate(session.generate([1, 2], 50, seed=0), start=1):
        assert session.position == 2 + count
        if count == 3:
            break
    assert session.position == 5


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 10**9))
def test_seeds_reproduce_and_rows_are_independent(built: Path, seed: int) -> None:
    prompts = np.array([[1, 2, 3], [9, 8, 7]])
    pair = Session.load(built, batch=2)
    tokens = run(pair, prompts, seed=seed)
    np.testing.assert_array_equal(tokens, run(pair, prompts, seed=seed))
    np.testing.assert_array_equal(tokens[:1], run(Session.load(built), prompts[:1], seed=seed))
    swapped = run(pair, np.array([[1, 2, 3], [100, 101, 102]]), seed=seed)
    np.testing.assert_array_equal(tokens[0], swapped[0])


def test_without_a_seed_runs_differ(built: Path) -> None:
    session = Session.load(built)
    assert (run(session, [1], 30, temperature=5.0) != run(session, [1], 30, temperature=5.0)).any()


def test_stop_tokens(built: Path) -> None:
    session = Session.load(built, batch=2)
    prompts = np.array([[1, 2], [30, 40]])
    free = run(session, prompts, 20, seed=4)
    stop = int(free[0, 3])
    assert stop not in free[0, :3]
    stopped = run(session, prompts, 20, seed=4, stop_tokens={stop})
    np.testing.assert_array_equal(stopped[0], [*free[0, :4], *[stop] * (stopped.shape[1] - 4)])
    length = list(free[1]).index(stop) + 1 if stop in free[1] else 20
    np.testing.assert_array_equal(stopped[1, :length], free[1, :length])
    alone = run(Session.load(built), prompts[:1], 20, seed=4, stop_tokens=[stop])
    np.testing.assert_array_equal(alone, free[:1, :4])
