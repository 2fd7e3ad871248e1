"""The portable lowering: standard ONNX operators, opset 20, float32.

`Step` sees one token: no loops, and no shape is read at run time but the batch, where states are packed. `Prefill`
takes any number of tokens: parallel inside chunks of Q, the state carried from chunk to chunk by a Scan of five
elementwise operators. States and signals have their channels innermost, as docs/decisions/002 measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lhcompile.artifacts import Program
from lhcompile.lower import attention
from lhcompile.lower.chunks import Chunks, chunk_size
from lhcompile.lower.pieces import END, Value, aligned, constant, grouped, ints, joined, lead_of, op
from lhcompile.lower.tables import packing
from lhcompile.ssm import RealModal, partners

__all__ = ["BATCH", "OPSET", "Lowering", "Prefill", "Step"]

OPSET = 20
BATCH: int | None = None


class Lowering:
    """Translations of the lhc operators; `weights` gives the value of a weight by the name it has in the graph."""

    fused: frozenset[str] = frozenset()  # kinds of operators that groups of others become first (`lower.fuse`)
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
            y = op.ReduceSum(op.Mul(window, constant(taps[:, 0].T)), ints(1), keepdims=1)
        elif groups == 1:
            flat = op.Reshape(window, ints(0, 1, count * per_group))
            y = op.MatMul(flat, constant(taps.permute(2, 1, 0).reshape(-1, out)))
        else:
            y = op.Conv(op.Transpose(window, perm=[0, 2, 1]), constant(taps), group=groups)
            y = op.Reshape(y, ints(0, 1, out))
        y = y if bias is None else op.Add(y, constant(self.weight(bias)))
        return y, op.Slice(window, ints(1), ints(END), ints(1))

    def long_conv(self, u: Value, taps: Value, state: Value, inner: int) -> tuple[Value, Value]:
        weight = self.weight(taps)
        lead = lead_of(u, weight.shape[0], inner)
        window = op.Concat(state, u, axis=1)
        heard = op.Mul(grouped(window, lead), constant(aligned(weight.flip(-1).T, lead, inner)))
        y = op.ReduceSum(heard, ints(1), keepdims=1)
        return joined(y, lead), op.Slice(window, ints(1), ints(END), ints(1))

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
        lead = lead_of(u, filters, inner)
        p, q, c, d = (constant(aligned(x, lead, inner)) for x in vars(system).values())
        old, new = grouped(state, lead), grouped(u, lead)
        s = op.Mul(old, p)
        if system.other.any():
            s = op.Add(s, op.Mul(op.Gather(old, ints(*partners(order)), axis=1), q))
        s = op.Add(s, new)
        y = op.Add(op.ReduceSum(op.Mul(s, c), ints(1), keepdims=1), op.Mul(new, d))
        return joined(y, lead), joined(s, lead)

    def _packed(self, u: Value, system: RealModal, kept: torch.Tensor, state: Value, inner: int) -> tuple[Value, Value]:
        """The same with tables [states]: what a state hears is gathered, what it says is added up by filter."""
        packed = _Packed(u, kept, system, inner, self.gathers)
        p, q = (constant(aligned(x.flatten()[kept], packed.lead, inner)) for x in (system.own, system.other))
        old, new = packed.grouped(state), grouped(u, packed.lead)
        s = op.Mul(old, p)
        if system.other.any():
            s = op.Add(s, op.Mul(packed.take(old, packed.index.partners), q))
        s = op.Add(s, packed.take(new, packed.index.sources))
        direct = op.Mul(new, constant(aligned(system.direct, packed.lead, inner)))
        return joined(packed.read(s, system.readout, direct), packed.lead), packed.joined(s)


class Prefill(Lowering):
    """Any number of tokens, [batch, time, channels]."""

    position = staticmethod(attention.position)
    attention = staticmethod(attention.attend)

    time: int | None = None  # tokens of a call, where they are fixed
    chunk: int | None = None  # tokens that are taken together; None: what was measured best (docs/decisions/019)
    short = 8  # taps up to which a depthwise convolution is a sum of shifted products

    @classmethod
    def within(cls, program: Program) -> type[Prefill]:
        """The lowering for a program: where the tokens of a call are fixed, no more than there is room for."""
        room = program.context if program.capacity is None else min(program.context, program.capacity)
        return cls if cls.time is None or cls.time <= room else cls.of(room)

    @classmethod
    def of(cls, time: int) -> type[Prefill]:
        """The same for `time` tokens a call."""
        return type(cls.__name__, (cls,), {"time": time})

    def fir(self, u: Value, weight: Value, bias: Value, state: Value, groups: int) -> tuple[Value, Value]:
        taps = self.weight(weight)
        out, per_group, count = taps.shape
        window = op.Concat(state, u, axis=1)
        if per_group == 1 and out == groups and count <= self.short:
            y = None
            for lag in range(count):  # oldest first
                until = lag - count + 1
                part = op.Slice(window, ints(lag), ints(until if until else END), ints(1))
                part = op.Mul(part, constant(taps[:, 0, lag]))
                y = part if y is None else op.Add(y, part)
        else:
            y = op.Conv(op.Transpose(window, perm=[0, 2, 1]), constant(taps), group=groups)
            y = op.Transpose(y, perm=[0, 2, 1])
        y = y if bias is None else op.Add(y, constant(self.weight(bias)))
        return y, op.Slice(window, ints(1 - count), ints(END), ints(1))

    def long_conv(self, u: Value, taps: Value, state: Value, inner: int) -> tuple[Value, Value]:
        """A Conv over the ring buffer and the new tokens, one group per filter."""
        weight = self.weight(taps).flip(-1)
        filters, length = weight.shape
        window = op.Concat(state, u, axis=1)
        successor = op.Slice(window, ints(1 - length), ints(END), ints(1))
        outer = int(u.shape[2]) // (filters * inner)
        channels = op.Reshape(window, ints(0, -1, outer, filters, inner))
        channels = op.Transpose(channels, perm=[0, 2, 4, 3, 1])  # [B, outer, inner, F, time]
        time = ints(self.time) if self.time else op.Shape(u, start=1, end=2)
        heard = ints(self.time + length - 1) if self.time else op.Shape(channels, start=4, end=5)
        rows = op.Reshape(channels, op.Concat(ints(-1, filters), heard, axis=0))
        y = op.Conv(rows, constant(weight[:, None]), group=filters)
        y = op.Reshape(y, op.Concat(ints(-1, outer, inner, filters), time, axis=0))
        y = op.Transpose(y, perm=[0, 4, 1, 3, 2])
        return op.Reshape(y, ints(0, 0, outer * filters * inner)), successor

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
        """Chunks of tokens, one where their number is fixed (`lower.chunks`)."""
        system = self.system(own, other, readout, direct)
        order, filters = system.own.shape
        lead = lead_of(u, filters, inner)
        packed = None if kept is None else _Packed(u, self.weight(kept), system, inner, self.gathers)
        before = state if packed is None else packed.unpack(state)
        if self.time:
            y, after = Chunks(system, lead, inner, self.time).one(u, before)
        else:
            y, after = Chunks(system, lead, inner, self.chunk or chunk_size(order)).any_number(u, before)
        return y, after if packed is None else packed.pack(after)


class _Packed:
    """States of filters that differ in order, [batch, 1, outer · states · inner], in the graph being traced.

    gathers: rows are taken apart with Gather alone, as they always are where a filter serves a block of channels
    """

    def __init__(self, u: Value, kept: torch.Tensor, system: RealModal, inner: int, gathers: bool) -> None:
        self.order, self.filters = system.own.shape
        self.index = packing(kept.numpy(), self.order, self.filters)
        self.lead = lead_of(u, self.filters, inner)
        self.inner = [inner] if inner > 1 else []
        self.outer = self.lead[: len(self.lead) - 1 - len(self.inner)]
        self.axis = 2 + len(self.outer)  # of the filters, or of the states
        self.gathers = gathers or inner > 1
        self.fixed = u.shape[0] if isinstance(u.shape[0], int) else None
        self.zeros = None if self.gathers or self.fixed else self._zeros(grouped(u, self.lead))

    def take(self, x: Value, index: NDArray[np.int32]) -> Value:
        """Entries of the axis of filters or states: [batch, 1, …, n, …] and index [m] → [batch, 1, …, m, …]

        On a CPU, Gather takes 8 ns an entry whatever its size, so it is for entries of many numbers. GatherElements
        takes 1 ns a number, but wants an index for every row of the batch.
        """
        if self.gathers:
            return op.Gather(x, constant(index), axis=self.axis)
        return op.GatherElements(x, self._everywhere(index), axis=self.axis)

    def _zeros(self, u: Value) -> Value:
        """Integer zeros [batch, 1, (outer), 1] without reading a shape: of one number the largest is the first."""
        one = op.Slice(u, ints(0, 0), ints(1, 1), ints(1, self.axis))
        return op.ArgMax(one, axis=self.axis, keepdims=1)

    def _everywhere(self, index: NDArray[np.int32]) -> Value:
        """[m] → [batch, 1, (outer), m]"""
        if self.fixed:
            return constant(np.broadcast_to(index, (self.fixed, 1, *self.outer, len(index))))
        return op.Add(self.zeros, constant(index.astype(np.int64)))

    def read(self, states: Value, readout: torch.Tensor, direct: Value) -> Value:
        """direct + Σ readout ∘ states over the states of each filter, [batch, 1, lead…]; readout: [order, filters]"""
        if self.gathers:  # readout is zero wherever `rows` holds no state
            table = readout.unsqueeze(-1) if self.inner else readout
            rows = op.Mul(self.rows(states), constant(table))
            return op.Add(op.ReduceSum(rows, ints(self.axis), keepdims=0), direct)
        said = op.Mul(states, constant(readout.flatten()[self.index.kept]))
        return op.ScatterElements(direct, self._everywhere(self.index.sources), said, axis=self.axis, reduction="add")

    def grouped(self, state: Value) -> Value:
        """[batch, 1, outer · states · inner] → [batch, 1, (outer), states, (inner)]"""
        return grouped(state, [*self.outer, len(self.index.kept), *self.inner])

    def joined(self, states: Value) -> Value:
        """The inverse of `grouped`."""
        return joined(states, [*self.outer, len(self.index.kept), *self.inner])

    def rows(self, states: Value) -> Value:
        """[batch, 1, (outer), states, (inner)] → [batch, 1, (outer), order, filters, (inner)], anything in between"""
        entries = self.take(states, self.index.positions)
        return op.Reshape(entries, ints(0, 1, *self.outer, self.order, self.filters, *self.inner))

    def unpack(self, state: Value) -> Value:
        """[batch, 1, outer · states · inner] → [batch, order, channels]; tables are zero where anything stands."""
        rows = op.Squeeze(self.rows(self.grouped(state)), ints(1))
        rows = op.Transpose(rows, perm=self._swapped) if self.outer else rows
        return joined(rows, self.lead)

    def pack(self, rows: Value) -> Value:
        """The inverse of `unpack`."""
        entries = grouped(rows, self.lead)
        entries = op.Transpose(entries, perm=self._swapped) if self.outer else entries
        entries = op.Reshape(entries, ints(0, 1, *self.outer, self.order * self.filters, *self.inner))
        return self.joined(self.take(entries, self.index.kept))

    @property
    def _swapped(self) -> list[int]:
        """Order and outer axis exchanged, with the batch before them and the filters behind."""
        return [0, 2, 1, *range(3, 2 + len(self.lead))]


def _function(method: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function of a bound method: the exporter writes attributes on what it is given."""

    @functools.wraps(method)
    def translate(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return translate
