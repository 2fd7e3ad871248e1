"""The portable lowering: standard ONNX operators, opset 20, float32.

`Step` sees one token: no loops, and no shape is read at run time but the batch, where states are packed. `Prefill`
takes any number of tokens: parallel inside chunks of Q, the state carried from chunk to chunk by a Scan of five
elementwise operators. States and signals have their channels innermost, as docs/decisions/002 measured.
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

from lhcompile.lower import attention
from lhcompile.lower.tables import chunk_tables, packing
from lhcompile.ssm import RealModal, partners

__all__ = ["BATCH", "OPSET", "Lowering", "Prefill", "Step"]

OPSET = 20
BATCH: int | None = None
_END = 2**63 - 1
Value = Any  # a value of the graph being traced
op: Any = opset20


class Lowering:
    """Translations of the lhc operators; `weights` gives the value of a weight by the name it has in the graph."""

    gathers = False  # whether packed states are taken apart with Gather alone, for targets that scatter nothing

    def __init__(self, weights: Mapping[str, torch.Tensor]) -> None:
        self._weights = weights

    def table(self) -> dict[Any, Callable[..., Any]]:
        """Operator → translation, as the exporter takes it."""
        lhc = torch.ops.lhc
        return {
            lhc.fir.default: _function(self.fir),
            lhc.long_conv.default: _function(self.long_conv),
            lhc.modal_ssm.default: _function(self.modal_ssm),
            lhc.position.default: _function(self.position),
            lhc.attention.default: _function(self.attention),
        }

    def weight(self, value: Value) -> torch.Tensor:
        return self._weights[value.name].detach()

    def system(self, *tables: Value) -> RealModal:
        """own, other, readout, direct"""
        return RealModal(*(self.weight(table) for table in tables))

    fir: Callable[..., tuple[Value, Value]]
    long_conv: Callable[..., tuple[Value, Value]]
    modal_ssm: Callable[..., tuple[Value, Value]]
    position: Callable[..., tuple[Value, Value]]
    attention: Callable[..., tuple[Value, Value, Value]]


class Step(Lowering):
    """One token, [batch, 1, channels]: elementwise operators on contiguous channels."""

    position = staticmethod(attention.position_one)
    attention = staticmethod(attention.attend_one)

    def fir(self, u: Value, weight: Value, bias: Value, state: Value, groups: int) -> tuple[Value, Value]:
        window = op.Concat(state, u, axis=1)
        taps = self.weight(weight)
        out, per_group, count = taps.shape
        if per_group == 1 and out == groups:
            y = op.ReduceSum(op.Mul(window, _constant(taps[:, 0].T)), _ints(1), keepdims=1)
        elif groups == 1:
            flat = op.Reshape(window, _ints(0, 1, count * per_group))
            y = op.MatMul(flat, _constant(taps.permute(2, 1, 0).reshape(-1, out)))
        else:
            y = op.Conv(op.Transpose(window, perm=[0, 2, 1]), _constant(taps), group=groups)
            y = op.Reshape(y, _ints(0, 1, out))
        y = y if bias is None else op.Add(y, _constant(self.weight(bias)))
        return y, op.Slice(window, _ints(1), _ints(_END), _ints(1))

    def long_conv(self, u: Value, taps: Value, state: Value, inner: int) -> tuple[Value, Value]:
        weight = self.weight(taps)
        lead = _lead(u, weight.shape[0], inner)
        window = op.Concat(state, u, axis=1)
        heard = op.Mul(_grouped(window, lead), _constant(_aligned(weight.flip(-1).T, lead, inner)))
        y = op.ReduceSum(heard, _ints(1), keepdims=1)
        return _joined(y, lead), op.Slice(window, _ints(1), _ints(_END), _ints(1))

    def modal_ssm(
        self,
        u: Value,
        own: Value,
        other: Value,
        readout: Value,
        direct: Value,
        kept: Value | None,
        state: Value,
        inner: int,
    ) -> tuple[Value, Value]:
        """s' = own ∘ s + other ∘ swap(s) + u;  y = Σ readout ∘ s' + D u, without the swap where no poles are complex"""
        system = self.system(own, other, readout, direct)
        if kept is not None:
            return self._packed(u, system, self.weight(kept), state, inner)
        order, filters = system.own.shape
        lead = _lead(u, filters, inner)
        p, q, c, d = (_constant(_aligned(x, lead, inner)) for x in vars(system).values())
        old, new = _grouped(state, lead), _grouped(u, lead)
        s = op.Mul(old, p)
        if system.other.any():
            s = op.Add(s, op.Mul(op.Gather(old, _ints(*partners(order)), axis=1), q))
        s = op.Add(s, new)
        y = op.Add(op.ReduceSum(op.Mul(s, c), _ints(1), keepdims=1), op.Mul(new, d))
        return _joined(y, lead), _joined(s, lead)

    def _packed(self, u: Value, system: RealModal, kept: torch.Tensor, state: Value, inner: int) -> tuple[Value, Value]:
        """The same with tables [states]: what a state hears is gathered, what it says is added up by filter."""
        packed = _Packed(u, kept, system, inner, self.gathers)
        p, q = (_constant(_aligned(x.flatten()[kept], packed.lead, inner)) for x in (system.own, system.other))
        old, new = packed.grouped(state), _grouped(u, packed.lead)
        s = op.Mul(old, p)
        if system.other.any():
            s = op.Add(s, op.Mul(packed.take(old, packed.index.partners), q))
        s = op.Add(s, packed.take(new, packed.index.sources))
        direct = op.Mul(new, _constant(_aligned(system.direct, packed.lead, inner)))
        return _joined(packed.read(s, system.readout, direct), packed.lead), packed.joined(s)


class Prefill(Lowering):
    """Any number of tokens, [batch, time, channels]."""

    position = staticmethod(attention.position)
    attention = staticmethod(attention.attend)

    chunk = 32
    short = 8  # taps up to which a depthwise convolution is a sum of shifted products

    def fir(self, u: Value, weight: Value, bias: Value, state: Value, groups: int) -> tuple[Value, Value]:
        taps = self.weight(weight)
        out, per_group, count = taps.shape
        window = op.Concat(state, u, axis=1)
        if per_group == 1 and out == groups and count <= self.short:
            y = None
            for lag in range(count):  # oldest first
                until = lag - count + 1
                part = op.Slice(window, _ints(lag), _ints(until if until else _END), _ints(1))
                part = op.Mul(part, _constant(taps[:, 0, lag]))
                y = part if y is None else op.Add(y, part)
        else:
            y = op.Conv(op.Transpose(window, perm=[0, 2, 1]), _constant(taps), group=groups)
            y = op.Transpose(y, perm=[0, 2, 1])
        y = y if bias is None else op.Add(y, _constant(self.weight(bias)))
        return y, op.Slice(window, _ints(1 - count), _ints(_END), _ints(1))

    def long_conv(self, u: Value, taps: Value, state: Value, inner: int) -> tuple[Value, Value]:
        """A Conv over the ring buffer and the new tokens, one group per filter."""
        weight = self.weight(taps).flip(-1)
        filters, length = weight.shape
        window = op.Concat(state, u, axis=1)
        successor = op.Slice(window, _ints(1 - length), _ints(_END), _ints(1))
        outer = int(u.shape[2]) // (filters * inner)
        grouped = op.Reshape(window, _ints(0, -1, outer, filters, inner))
        grouped = op.Transpose(grouped, perm=[0, 2, 4, 3, 1])  # [B, outer, inner, F, time]
        time = op.Shape(grouped, start=4, end=5)
        rows = op.Reshape(grouped, op.Concat(_ints(-1, filters), time, axis=0))
        y = op.Conv(rows, _constant(weight[:, None]), group=filters)
        y = op.Reshape(y, op.Concat(_ints(-1, outer, inner, filters), op.Shape(u, start=1, end=2), axis=0))
        y = op.Transpose(y, perm=[0, 4, 1, 3, 2])
        return op.Reshape(y, _ints(0, 0, outer * filters * inner)), successor

    def modal_ssm(
        self,
        u: Value,
        own: Value,
        other: Value,
        readout: Value,
        direct: Value,
        kept: Value | None,
        state: Value,
        inner: int,
    ) -> tuple[Value, Value]:
        """Chunks of Q tokens: Toeplitz product inside, state between; the first chunk is filled up in front.

        With k real tokens in the first chunk, s the state before a chunk and E what its tokens leave behind:
        s₁ = A^k s₀ + E₀,  s_{c+1} = A^Q s_c + E_c,  y = Toeplitz u + c A^{i+1} s_c.
        """
        system = self.system(own, other, readout, direct)
        tables, chunk, (order, filters) = chunk_tables(system, self.chunk), self.chunk, system.own.shape
        lead = _lead(u, filters, inner)
        packed = None if kept is None else _Packed(u, self.weight(kept), system, inner, self.gathers)
        shared = [filters, 1] if inner > 1 else [filters]
        rank = 1 + len(lead)  # batch and the channel axes: [lead…] below

        filling = op.Mod(op.Neg(op.Shape(u, start=1, end=2)), _ints(chunk))
        first = op.Sub(_ints(chunk), filling)  # k
        padded = op.Pad(u, op.Concat(_ints(0), filling, _ints(0, 0, 0, 0), axis=0))
        blocks = op.Reshape(padded, _ints(0, -1, chunk, *lead))
        blocks = op.Transpose(blocks, perm=[0, *range(3, rank + 2), 1, 2])  # [lead…, chunks, Q]
        toeplitz = op.Gather(_constant(tables.taps), _constant(tables.lags), axis=1)
        maps = op.Concat(toeplitz, _constant(tables.inject), axis=-1)
        both = op.MatMul(blocks, op.Reshape(maps, _ints(*shared, chunk, chunk + order)))
        inside = op.Slice(both, _ints(0), _ints(chunk), _ints(-1))
        left = op.Slice(both, _ints(chunk), _ints(_END), _ints(-1))
        left = op.Transpose(left, perm=[rank, *range(rank), rank + 1])  # [chunks, lead…, d]

        if packed is None:
            before = op.Transpose(_grouped(state, lead), perm=[0, *range(2, rank + 1), 1])  # [lead…, d]
        else:
            before = packed.unpack(state)
        power = op.Reshape(op.Gather(_constant(tables.powers), first, axis=0), _ints(2, *shared, order))  # A^k
        own_k, other_k = op.Split(power, axis=0, num_outputs=2)
        joining = _advance(before, own_k, other_k, order)
        ends = _carry(left, joining, tables.powers[chunk].reshape(2, *shared, order), lead, order)

        starts = op.Concat(op.Unsqueeze(before, _ints(0)), op.Slice(ends, _ints(0), _ints(-1), _ints(0)), axis=0)
        starts = op.Transpose(starts, perm=[*range(1, rank + 1), 0, rank + 1])
        heard = op.MatMul(starts, _constant(tables.observe.reshape(*shared, order, chunk)))
        heard = op.Reshape(heard, _ints(0, *lead, -1))
        heard = op.Concat(
            op.Slice(heard, _ints(0), first, _ints(-1)), op.Slice(heard, _ints(chunk), _ints(_END), _ints(-1)), axis=-1
        )
        inside = op.Slice(op.Reshape(inside, _ints(0, *lead, -1)), filling, _ints(_END), _ints(-1))
        y = op.Transpose(op.Add(inside, heard), perm=[0, rank, *range(1, rank)])
        last = op.Squeeze(op.Slice(ends, _ints(-1), _ints(_END), _ints(0)), _ints(0))
        if packed is not None:
            return _joined(y, lead), packed.pack(last)
        return _joined(y, lead), _joined(op.Transpose(last, perm=[0, rank, *range(1, rank)]), lead)


class _Packed:
    """States of filters that differ in order, [batch, 1, outer · states · inner], in the graph being traced.

    gathers: rows are taken apart with Gather alone, as they always are where a filter serves a block of channels
    """

    def __init__(self, u: Value, kept: torch.Tensor, system: RealModal, inner: int, gathers: bool) -> None:
        self.order, self.filters = system.own.shape
        self.index = packing(kept.numpy(), self.order, self.filters)
        self.lead = _lead(u, self.filters, inner)
        self.inner = [inner] if inner > 1 else []
        self.outer = self.lead[: len(self.lead) - 1 - len(self.inner)]
        self.axis = 2 + len(self.outer)  # of the filters, or of the states
        self.gathers = gathers or inner > 1
        self.fixed = u.shape[0] if isinstance(u.shape[0], int) else None
        self.zeros = None if self.gathers or self.fixed else self._zeros(_grouped(u, self.lead))

    def take(self, x: Value, index: NDArray[np.int32]) -> Value:
        """Entries of the axis of filters or states: [batch, 1, …, n, …] and index [m] → [batch, 1, …, m, …]

        On a CPU, Gather takes 8 ns an entry whatever its size, so it is for entries of many numbers. GatherElements
        takes 1 ns a number, but wants an index for every row of the batch.
        """
        if self.gathers:
            return op.Gather(x, _constant(index), axis=self.axis)
        return op.GatherElements(x, self._everywhere(index), axis=self.axis)

    def _zeros(self, u: Value) -> Value:
        """Integer zeros [batch, 1, (outer), 1] without reading a shape: of one number the largest is the first."""
        one = op.Slice(u, _ints(0, 0), _ints(1, 1), _ints(1, self.axis))
        return op.ArgMax(one, axis=self.axis, keepdims=1)

    def _everywhere(self, index: NDArray[np.int32]) -> Value:
        """[m] → [batch, 1, (outer), m]"""
        if self.fixed:
            return _constant(np.broadcast_to(index, (self.fixed, 1, *self.outer, len(index))))
        return op.Add(self.zeros, _constant(index.astype(np.int64)))

    def read(self, states: Value, readout: torch.Tensor, direct: Value) -> Value:
        """direct + Σ readout ∘ states over the states of each filter, [batch, 1, lead…]; readout: [order, filters]"""
        if self.gathers:  # readout is zero wherever `rows` holds no state
            table = readout.unsqueeze(-1) if self.inner else readout
            rows = op.Mul(self.rows(states), _constant(table))
            return op.Add(op.ReduceSum(rows, _ints(self.axis), keepdims=0), direct)
        said = op.Mul(states, _constant(readout.flatten()[self.index.kept]))
        return op.ScatterElements(direct, self._everywhere(self.index.sources), said, axis=self.axis, reduction="add")

    def grouped(self, state: Value) -> Value:
        """[batch, 1, outer · states · inner] → [batch, 1, (outer), states, (inner)]"""
        return _grouped(state, [*self.outer, len(self.index.kept), *self.inner])

    def joined(self, states: Value) -> Value:
        """The inverse of `grouped`."""
        return _joined(states, [*self.outer, len(self.index.kept), *self.inner])

    def rows(self, states: Value) -> Value:
        """[batch, 1, (outer), states, (inner)] → [batch, 1, (outer), order, filters, (inner)], anything in between"""
        entries = self.take(states, self.index.positions)
        return op.Reshape(entries, _ints(0, 1, *self.outer, self.order, self.filters, *self.inner))

    def unpack(self, state: Value) -> Value:
        """[batch, 1, outer · states · inner] → [lead…, order]; tables are zero where anything stands."""
        rest = range(self.axis + 1, self.axis + 2 + len(self.inner))
        columns = op.Transpose(self.rows(self.grouped(state)), perm=[*range(self.axis), *rest, self.axis])
        return op.Reshape(columns, _ints(0, *self.lead, self.order))

    def pack(self, columns: Value) -> Value:
        """The inverse of `unpack`."""
        outer, rank = len(self.outer), 1 + len(self.lead)
        entries = op.Transpose(columns, perm=[*range(1 + outer), rank, *range(1 + outer, rank)])
        entries = op.Reshape(entries, _ints(0, 1, *self.outer, self.order * self.filters, *self.inner))
        return self.joined(self.take(entries, self.index.kept))


def _advance(state: Value, own: Value, other: Value, order: int) -> Value:
    """A s on [lead…, d] for A in the form (own, other), each [1, F…, d]"""
    swapped = op.Gather(state, _ints(*partners(order)), axis=-1)
    return op.Add(op.Mul(own, op.Unsqueeze(state, _ints(0))), op.Mul(other, op.Unsqueeze(swapped, _ints(0))))


def _carry(left: Value, joining: Value, leap: NDArray[np.float32], lead: list[int], order: int) -> Value:
    """States at every chunk's end, [chunks, lead…, d], by a Scan over chunks.

    left: what each chunk leaves; joining: A^k s₀, which joins what the first, shorter chunk leaves, so that the scan
    starts from zero; leap: A^Q as (own, other)
    """
    head = op.Add(op.Slice(left, _ints(0), _ints(1), _ints(0)), joining)
    left = op.Concat(head, op.Slice(left, _ints(1), _ints(_END), _ints(0)), axis=0)
    zero = op.Squeeze(op.Sub(joining, joining), _ints(0))
    scan = op.Scan(zero, left, body=_scan_body(leap, lead, order), num_scan_inputs=1).producer()
    scan.resize_outputs(2)  # the final state, and the states of all chunks
    return scan.outputs[1]


def _scan_body(leap: NDArray[np.float32], lead: list[int], order: int) -> ir.Graph:
    """(s, E) → (s', s') with s' = own ∘ s + other ∘ swap(s) + E on [lead…, d]"""
    shape = ir.Shape(["batch", *lead, order])
    float32 = ir.TensorType(ir.DataType.FLOAT)
    s = ir.Value(name="state", shape=shape, type=float32)
    e = ir.Value(name="left", shape=shape, type=float32)

    def constant(array: NDArray[Any], name: str) -> ir.Node:
        return ir.node("Constant", [], attributes={"value": ir.tensor(np.ascontiguousarray(array), name=name)})

    own, other = constant(leap[0], "own"), constant(leap[1], "other")
    halves = constant(np.array(partners(order)), "halves")
    swapped = ir.node("Gather", [s, halves.outputs[0]], attributes={"axis": -1})
    mine = ir.node("Mul", [s, own.outputs[0]])
    cross = ir.node("Mul", [swapped.outputs[0], other.outputs[0]])
    total = ir.node("Add", [mine.outputs[0], cross.outputs[0]])
    new = ir.node("Add", [total.outputs[0], e])
    copied = ir.node("Identity", [new.outputs[0]])
    for node, name in ((new, "next"), (copied, "end")):
        node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, shape, float32
    nodes = [own, other, halves, swapped, mine, cross, total, new, copied]
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
    """The channel axis as [outer, filters, inner] without axes of length one besides the filters."""
    outer = int(u.shape[2]) // (filters * inner)
    return [*([outer] if outer > 1 else []), filters, *([inner] if inner > 1 else [])]


def _grouped(x: Value, lead: list[int]) -> Value:
    """[batch, rows, channels] → [batch, rows, lead…]"""
    return x if len(lead) == 1 else op.Reshape(x, _ints(0, 0, *lead))


def _joined(x: Value, lead: list[int]) -> Value:
    """The inverse of `_grouped`."""
    return x if len(lead) == 1 else op.Reshape(x, _ints(0, 0, math.prod(lead)))


def _aligned(table: torch.Tensor, lead: list[int], inner: int) -> torch.Tensor:
    """[rows, filters] or [filters] → broadcast against [batch, rows, lead…]"""
    shape = [*table.shape[:-1], *([1] if len(lead) > 1 + (inner > 1) else []), table.shape[-1]]
    return table.reshape(*shape, *([1] if inner > 1 else []))
