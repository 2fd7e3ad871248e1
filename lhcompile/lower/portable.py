"""The portable lowering: standard ONNX operators, opset 20, float32.

`Step` sees one token: no loops, no shapes read at run time. `Prefill` takes any number of tokens: parallel inside
chunks of Q, the state carried from chunk to chunk by a Scan of five elementwise operators.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxscript import opset20

from lhcompile.lower.tables import chunk_tables, columns

__all__ = ["OPSET", "Lowering", "Prefill", "Step"]

OPSET = 20
_END = 2**63 - 1
Value = Any  # a value of the graph being traced
op: Any = opset20


class Lowering:
    """Translations of the lhc operators; `weights` gives the value of a weight by the name it has in the graph."""

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights

    def table(self) -> dict[Any, Callable[..., Any]]:
        """Operator → translation, as the exporter takes it."""
        lhc = torch.ops.lhc
        return {
            lhc.fir.default: _function(self.fir),
            lhc.long_conv.default: _function(self.long_conv),
            lhc.modal_ssm.default: _function(self.modal_ssm),
        }

    def weight(self, value: Value) -> torch.Tensor:
        return self._weights[value.name].detach()

    fir: Callable[..., tuple[Value, Value]]
    long_conv: Callable[..., tuple[Value, Value]]
    modal_ssm: Callable[..., tuple[Value, Value]]


class Step(Lowering):
    """One token, [batch, channels, 1]."""

    def fir(self, u: Value, weight: Value, bias: Value, state: Value, groups: int) -> tuple[Value, Value]:
        window = op.Concat(state, u, axis=-1)
        taps = self.weight(weight)
        if taps.shape[1] == 1 and taps.shape[0] == groups:  # depthwise: cheaper as a product than as a Conv
            y = op.ReduceSum(op.Mul(window, _constant(taps[:, 0])), _ints(-1), keepdims=1)
            y = y if bias is None else op.Add(y, _constant(self.weight(bias)[:, None]))
        else:
            y = op.Conv(window, _constant(taps), *([] if bias is None else [bias]), group=groups)
        return y, op.Slice(window, _ints(1), _ints(_END), _ints(-1))

    def long_conv(self, u: Value, taps: Value, state: Value, inner: int) -> tuple[Value, Value]:
        weight = self.weight(taps).flip(-1)
        window = op.Concat(state, u, axis=-1)
        lead = _lead(u, weight.shape[0], inner)
        grouped = _split_channels(window, lead, weight.shape[-1:])
        if inner > 1:
            weight = weight[:, None]
        y = op.ReduceSum(op.Mul(grouped, _constant(weight)), _ints(-1), keepdims=1)
        return _join_channels(y, lead, u, [1]), op.Slice(window, _ints(1), _ints(_END), _ints(-1))

    def modal_ssm(
        self, u: Value, transition: Value, readout: Value, direct: Value, state: Value, inner: int
    ) -> tuple[Value, Value]:
        """s' = column₀ s₀ + column₁ s₁ + u;  y = Σ c s' + D u"""
        first, second = columns(self.weight(transition))
        filters, _, slots = first.shape
        lead = _lead(u, filters, inner)
        shared = [filters, 1] if inner > 1 else [filters]
        old = _split_channels(state, lead, [2, slots])
        new = op.Unsqueeze(_split_channels(u, lead, [1]), _ints(-1))
        s0, s1 = op.Split(old, axis=-2, num_outputs=2)
        s = op.Add(
            op.Mul(s0, _constant(first.reshape(*shared, 2, slots))),
            op.Mul(s1, _constant(second.reshape(*shared, 2, slots))),
        )
        s = op.Add(s, new)
        c, d = self.weight(readout).reshape(*shared, 2, slots), self.weight(direct).reshape(*shared, 1, 1)
        y = op.ReduceSum(op.Mul(s, _constant(c)), _ints(-2, -1), keepdims=1)
        y = op.Squeeze(op.Add(y, op.Mul(new, _constant(d))), _ints(-1))
        return _join_channels(y, lead, u, [1]), _join_channels(s, lead, u, [2, slots])


class Prefill(Lowering):
    """Any number of tokens, [batch, channels, time]."""

    chunk = 32

    def fir(self, u: Value, weight: Value, bias: Value, state: Value, groups: int) -> tuple[Value, Value]:
        window = op.Concat(state, u, axis=-1)
        past = int(state.shape[-1])
        y = op.Conv(window, weight, *([] if bias is None else [bias]), group=groups)
        return y, op.Slice(window, _ints(-past), _ints(_END), _ints(-1))

    def long_conv(self, u: Value, taps: Value, state: Value, inner: int) -> tuple[Value, Value]:
        """A Conv over the ring buffer and the new tokens, one group per filter."""
        weight = self.weight(taps).flip(-1)
        filters, length = weight.shape
        window = op.Concat(state, u, axis=-1)
        successor = op.Slice(window, _ints(1 - length), _ints(_END), _ints(-1))
        outer = int(u.shape[1]) // (filters * inner)
        kernel = _constant(weight[:, None])
        if outer * inner == 1:
            return op.Conv(window, kernel, group=filters), successor
        grouped = op.Reshape(window, _ints(0, outer, filters, inner, -1))
        grouped = op.Transpose(grouped, perm=[0, 1, 3, 2, 4])  # [B, outer, inner, F, time]
        time = op.Shape(grouped, start=4, end=5)
        rows = op.Reshape(grouped, op.Concat(_ints(-1, filters), time, axis=0))
        y = op.Conv(rows, kernel, group=filters)
        y = op.Reshape(y, op.Concat(_ints(-1, outer, inner, filters), op.Shape(u, start=2, end=3), axis=0))
        y = op.Transpose(y, perm=[0, 1, 3, 2, 4])
        return op.Reshape(y, op.Shape(u)), successor

    def modal_ssm(
        self, u: Value, transition: Value, readout: Value, direct: Value, state: Value, inner: int
    ) -> tuple[Value, Value]:
        """Chunks of Q tokens: Toeplitz product inside, state between; the first chunk is filled up in front.

        With k real tokens in the first chunk, s the state before a chunk and E what its tokens leave behind:
        s₁ = A^k s₀ + E₀,  s_{c+1} = A^Q s_c + E_c,  y = Toeplitz u + c A^{i+1} s_c.
        """
        tables = chunk_tables(self.weight(transition), self.weight(readout), self.weight(direct), self.chunk)
        chunk, (filters, slots) = self.chunk, (tables.powers.shape[1], tables.powers.shape[-1])
        lead = _lead(u, filters, inner)
        shared = [filters, 1] if inner > 1 else [filters]
        rank = len(lead)  # axes before [chunks, Q]

        time = op.Shape(u, start=2, end=3)
        filling = op.Mod(op.Neg(time), _ints(chunk))
        first = op.Sub(_ints(chunk), filling)  # k
        padded = op.Pad(u, op.Concat(_ints(0, 0), filling, _ints(0, 0, 0), axis=0))
        blocks = op.Reshape(padded, _ints(0, *lead[1:], -1, chunk))
        toeplitz = op.Gather(_constant(tables.taps), _constant(tables.lags), axis=1)
        maps = op.Concat(toeplitz, _constant(tables.inject), axis=-1)
        both = op.MatMul(blocks, op.Reshape(maps, _ints(*shared, chunk, chunk + 2 * slots)))
        inside = op.Slice(both, _ints(0), _ints(chunk), _ints(-1))
        left = op.Slice(both, _ints(chunk), _ints(_END), _ints(-1))

        to_front = [rank, *range(rank), rank + 1]
        left = op.Transpose(left, perm=to_front)  # [chunks, lead…, 2N]
        before = _split_channels(state, lead, [2, slots])
        power = op.Squeeze(op.Gather(_constant(tables.powers), first, axis=0), _ints(0))  # A^k
        power = op.Reshape(power, _ints(*shared, 2, 2, slots))
        advanced = _advance_by(power, before)
        leap = tables.powers[chunk].reshape(*shared, 2, 2, slots)
        ends = _carry(left, advanced, before, leap, lead, slots)

        flat = op.Reshape(op.Unsqueeze(before, _ints(0)), _ints(1, 0, *lead[1:], 2 * slots))
        starts = op.Concat(flat, op.Slice(ends, _ints(0), _ints(-1), _ints(0)), axis=0)
        starts = op.Transpose(starts, perm=[*range(1, rank + 1), 0, rank + 1])
        heard = op.MatMul(starts, _constant(tables.observe.reshape(*shared, 2 * slots, chunk)))
        heard = op.Reshape(heard, _ints(0, *lead[1:], -1))
        heard = op.Concat(
            op.Slice(heard, _ints(0), first, _ints(-1)), op.Slice(heard, _ints(chunk), _ints(_END), _ints(-1)), axis=-1
        )
        inside = op.Slice(op.Reshape(inside, _ints(0, *lead[1:], -1)), filling, _ints(_END), _ints(-1))
        y = op.Reshape(op.Add(inside, heard), op.Shape(u))
        last = op.Squeeze(op.Slice(ends, _ints(-1), _ints(_END), _ints(0)), _ints(0))
        channels = int(u.shape[1])
        return y, op.Reshape(last, _ints(0, channels, 2, slots))


def _advance_by(power: Value, state: Value) -> Value:
    """A^k s for a power known at run time; power [F…, 2, 2, N], state [lead…, 2, N] → [lead…, 2, N]"""
    s = op.Unsqueeze(state, _ints(-3))  # [lead…, 1, 2, N]: summed over columns
    return op.ReduceSum(op.Mul(power, s), _ints(-2), keepdims=0)


def _carry(
    left: Value, advanced: Value, before: Value, leap: NDArray[np.float32], lead: list[int], slots: int
) -> Value:
    """States at every chunk's end, [chunks, lead…, 2N], by a Scan over chunks.

    The first chunk is shorter than the others, so A^k s₀ joins what it leaves and the scan starts from zero.
    """
    head = op.Slice(left, _ints(0), _ints(1), _ints(0))
    advanced = op.Reshape(op.Unsqueeze(advanced, _ints(0)), _ints(1, 0, *lead[1:], 2 * slots))
    left = op.Concat(op.Add(head, advanced), op.Slice(left, _ints(1), _ints(_END), _ints(0)), axis=0)
    zero = op.Reshape(op.Sub(before, before), _ints(0, *lead[1:], 2 * slots))
    scan = op.Scan(zero, left, body=_scan_body(leap, lead, slots), num_scan_inputs=1).producer()
    scan.resize_outputs(2)  # the final state, and the states of all chunks
    return scan.outputs[1]


def _scan_body(leap: NDArray[np.float32], lead: list[int], slots: int) -> ir.Graph:
    """(s, E) → (s', s') with s' = A^Q s + E on [lead…, 2N]; A^Q s = own · s + other · swapped(s)."""
    halves = leap[..., 0, 0, :], leap[..., 0, 1, :], leap[..., 1, 0, :], leap[..., 1, 1, :]
    own = np.concatenate([halves[0], halves[3]], -1)
    other = np.concatenate([halves[1], halves[2]], -1)
    shape = ir.Shape(["batch", *lead[1:], 2 * slots])
    float32 = ir.TensorType(ir.DataType.FLOAT)
    s = ir.Value(name="state", shape=shape, type=float32)
    e = ir.Value(name="left", shape=shape, type=float32)

    def constant(array: NDArray[Any], name: str) -> ir.Node:
        return ir.node("Constant", [], attributes={"value": ir.tensor(np.ascontiguousarray(array), name=name)})

    own_node, other_node = constant(own, "own"), constant(other, "other")
    split = ir.node("Split", [s], attributes={"axis": -1, "num_outputs": 2}, num_outputs=2)
    swapped = ir.node("Concat", [split.outputs[1], split.outputs[0]], attributes={"axis": -1})
    mine = ir.node("Mul", [s, own_node.outputs[0]])
    cross = ir.node("Mul", [swapped.outputs[0], other_node.outputs[0]])
    total = ir.node("Add", [mine.outputs[0], cross.outputs[0]])
    new = ir.node("Add", [total.outputs[0], e])
    copied = ir.node("Identity", [new.outputs[0]])
    for node, name in ((new, "next"), (copied, "end")):
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, shape, float32
    nodes = [own_node, other_node, split, swapped, mine, cross, total, new, copied]
    return ir.Graph(
        [s, e], [new.outputs[0], copied.outputs[0]], nodes=nodes, opset_imports={"": OPSET}, name="carry"
    )


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function of a bound method: the exporter writes attributes on what it is given."""

    @functools.wraps(method)
    def translate(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return translate


# ---- small pieces --------------------------------------------------------------------------------------------------


def _constant(value: torch.Tensor | NDArray[Any]) -> Value:
    array = value.numpy() if isinstance(value, torch.Tensor) else value
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return op.Constant(value=ir.tensor(np.ascontiguousarray(array)))


def _ints(*values: int) -> Value:
    return op.Constant(value_ints=list(values))


def _lead(u: Value, filters: int, inner: int) -> list[int]:
    """The channel axis as [batch, outer, filters, inner] without axes of length one; entry 0 stands for batch."""
    outer = int(u.shape[1]) // (filters * inner)
    return [0, *([outer] if outer > 1 else []), filters, *([inner] if inner > 1 else [])]


def _split_channels(x: Value, lead: list[int], rest: Any) -> Value:
    """[batch, channels, rest…] → [lead…, rest…]"""
    return x if len(lead) == 2 else op.Reshape(x, _ints(*lead, *rest))


def _join_channels(x: Value, lead: list[int], u: Value, rest: list[int]) -> Value:
    """The inverse of `_split_channels`."""
    return x if len(lead) == 2 else op.Reshape(x, _ints(0, math.prod(lead[1:]), *rest))
