"""The walk over a captured program: rules for what happens along time, a trial for everything else."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lhcompile.artifacts import map_nodes
from lhcompile.recognize import attention, operators, spectra, windows
from lhcompile.recognize.emit import dtype_of
from lhcompile.recognize.pointwise import check_pointwise, doubled
from lhcompile.recognize.signals import Rule, Signals
from lhcompile.recognize.values import Plain, Value, axes_of, refuse, tensor_sizes
from lhcompile.sizes import TIME, Point, Size

__all__ = ["Walk"]

_RULES: dict[object, list[Rule]] = {}
for _stage in (attention, windows, spectra, operators):
    for _target, _rule in _stage.RULES.items():
        _RULES.setdefault(_target, []).append(_rule)
aten = torch.ops.aten
_ANY_LAYOUT: dict[Any, Any] = dict.fromkeys((aten.view.default, aten._unsafe_view.default), aten.reshape.default)
"""Operators that ask for a layout in memory, which is another in the new graph, and what they stand for."""
_BY_ENTRY = {aten.linear.default, aten.embedding.default}
"""Operators whose weights have an output, or a row to look up, along their first axis, each on its own."""
ENTRIES = 256
"""So many of them are tried: all would be a copy of the largest weights in double precision."""
SAME = 1e-6
"""Entries of a table computed at two lengths that differ by less, as a share of the largest, are the same: kernels
round the end of a vector differently."""


class Walk(Signals):
    """Rewrites one program, from the top of its graph to the bottom."""

    def __init__(self, module: GraphModule, context: int) -> None:
        super().__init__(module, context)
        self._folded: dict[Node, Node] = {}
        self._tables: dict[Node, Tensor | None] = {}

    def run(self) -> GraphModule:
        """The new program."""
        for node in self.old.graph.nodes:
            if node not in self.constants.dependent:
                continue
            self.emit.origin = node
            if node.op == "placeholder":
                self.values[node] = Plain(self.emit.start(node))
            elif node.op == "output":
                self.emit.graph.output(self._output(node))
            else:
                self.values[node] = self._value(node)
        self.emit.graph.eliminate_dead_code()
        self.root.graph = self.emit.graph
        self.root.recompile()
        return self.root

    def _output(self, node: Node) -> Node:
        result = node.args[0]
        while isinstance(result, (tuple, list)):
            result = result[0]
        if not isinstance(result, Node) or result not in self.values:
            raise refuse(node, "the output does not depend on the tokens")
        return self.settle(result, node, cut=True).node

    def _value(self, node: Node) -> Value:
        """What `node` stands for: a tracked signal where a rule applies, an ordinary operator otherwise."""
        if node.target is operator.getitem:
            whole = self.values[node.args[0]]  # type: ignore[index]
            if isinstance(whole, list):
                index: Any = node.args[1]
                if index >= len(whole):
                    raise refuse(node, "reads the state of an operator: sequences end with their outputs")
                return whole[index]
        for rule in _RULES.get(node.target, []):
            value = rule(self, node)
            if value is not None:
                return value
        return self._ordinary(node)

    def _ordinary(self, node: Node) -> Value:
        """Copy an operator that treats each position on its own."""
        inputs = [arg for arg in node.all_input_nodes if arg in self.constants.dependent]
        settled = {arg: self.settle(arg, node) for arg in inputs}
        extras = {value.extra for value in settled.values()}
        if len(extras) > 1:
            lengths = " and ".join(str(self.context + each) for each in sorted(extras))
            raise refuse(node, f"joins signals cut to {lengths} positions where the sequence has {self.context}")
        (extra,) = extras
        signals = [value.node for value in settled.values()]

        def convert(arg: Node) -> Any:
            if arg in settled:
                return settled[arg].node
            if "size" in arg.meta:
                return self.emit.size(_shorten(arg.meta["size"], extra))
            table = self._table(arg)
            if table is None:
                return self._fold(arg, node)
            signals.append(self._by_position(arg, table, node, extra))
            return signals[-1]

        args, kwargs = map_nodes((node.args, dict(node.kwargs)), convert)
        laws = node.meta["sizes"]
        several = isinstance(laws, list)
        sizes = [_cut(law, extra) for law in laws] if several else _cut(laws, extra)
        target = _ANY_LAYOUT.get(node.target, node.target)
        self._check(node, target, args, kwargs, signals, sizes if several else [sizes])
        new = self.emit.call(target, args, sizes, kwargs)
        if not several:
            new.meta["dtype"] = node.meta["val"].dtype
            return Plain(new, extra)
        parts = [self.emit.call(operator.getitem, (new, i), law) for i, law in enumerate(sizes)]
        for part, val in zip(parts, node.meta["val"], strict=True):
            part.meta["dtype"] = val.dtype
        return [Plain(part, extra) for part in parts]

    def _check(
        self, node: Node, target: Any, args: Any, kwargs: Any, inputs: list[Node], outputs: list[Any]
    ) -> None:
        """Try the operator at small sizes; see `pointwise`."""
        unique = list(dict.fromkeys(inputs))
        for out in outputs:
            if not isinstance(out, tuple):
                raise refuse(node, "gives something that is not a tensor")

        def run(point: Point, tensors: list[Tensor]) -> object:
            given = dict(zip(unique, tensors, strict=True))

            def value(arg: Node) -> Any:
                if "size" in arg.meta:
                    return arg.meta["size"].at(point)
                if arg in given:
                    return doubled(given[arg])
                weight = getattr(self.root, str(arg.target))
                return doubled(weight[:ENTRIES] if target in _BY_ENTRY else weight)

            real_args, real_kwargs = map_nodes((args, kwargs), value)
            with torch.no_grad():
                return target(*real_args, **real_kwargs)

        kinds = [(tensor_sizes(x), dtype_of(x)) for x in unique]
        check_pointwise(node, run, kinds, outputs)

    def _fold(self, arg: Node, reader: Node) -> Node:
        """A constant as a buffer; one that is the same at every position loses its time axis."""
        if arg not in self._folded:
            value = self._timeless(arg, reader, self.context)
            if arg.op != "get_attr" and not torch.equal(value, self._timeless(arg, reader, self.context // 2)):
                raise refuse(reader, f"uses {arg.name}, a constant that changes with the length of the sequence")
            self._folded[arg] = self.emit.constant(value, arg.name)
        return self._folded[arg]

    def _table(self, arg: Node) -> Tensor | None:
        """A constant at the context length whose entries differ by position but not by the length; None for others."""
        if arg not in self._tables:
            self._tables[arg] = self._prefixed(arg)
        return self._tables[arg]

    def _prefixed(self, arg: Node) -> Tensor | None:
        axes = [axis for axis, size in enumerate(arg.meta.get("sizes") or ()) if size.has_time]
        if len(axes) != 1:
            return None
        (axis,), whole = axes, self.constants.tensor(arg, self.context)
        if whole.is_complex():
            return None
        if torch.equal(whole.narrow(axis, 0, 1).expand_as(whole), whole):
            return None
        for time in (self.context // 2, self.context // 3):
            part = self.constants.tensor(arg, time)
            start = whole.narrow(axis, 0, part.shape[axis])
            scale = start.double().abs().nan_to_num(posinf=0.0).amax()
            if not torch.allclose(part.double(), start.double(), rtol=0.0, atol=SAME * float(scale), equal_nan=True):
                return None
        return whole

    def _by_position(self, arg: Node, table: Tensor, reader: Node, extra: int) -> Node:
        """A table read by position, laid out as `reader` takes it.

        Its batch axis is its own, or the one that the result's has by broadcasting.
        """
        sizes, rank = arg.meta["sizes"], table.ndim
        (time,) = (axis for axis, size in enumerate(sizes) if size.has_time)
        laws = reader.meta["sizes"]
        own = [axis for axis, size in enumerate(sizes) if size.has_batch]
        if own:
            batch = own[0]
        elif isinstance(laws, tuple) and _broadcasts(reader):
            table = table.reshape((1,) * (len(laws) - rank) + table.shape)
            time += len(laws) - rank
            batch, expected = axes_of(laws, reader)
            time = time if time == expected else batch  # a time axis that lines up with no other
        else:
            batch = time
        if batch == time or table.shape[batch] != 1 or _shorten(sizes[time - table.ndim], extra) != TIME or extra < 0:
            raise refuse(reader, f"uses {arg.name}, a constant that depends on the absolute position")
        table = table.narrow(time, 0, self.context)
        return self.emit.by_position(table, batch, time, arg.name)

    def _timeless(self, arg: Node, reader: Node, time: int) -> Tensor:
        """A constant at one length, without its time axis."""
        value = self.constants.value(arg, time)
        if not isinstance(value, Tensor):
            raise refuse(reader, f"uses {arg.name}, a number that changes with the length of the sequence")
        for axis, size in enumerate(arg.meta.get("sizes") or ()):
            if size.has_time and value.shape[axis] > 1:
                first = value.narrow(axis, 0, 1)
                if not torch.equal(first.expand_as(value), value):
                    raise refuse(reader, f"uses {arg.name}, a constant that depends on the absolute position")
                value = first
        return value


def _broadcasts(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags


def _shorten(size: Size, extra: int) -> Size:
    """The law of a size when `extra` of the positions it counts do not exist."""
    return Size(size.batch, size.scale, size.offset - size.scale * extra) if size.has_time else size


def _cut(sizes: Any, extra: int) -> Any:
    return tuple(_shorten(size, extra) for size in sizes) if isinstance(sizes, tuple) else sizes
