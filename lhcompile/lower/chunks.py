"""Modal systems over many tokens, in standard ONNX operators: matrix products inside of chunks, states between them.

Axes: C chunks of Q tokens, d the order, lead… the channels (`lower.pieces`). A is the transition, c the readout, E what
the tokens of a chunk leave in the state at its end, had it begun with zero (`lower.tables`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from lhcompile.lower.pieces import END, Value, aligned, constant, grouped, ints, joined, op
from lhcompile.lower.tables import ChunkTables, chunk_tables
from lhcompile.ssm import RealModal, partners

__all__ = ["Chunks", "chunk_size"]

LOW_ORDER = 8


def chunk_size(order: int) -> int:
    """Tokens of a chunk on a CPU, as measured: products cost Q + d a token and the Scan d / Q, so Q grows like √d."""
    return 16 if order <= LOW_ORDER else 32


@dataclass(frozen=True)
class Chunks:
    """A system on channels of one lead, in the graph being traced; size: Q."""

    system: RealModal
    lead: list[int]
    inner: int
    size: int

    @property
    def order(self) -> int:
        return int(self.system.own.shape[0])

    @property
    def channels(self) -> int:
        return math.prod(self.lead)

    def any_number(self, u: Value, before: Value) -> tuple[Value, Value]:
        """Any number of tokens, the last chunk filled up with zeros behind its k tokens.

            s_{c+1} = A^Q s_c + E_c,   y = Toeplitz u + c A^{i+1} s_c,   and at the end A^k s_C + E of those k alone,

        so that nothing is ever advanced by a negative time.

        u: [batch, time, channels]; before: [batch, d, channels] → y like u, the state behind, like before
        """
        tables = chunk_tables(self.system, self.size)
        inject = constant(self._by_filter(tables.inject))
        time = op.Shape(u, start=1, end=2)
        filling = op.Mod(op.Neg(time), ints(self.size))
        count = op.Sub(ints(self.size), filling)  # k
        padded = op.Pad(u, op.Concat(ints(0, 0, 0, 0), filling, ints(0), axis=0))
        blocks = self._columns(padded, self.size)
        starts = self._carry(op.MatMul(blocks, inject), before, tables)  # [C, batch, d, lead…]
        between = op.Transpose(starts, perm=[1, 0, *range(2, 3 + len(self.lead))])
        between = self._columns(op.Reshape(between, ints(0, -1, self.channels)), self.order)
        y = op.Slice(self._rows(self._heard(blocks, between, tables)), ints(0), time, ints(1))

        tail = op.Slice(u, op.Neg(count), ints(END), ints(1))  # those k, filled up in front
        tail = op.Pad(tail, op.Concat(ints(0), filling, ints(0, 0, 0, 0), axis=0))
        left = op.MatMul(self._columns(tail, self.size), inject)
        power = op.Gather(constant(self._powers(tables.powers)), count, axis=0)
        own, other = (op.Squeeze(part, ints(1)) for part in op.Split(power, axis=1, num_outputs=2))  # [1, d, lead…]
        last = op.Squeeze(op.Slice(starts, ints(-1), ints(END), ints(0)), ints(0))
        return y, self._ahead(last, own, other, left)

    def one(self, u: Value, before: Value) -> tuple[Value, Value]:
        """The Q tokens of one chunk, without a loop, and with no size that is found out as the graph runs."""
        tables = chunk_tables(self.system, self.size)
        block, start = self._columns(u, self.size), self._columns(before, self.order)
        left = op.MatMul(block, constant(self._by_filter(tables.inject)))
        own, other = (constant(table) for table in self._powers(tables.powers[self.size]))
        after = self._ahead(grouped(before, self.lead), own, other, left)
        return self._rows(self._heard(block, start, tables)), after

    def _heard(self, blocks: Value, starts: Value, tables: ChunkTables) -> Value:
        """[batch, lead…, C, Q] and [batch, lead…, C, d] → outputs like blocks, by one product of both."""
        toeplitz = op.Gather(constant(tables.taps), constant(tables.lags), axis=1)
        maps = op.Concat(toeplitz, constant(tables.observe), axis=1)  # [filters, Q + d, Q]
        if self.inner > 1:
            maps = op.Reshape(maps, ints(0, 1, self.size + self.order, self.size))
        return op.MatMul(op.Concat(blocks, starts, axis=-1), maps)

    def _carry(self, left: Value, before: Value, tables: ChunkTables) -> Value:
        """The state before every chunk, [C, batch, d, lead…], by a Scan over them; left: E, [batch, lead…, C, d]"""
        left = op.Reshape(self._rows(left), ints(0, -1, self.order, *self.lead))
        left = op.Transpose(left, perm=[1, 0, *range(2, 3 + len(self.lead))])
        body = self._body(self._powers(tables.powers[self.size]))
        scan = op.Scan(grouped(before, self.lead), left, body=body, num_scan_inputs=1).producer()
        scan.resize_outputs(2)  # the final state, and those before all chunks
        return scan.outputs[1]

    def _body(self, leap: NDArray[np.float32]) -> ir.Graph:
        """(s, E) → (own ∘ s + other ∘ swap(s) + E, s) on [batch, d, lead…]"""
        shape = ir.Shape(["batch", self.order, *self.lead])
        float32 = ir.TensorType(ir.DataType.FLOAT)
        s, e = (ir.Value(name=name, shape=shape, type=float32) for name in ("state", "left"))
        nodes: list[ir.Node] = []

        def add(op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
            nodes.append(ir.node(op_type, inputs, attributes=attributes))
            return nodes[-1].outputs[0]

        def held(array: NDArray[Any], name: str) -> ir.Value:
            return add("Constant", value=ir.tensor(np.ascontiguousarray(array), name=name))

        total = add("Mul", s, held(leap[0], "own"))
        if self.system.other.any():
            swapped = add("Gather", s, held(np.array(partners(self.order)), "halves"), axis=1)
            total = add("Add", total, add("Mul", swapped, held(leap[1], "other")))
        after, start = add("Add", total, e), add("Identity", s)
        for value, name in ((after, "next"), (start, "start")):
            value.name, value.shape, value.type = name, shape, float32
        return ir.Graph([s, e], [after, start], nodes=nodes, opset_imports={"": 20}, name="carry")

    def _ahead(self, state: Value, own: Value, other: Value, left: Value) -> Value:
        """A s + E as [batch, d, channels]; s: [batch, d, lead…], A as (own, other), E: [batch, lead…, 1, d]"""
        same = op.Mul(state, own)
        if self.system.other.any():
            same = op.Add(same, op.Mul(op.Gather(state, ints(*partners(self.order)), axis=1), other))
        return op.Add(joined(same, self.lead), self._rows(left))

    def _columns(self, x: Value, size: int) -> Value:
        """[batch, C · size, channels] → [batch, lead…, C, size], by an exchange of two axes, the fastest kind"""
        return op.Reshape(op.Transpose(x, perm=[0, 2, 1]), ints(0, *self.lead, -1, size))

    def _rows(self, x: Value) -> Value:
        """The inverse of `_columns`."""
        return op.Transpose(op.Reshape(x, ints(0, self.channels, -1)), perm=[0, 2, 1])

    def _powers(self, table: NDArray[np.float32]) -> NDArray[np.float32]:
        """[…, d, filters] → broadcast against [batch, d, lead…]"""
        return aligned(torch.from_numpy(table), self.lead, self.inner).numpy()

    def _by_filter(self, table: NDArray[np.float32]) -> NDArray[np.float32]:
        """[filters, …] → broadcast against [batch, lead…, …]"""
        return table[:, None] if self.inner > 1 else table
