"""Writing nodes of the new graph: layouts, sizes and the lhc operators."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from lhcompile import ops  # noqa: F401  (registers lhc::)
from lhcompile.artifacts import Signal
from lhcompile.recognize.values import FirTaps, LongTaps, Window, axes_of, refuse, tensor_sizes
from lhcompile.sizes import BATCH, TIME, Size, emit_size

__all__ = ["Emitter", "causal_taps", "dtype_of"]

aten = torch.ops.aten
NEGATIVE_LAG = 1e-5
"""Taps at negative lags below this share of their filter's largest are the rounding of a float32 transform."""
TRAILING = 1e-7
"""Trailing taps below this share of their filter's largest are rounding of zero."""
ANOTHER = 1e-4
"""Taps at two lengths that differ by more than this share of their filter's largest are not the same filter."""


class Emitter:
    """Adds nodes to the new graph with their sizes and the origin of the old node they stand for."""

    def __init__(self, root: GraphModule) -> None:
        self.root = root
        self.graph = Graph()
        self.origin: Node | None = None
        self._emitted: dict[Size, Node | int] = {}
        self._constants = 0
        self._positions: Node | None = None
        self._tables: list[tuple[Tensor, Node]] = []

    def start(self, old: Node) -> Node:
        """The data input, and the two sizes read from it."""
        signal = Signal.read_by(old)
        ids = self.graph.placeholder(signal.input)
        ids.meta.update(old.meta, dtype=signal.dtype)
        self._input = ids
        self.batch = self.graph.call_function(aten.sym_size.int, (ids, 0))
        self.time = self.graph.call_function(aten.sym_size.int, (ids, 1))
        self.batch.meta["size"], self.time.meta["size"] = BATCH, TIME
        self._emitted = {BATCH: self.batch, TIME: self.time}
        return ids

    def size(self, size: Size) -> Node | int:
        if size not in self._emitted:
            self._emitted[size] = emit_size(self.graph, size, self.batch, self.time)
        return self._emitted[size]

    def constant(self, value: Tensor, hint: str = "constant") -> Node:
        """A buffer of the new program."""
        name = f"{hint}_{self._constants}"
        self._constants += 1
        self.root.register_buffer(name, value.detach().contiguous())
        node = self.graph.get_attr(name)
        node.meta["sizes"] = tuple(Size(0, 0, n) for n in value.shape)
        return node

    def call(self, target: object, args: tuple[Any, ...], sizes: object, kwargs: dict[str, Any] | None = None) -> Node:
        node = self.graph.call_function(target, args, kwargs or {})  # type: ignore[arg-type]
        if self.origin is not None:
            for key in ("nn_module_stack", "stack_trace"):
                if key in self.origin.meta:
                    node.meta[key] = self.origin.meta[key]
        node.meta["sizes"] = sizes
        return node

    def permute(self, x: Node, order: Sequence[int]) -> Node:
        if list(order) == sorted(order):
            return x
        sizes = tensor_sizes(x)
        return self._like(x, aten.permute.default, list(order), tuple(sizes[i] for i in order))

    def reshape(self, x: Node, sizes: tuple[Size, ...]) -> Node:
        if tensor_sizes(x) == sizes:
            return x
        return self._like(x, aten.reshape.default, [self.size(size) for size in sizes], sizes)

    def expand(self, x: Node, sizes: tuple[Size, ...]) -> Node:
        return self._like(x, aten.expand.default, [self.size(size) for size in sizes], sizes)

    def cast(self, x: Node, dtype: torch.dtype) -> Node:
        """x as `dtype`; what is meant to be complex stays real."""
        if dtype.is_complex or dtype_of(x) == dtype:
            return x
        new = self.call(aten.to.dtype, (x, dtype), tensor_sizes(x))
        new.meta["dtype"] = dtype
        return new

    def _like(self, x: Node, target: object, argument: object, sizes: tuple[Size, ...]) -> Node:
        new = self.call(target, (x, argument), sizes)
        new.meta["dtype"] = dtype_of(x)
        return new

    def item(self, pair: Node, sizes: tuple[Size, ...]) -> Node:
        return self.call(operator.getitem, (pair, 0), sizes)

    # ---- the operators -----------------------------------------------------------------------------------------

    def position(self) -> Node:
        """The place of every token, int64 [batch, time]: one node for the whole program."""
        if self._positions is None:
            pair = self.graph.call_function(torch.ops.lhc.position.default, (self._input, None))
            self._positions = self.item(pair, (BATCH, TIME))
            self._positions.meta["dtype"] = torch.int64
        return self._positions

    def by_position(self, table: Tensor, batch: int, time: int, name: str) -> Node:
        """A constant that depends on the position as a signal: its entries at `time` are read by position.

        table: [..., context at axis `time`, ...], of size 1 at axis `batch`
        """
        rest = [i for i in range(table.ndim) if i not in (batch, time)]
        lead = table.permute(time, batch, *rest)[:, 0]
        flat = lead.flatten(1) if rest else lead[:, None]
        known = (node for value, node in self._tables if value.dtype == flat.dtype and torch.equal(value, flat))
        rows = next(known, None)
        if rows is None:
            rows = self.constant(flat, name)
            self._tables.append((flat, rows))
        sizes = (BATCH, TIME, *(Size(0, 0, n) for n in lead.shape[1:]))
        read = self.call(aten.embedding.default, (rows, self.position()), (BATCH, TIME, Size(0, 0, flat.shape[1])))
        read.meta["dtype"] = table.dtype
        return self.permute(self.reshape(read, sizes), [[batch, time, *rest].index(i) for i in range(table.ndim)])

    def convolution(self, window: Window, node: Node, delay: int, context: int) -> Node:
        """One lhc operator for a window that starts `delay` positions early, cut to the sequence, in float32.

        A single tap remembers nothing, so it becomes the ordinary operator that it is.
        """
        sizes = tensor_sizes(window.source)
        batch, _ = axes_of(sizes, node)
        merged = sizes[batch].offset  # channels that share an axis with batch
        source = self.cast(window.source, torch.float32)
        if merged > 1:
            source = self.reshape(source, (*sizes[:batch], BATCH, Size(0, 0, merged), *sizes[batch + 1 :]))
        axis = window.axis + (merged > 1 and window.axis > batch)
        if isinstance(window.taps, LongTaps):
            taps = causal_taps(window.taps, window.axis, node, context)
            if taps.shape[batch] != 1:
                raise refuse(node, "its filter differs between rows of the batch")
            y = self._long(source, axis, taps.unsqueeze(batch) if merged > 1 else taps, node, delay)
        else:
            y = self._fir(source, window.taps, node, delay)
        if merged == 1:
            return y
        out = tensor_sizes(y)
        return self.reshape(y, (*out[:batch], Size(1, 0, merged), *out[batch + 2 :]))

    def _fir(self, source: Node, taps: FirTaps | None, node: Node, delay: int) -> Node:
        """source: [batch, groups…, channels, time] in any order, the weight repeated for each group; without taps a
        mere delay of every channel."""
        sizes = tensor_sizes(source)
        order, channels = _layout(sizes, *axes_of(sizes, node))
        flat = Size(0, 0, math.prod(size.offset for size in channels))
        outs = channels
        if taps is None:
            taps = FirTaps(torch.ones(flat.offset, 1, 1), None, flat.offset)
        else:
            repeats = math.prod(size.offset for size in channels[:-1])
            outs = [*channels[:-1], Size(0, 0, taps.weight.shape[0])]
            bias = None if taps.bias is None else taps.bias.repeat(repeats)
            taps = FirTaps(taps.weight.repeat(repeats, 1, 1), bias, taps.groups * repeats)
        weight = torch.nn.functional.pad(taps.weight, (0, delay)).float()
        u = self.reshape(self.permute(source, order), (BATCH, TIME, flat))
        bias_node = None if taps.bias is None else self.constant(taps.bias.float(), "bias")
        operands = self.constant(weight, "weight"), bias_node
        out = (BATCH, TIME, Size(0, 0, weight.shape[0]))
        if weight.shape[-1] == 1:
            args = (self.permute(u, [0, 2, 1]), *operands, [1], [0], [1], taps.groups)
            y = self.permute(self.call(aten.conv1d.default, args, (out[0], out[2], out[1])), [0, 2, 1])
        else:
            y = self.item(self.call(torch.ops.lhc.fir.default, (u, *operands, None, taps.groups), None), out)
        return self._back(y, [BATCH, TIME, *outs], order)

    def _long(self, source: Node, axis: int, taps: Tensor, node: Node, delay: int) -> Node:
        """taps: aligned with the source's axes, lag along `axis`."""
        source = self._expand(source, taps, axis)
        sizes = tensor_sizes(source)
        if taps.shape[axis] == 1 and not delay:
            return self.call(aten.mul.Tensor, (source, self.constant(taps.float(), "tap")), sizes)
        order, channels = _layout(sizes, *axes_of(sizes, node))
        lag_last = [order[0], *order[2:], axis]
        taps = torch.nn.functional.pad(taps.permute(lag_last)[0], (delay, 0))  # [*channels, lag]
        filters, inner = _shared(taps, [size.offset for size in channels])
        flat = Size(0, 0, math.prod(size.offset for size in channels))
        u = self.reshape(self.permute(source, order), (BATCH, TIME, flat))
        args = (u, self.constant(filters, "taps"), None, inner)
        y = self.item(self.call(torch.ops.lhc.long_conv.default, args, None), (BATCH, TIME, flat))
        return self._back(y, [BATCH, TIME, *channels], order)

    def _back(self, y: Node, sizes: list[Size], order: list[int]) -> Node:
        y = self.reshape(y, tuple(sizes))
        return self.permute(y, [order.index(i) for i in range(len(order))])

    def _expand(self, source: Node, taps: Tensor, axis: int) -> Node:
        """Broadcast the source against taps that have more channels than it."""
        sizes = tensor_sizes(source)
        wanted = tuple(
            Size(0, 0, count) if i != axis and size.fixed and size.offset == 1 and count != 1 else size
            for i, (size, count) in enumerate(zip(sizes, taps.shape, strict=True))
        )
        if wanted == sizes:
            return source
        return self.expand(source, wanted)


