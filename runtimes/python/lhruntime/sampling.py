"""From logits to tokens: temperature, top-k and top-p in float64, one random generator per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lhruntime.errors import ArgumentError

__all__ = ["Sampler", "row_generators"]

Array = np.ndarray[Any, np.dtype[Any]]
_FIRST = 256
"""Tokens among which the nucleus is looked for first."""


def row_generators(seed: int | None, batch: int) -> list[np.random.Generator]:
    """One generator per row, seeded by [seed, row]: a row's draws do not depend on the other rows.

    seed None takes a fresh seed from the system. Raises ArgumentError for a negative seed.
    """
    if seed is None:
        entropy = np.random.SeedSequence().entropy
        assert isinstance(entropy, int)
        seed = entropy
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ArgumentError(f"seed is {seed!r}, expected a whole number of at least 0")
    return [np.random.default_rng([int(seed), row]) for row in range(batch)]


@dataclass(frozen=True)
class Sampler:
    """How a token is chosen.

    temperature: 0 takes the most likely token (the lowest id among equals); 1 is the model's own
    top_k:       keep the k most likely tokens; 0 keeps all
    top_p:       of those, keep the fewest most likely that reach probability top_p; at least one stays

    Raises ArgumentError for a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ArgumentError(f"temperature is {self.temperature}, expected a finite number of at least 0")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int | np.integer) or self.top_k < 0:
            raise ArgumentError(f"top_k is {self.top_k!r}, expected a whole number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ArgumentError(f"top_p is {self.top_p}, expected more than 0 and at most 1")

    def probabilities(self, logits: Array) -> Array:
        """logits [batch, vocab] → float64 [batch, vocab]; every row sums to 1.

        Raises ArgumentError if a row holds NaN or +inf, or nothing but −inf.
        """
        return np.stack([self._row(row) for row in np.asarray(logits, np.float64)])

    def sample(self, logits: Array, generators: Sequence[np.random.Generator]) -> Array:
        """logits [batch, vocab] → int64 [batch]; row r draws one number of float32 from generators[r]."""
        return self.choose(logits, [generator.random(dtype=np.float32) for generator in generators])

    def choose(self, logits: Array, uniform: ArrayLike) -> Array:
        """logits [batch, vocab], uniform [batch] in [0, 1) → int64 [batch]."""
        rows = zip(np.asarray(logits, np.float64), np.asarray(uniform, np.float64), strict=True)
        return np.array([self._choose(row, float(number)) for row, number in rows], np.int64)

    def _choose(self, logits: Array, uniform: float) -> int:
        if self.temperature == 0:
            _check(logits.max())
            return int(logits.argmax())
        return _draw(self._row(logits), uniform)

    def _row(self, logits: Array) -> Array:
        top = logits.max()
        _check(top)
        if self.temperature == 0:
            return np.eye(1, logits.size, int(logits.argmax()))[0]
        with np.errstate(over="ignore"):  # a gap divided by a tiny temperature is −inf, whose exp is 0
            weights = np.exp((logits - top) / self.temperature)
        if 0 < self.top_k < logits.size:
            weights = np.where(_largest(logits, self.top_k), weights, 0.0)
        weights /= weights.sum()
        if self.top_p < 1:
            weights = np.where(_nucleus(weights, logits, self.top_p), weights, 0.0)
            weights /= weights.sum()
        return weights


def _check(top: float) -> None:
    if not np.isfinite(top):
        raise ArgumentError(f"the largest logit is {top}: there is nothing to sample from")


def _largest(values: Array, count: int) -> Array:
    """bool [vocab], True at exactly `count` largest values; among equals the lowest ids."""
    threshold = np.partition(values, values.size - count)[values.size - count]
    keep = values > threshold
    keep[np.flatnonzero(values == threshold)[: count - int(keep.sum())]] = True
    return keep


def _nucleus(probabilities: Array, logits: Array, top_p: float) -> Array:
    """bool [vocab], True at the fewest most likely tokens that reach top_p; among equals the lowest ids.

    The order is that of the logits: different logits can round to one probability. Only as many of the largest are put
    into order as it takes.
    """
    possible = np.flatnonzero(probabilities)
    ranked, count = logits[possible], _FIRST
    while True:
        if count < ranked.size:
            best = possible[ranked >= np.partition(ranked, ranked.size - count)[ranked.size - count]]
        else:
            best = possible
        order = best[np.argsort(-logits[best], kind="stable")]
        reached = np.cumsum(probabilities[order])
        if reached[-1] >= top_p or best.size == possible.size:
            break
        count *= 16
    keep = np.zeros(probabilities.shape, bool)
    keep[order[: int(np.searchsorted(reached, top_p)) + 1]] = True
    return keep


def _draw(probabilities: Array, uniform: float) -> int:
    """The token whose stretch of the cumulative distribution holds uniform ∈ [0, 1)."""
    edges = np.cumsum(probabilities)
    index = int(np.searchsorted(edges, uniform * edges[-1], side="right"))
    return min(index, int(np.flatnonzero(probabilities)[-1]))
