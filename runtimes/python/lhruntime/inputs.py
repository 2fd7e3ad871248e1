"""What callers pass in, checked and brought to the graphs' dtype and axes."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lhruntime.errors import ArgumentError
from lhruntime.model import LoadedModel

__all__ = ["as_ids", "as_sequence", "as_single", "check_count"]

Array = np.ndarray[Any, np.dtype[Any]]


def as_sequence(values: ArrayLike, model: LoadedModel, batch: int) -> Array:
    """A prompt as [batch, seq, *tail]; at batch 1 the batch axis may be left out.

    Raises ArgumentError for text, an empty prompt, a wrong batch, number of axes, kind or token id.
    """
    array = _numbers(values)
    if batch == 1 and array.ndim == 1 + len(model.input_tail):
        array = array[None]
    axes = ["batch", "seq", *model.input_tail]
    if array.ndim > 1 and 0 in array.shape[:2]:
        raise ArgumentError("the prompt is empty: give at least one position")
    _check_axes(array, axes, batch)
    return np.ascontiguousarray(_checked(array, model))


def as_single(values: ArrayLike, model: LoadedModel, batch: int) -> Array:
    """One position as [batch, *tail]. Raises ArgumentError as as_sequence does."""
    array = _numbers(values)
    _check_axes(array, ["batch", *model.input_tail], batch)
    return _checked(array, model)


def check_count(name: str, value: int, least: int = 1) -> int:
    """A whole number no smaller than `least`, or ArgumentError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ArgumentError(f"{name} is {value!r}, expected a whole number of at least {least}")
    return int(value)


def as_ids(name: str, values: Collection[int], vocab_size: int) -> Array:
    """Token ids in any order, int64 [count]. Raises ArgumentError for what is none below vocab_size."""
    if len(values) == 0:
        return np.empty(0, np.int64)
    ids = np.asarray(list(values))
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= vocab_size:
        raise ArgumentError(f"{name} is {values!r}, expected ids below {vocab_size}")
    return ids


def _numbers(values: ArrayLike) -> Array:
    if isinstance(values, str | bytes):
        raise ArgumentError("text is not a prompt: encode it with session.tokenizer.encode first")
    try:
        return np.asarray(values)
    except ValueError as error:
        raise ArgumentError(f"not an array: {error}") from error


def _check_axes(array: Array, axes: list[Any], batch: int) -> None:
    names = "[" + ", ".join(str(axis) for axis in axes) + "]"
    if array.ndim != len(axes):
        raise ArgumentError(f"got an array of shape {list(array.shape)}, expected {names} with batch {batch}")
    if array.shape[0] != batch:
        raise ArgumentError(f"got a batch of {array.shape[0]}, this session has batch {batch}")
    if len(axes) > 1 and isinstance(axes[-1], int) and array.shape[-1] != axes[-1]:
        raise ArgumentError(f"got {array.shape[-1]} channels, the model has {axes[-1]}")


def _checked(array: Array, model: LoadedModel) -> Array:
    vocab_size = model.manifest.vocab_size
    if vocab_size is None:
        if array.dtype.kind not in "fiu":
            raise ArgumentError(f"got features of dtype {array.dtype}, expected real numbers")
        return array.astype(np.float32, copy=False)
    if array.dtype.kind not in "iu":
        raise ArgumentError(f"got token ids of dtype {array.dtype}, expected integers")
    tokens = array.astype(np.int64, copy=False)
    unsigned = tokens.view(np.uint64)  # a negative id becomes a huge one, so that one comparison does
    if unsigned.max() >= vocab_size:
        at = np.unravel_index(int(unsigned.argmax()), tokens.shape)
        place = ", ".join(str(int(index)) for index in at)
        raise ArgumentError(f"token id {array[at]} at [{place}] is outside 0..{vocab_size - 1}")
    return tokens