def dtype_of(new: Node) -> torch.dtype:
    """dtype of a node of the new graph, remembered from the old one."""
    dtype = new.meta.get("dtype")
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def _layout(sizes: tuple[Size, ...], batch: int, time: int) -> tuple[list[int], list[Size]]:
    """Axis order [batch, time, channels…] and the channel sizes."""
    middle = [i for i in range(len(sizes)) if i not in (batch, time)]
    return [batch, time, *middle], [sizes[i] for i in middle]


def _shared(taps: Tensor, channels: list[int]) -> tuple[Tensor, int]:
    """taps [*channels or 1, lag] → (filters [C, lag], inner): channel n is heard through filter (n // inner) % C."""
    own = [i for i, count in enumerate(channels) if count != 1 and taps.shape[i] != 1]
    if not own:
        return taps.reshape(1, -1), 1
    first, last = own[0], own[-1]
    shape = [1] * len(channels)
    shape[first : last + 1] = channels[first : last + 1]
    filters = taps.expand(*shape, taps.shape[-1]).reshape(-1, taps.shape[-1])
    return filters, math.prod(channels[last + 1 :])


def causal_taps(taps: LongTaps, axis: int, node: Node, context: int) -> Tensor:
    """The filter's own taps, lag along `axis`, checked to look back only and not to change with the length."""
    whole = _one_sided(taps, axis, node, context)
    shorter = max(context // 2, 2)
    part = _one_sided(taps, axis, node, shorter).narrow(axis, 0, shorter)
    span = min(shorter, whole.shape[axis])
    scale = whole.abs().amax(axis, keepdim=True)
    if bool(((whole.narrow(axis, 0, span) - part.narrow(axis, 0, span)).abs() > ANOTHER * scale).any()):
        raise refuse(
            node, f"its filter is another one at length {shorter} than at length {context}: there are no fixed taps"
        )
    heard = (whole.abs() > TRAILING * scale).movedim(axis, -1).flatten(0, -2).any(0).nonzero()
    length = int(heard[-1]) + 1 if len(heard) else 1
    return whole.narrow(axis, 0, length)


def _one_sided(taps: LongTaps, axis: int, node: Node, time: int) -> Tensor:
    values, size = taps.at(time), taps.size(time)
    if not bool(torch.isfinite(values).all()):
        raise refuse(node, "its filter holds NaN or infinite taps")
    if values.is_complex():
        if bool((values.imag.abs() > NEGATIVE_LAG * values.abs().amax(axis, keepdim=True)).any()):
            raise refuse(node, "its filter is not real")
        values = values.real
    keep = min(time, size - time + 1)
    ahead = values.narrow(axis, keep, size - keep) if keep > 0 else values
    if bool((ahead.abs() > NEGATIVE_LAG * values.abs().amax(axis, keepdim=True)).any()):
        if size < 2 * time - 1:
            raise refuse(
                node,
                f"a transform of length {size} wraps the end of a sequence of {time} onto its start "
                f"(it looks ahead); it takes {2 * time - 1} or more",
            )
        raise refuse(node, "looks ahead: its filter has taps at negative lags")
    return values.narrow(axis, 0, keep)
