"""Attention and positions in standard ONNX operators.

Caches have a fixed capacity C, so no shape grows from call to call. Axes: B rows, T tokens, G groups of keys, R query
heads a group, D and E the widths of keys and values. Entry c of a row's cache is the position c; what lies behind the
row's own position is hidden, whatever stands there. Runtimes refuse positions past the capacity before they run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from lhcompile.lower.pieces import Value, constant, ints, op

__all__ = [
    "attend",
    "attend_chosen",
    "attend_one",
    "attend_one_chosen",
    "position",
    "position_narrow",
    "position_one",
    "position_one_narrow",
]


def position_one(signal: Value, start: Value) -> tuple[Value, Value]:
    """One token: its place is where the row stands. start: int64 [B, 1] → int64 [B, 1] both"""
    return op.Identity(start), op.Add(start, ints(1))


def position_one_narrow(signal: Value, start: Value) -> tuple[Value, Value]:
    """The same with the sum in 32 bits, for targets without arithmetic of 64."""
    narrow = op.Cast(start, to=ir.DataType.INT32)
    after = op.Add(narrow, constant(np.array([1], np.int32)))
    return op.Identity(start), op.Cast(after, to=ir.DataType.INT64)


def position(signal: Value, start: Value) -> tuple[Value, Value]:
    """Any number of tokens: int64 [B, T], int64 [B, 1]"""
    time = op.Shape(signal, start=1, end=2)
    return _places(signal, start), op.Add(start, time)


def position_narrow(signal: Value, start: Value) -> tuple[Value, Value]:
    """A fixed number of tokens, in 32 bits."""
    time = int(signal.shape[1])
    first = op.Cast(start, to=ir.DataType.INT32)
    places = op.Add(first, constant(np.arange(time, dtype=np.int32)))
    after = op.Add(first, constant(np.array([time], np.int32)))
    return op.Cast(places, to=ir.DataType.INT64), op.Cast(after, to=ir.DataType.INT64)


def attend_one(
    q: Value, k: Value, v: Value, keys: Value, values: Value, start: Value, scale: float
) -> tuple[Value, Value, Value]:
    """One token. Its key and value are scattered into their place."""
    slots = constant(np.arange(int(keys.shape[2])))
    keys, values = _put(keys, k, start), _put(values, v, start)
    return _heard(q, k, v, keys, values, op.Greater(slots, start), scale), keys, values


def attend_one_chosen(
    q: Value, k: Value, v: Value, keys: Value, values: Value, start: Value, scale: float
) -> tuple[Value, Value, Value]:
    """The same for targets that scatter nothing and compare 32 bits: every entry is chosen, the old or the new."""
    place = op.Cast(start, to=ir.DataType.INT32)
    slots = constant(np.arange(int(keys.shape[2]), dtype=np.int32))
    here = op.Unsqueeze(op.Equal(slots, place), ints(1, 3))  # [B, 1, C, 1]
    keys, values = (
        op.Where(here, op.Transpose(new, perm=[0, 2, 1, 3]), cache) for cache, new in ((keys, k), (values, v))
    )
    return _heard(q, k, v, keys, values, op.Greater(slots, place), scale), keys, values


def attend(
    q: Value, k: Value, v: Value, keys: Value, values: Value, start: Value, scale: float
) -> tuple[Value, Value, Value]:
    """Any number of tokens; every row may stand at a place of its own."""
    _, groups, capacity, width = _sizes(keys)
    slots = constant(np.arange(capacity))
    sources = _sources(q, start, slots, groups, capacity)
    keys, values = (
        op.GatherND(op.Concat(cache, op.Transpose(new, perm=[0, 2, 1, 3]), axis=2), sources, batch_dims=2)
        for cache, new in ((keys, k), (values, v))
    )
    later = op.Greater(slots, op.Unsqueeze(_places(q, start), ints(1, 2, 4)))  # [B, 1, 1, T, C]
    sizes = groups, capacity, width, int(v.shape[3])
    return _heard_by_all(q, keys, values, later, scale, sizes), keys, values


def attend_chosen(
    q: Value, k: Value, v: Value, keys: Value, values: Value, start: Value, scale: float
) -> tuple[Value, Value, Value]:
    """A fixed number of tokens, for targets that gather nothing by computed places and compare 32 bits: a new entry is
    the product of all tokens with a row of zeros and at most a one, which is exact."""
    (_, groups, capacity, width), time = _sizes(keys), int(q.shape[1])
    first = op.Cast(start, to=ir.DataType.INT32)
    slots, tokens = (constant(np.arange(size, dtype=np.int32)) for size in (capacity, time))
    token = op.Sub(slots, first)  # [B, C]: which of the tokens belongs into an entry
    chosen = op.Cast(op.Equal(op.Unsqueeze(token, ints(1, 3)), tokens), to=ir.DataType.FLOAT)  # [B, 1, C, T]
    fresh = op.Greater(op.ReduceSum(chosen, ints(3), keepdims=1), constant(np.array(0.5, np.float32)))
    keys, values = (
        op.Where(fresh, op.MatMul(chosen, op.Transpose(new, perm=[0, 2, 1, 3])), cache)
        for cache, new in ((keys, k), (values, v))
    )
    later = op.Greater(slots, op.Unsqueeze(op.Add(first, tokens), ints(1, 2, 4)))  # [B, 1, 1, T, C]
    sizes = groups, capacity, width, int(v.shape[3])
    return _heard_by_all(q, keys, values, later, scale, sizes), keys, values


def _heard_by_all(
    q: Value, keys: Value, values: Value, later: Value, scale: float, sizes: tuple[int, int, int, int]
) -> Value:
    """What the queries of all tokens hear of caches that hold their keys and values.

    later: bool [B, 1, 1, T, C]; sizes: G, C, D, E
    """
    groups, capacity, width, value_width = sizes
    heads = int(q.shape[2])
    shared = heads // groups
    asked = op.Reshape(_scaled(q, scale), ints(0, 0, groups, shared, width))
    asked = op.Reshape(op.Transpose(asked, perm=[0, 2, 3, 1, 4]), ints(0, groups, -1, width))  # [B, G, R · T, D]
    scores = op.MatMul(asked, op.Transpose(keys, perm=[0, 1, 3, 2]))
    scores = op.Reshape(scores, ints(0, groups, shared, -1, capacity))
    weights = op.Softmax(op.Where(later, _hidden(), scores), axis=-1)
    heard = op.MatMul(op.Reshape(weights, ints(0, groups, -1, capacity)), values)
    heard = op.Reshape(heard, ints(0, groups, shared, -1, value_width))
    y = op.Transpose(heard, perm=[0, 3, 1, 2, 4])
    return op.Reshape(y, ints(0, 0, heads, value_width))


def _heard(q: Value, k: Value, v: Value, keys: Value, values: Value, later: Value, scale: float) -> Value:
    """What one token's queries hear of caches that hold its k and v; later: bool [B, C], the entries behind it.

    No cache is repeated for heads; how the products are written was measured (docs/decisions/008).
    """
    groups, width, heads, value_width = (int(size) for size in (k.shape[2], k.shape[3], q.shape[2], v.shape[3]))
    shared = heads // groups
    asked = op.Reshape(_scaled(q, scale), ints(0, groups, shared, width))
    if shared == 1:
        scores = op.MatMul(asked, op.Transpose(keys, perm=[0, 1, 3, 2]))
    else:
        scores = op.MatMul(keys, op.Transpose(asked, perm=[0, 1, 3, 2]))
        scores = op.Transpose(scores, perm=[0, 1, 3, 2])
    weights = op.Softmax(op.Where(op.Unsqueeze(later, ints(1, 2)), _hidden(), scores), axis=-1)
    return op.Reshape(op.MatMul(weights, values), ints(0, 1, heads, value_width))


def _put(cache: Value, new: Value, start: Value) -> Value:
    """A cache [B, G, C, width] with the one entry new [B, 1, G, width] at each row's place."""
    _, groups, _, width = _sizes(cache)
    place = op.Add(constant(np.zeros((1, groups, 1, width), np.int64)), op.Unsqueeze(start, ints(1, 2)))
    return op.ScatterElements(cache, place, op.Reshape(new, ints(0, groups, 1, width)), axis=2)


def _places(signal: Value, start: Value) -> Value:
    """The place of every token, int64 [B, T]."""
    time = op.Squeeze(op.Shape(signal, start=1, end=2), ints(0))
    return op.Add(start, op.Range(constant(np.array(0)), time, constant(np.array(1))))


def _sources(signal: Value, start: Value, slots: Value, groups: int, capacity: int) -> Value:
    """Where each entry of the new cache stands in [old cache, new tokens], int64 [B, G, C, 1]."""
    token = op.Sub(slots, start)  # [B, C]: which of the tokens belongs into an entry
    fresh = op.And(op.GreaterOrEqual(token, ints(0)), op.Less(token, op.Shape(signal, start=1, end=2)))
    source = op.Where(fresh, op.Add(token, ints(capacity)), slots)
    batch = op.Shape(signal, start=0, end=1)
    return op.Expand(op.Unsqueeze(source, ints(1, 3)), op.Concat(batch, ints(groups, capacity, 1), axis=0))


def _sizes(cache: Value) -> tuple[Any, int, int, int]:
    batch, groups, capacity, width = cache.shape
    return batch, int(groups), int(capacity), int(width)


def _scaled(q: Value, scale: float) -> Value:
    return q if scale == 1.0 else op.Mul(q, constant(np.array(scale, np.float32)))


def _hidden() -> Value:
    return constant(np.array(-np.inf, np.float32))
