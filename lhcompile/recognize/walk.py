"""The walk over a captured program: rules for what happens along time, a trial for everything else."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lhcompile.artifacts import map_nodes
from lhcompile.recognize import spectra, windows
from lhcompile.recognize.emit import dtype_of
from lhcompile.recognize.pointwise import check_pointwise, doubled
from lhcompile.recognize.signals import Signals
from lhcompile.recognize.values import Plain, Value, refuse, tensor_sizes
from lhcompile.sizes import Point, Size

__all__ = ["Walk"]

_RULES = {**windows.RULES, **spectra.RULES}


class Walk(Signals):
    """Rewrites one program, from the top of its graph to the bottom."""

    def __init__(self, module: GraphModule, context: int) -> None:
        super().__init__(module, context)
        self._folded: dict[Node, Node] = {}

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
                return whole[node.args[1]]  # type: ignore[index]
        rule = _RULES.get(node.target)
        if rule is not None:
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

        def convert(arg: Node) -> Any:
            if arg in settled:
                return settled[arg].node
            if "size" in arg.meta:
                return self.emit.size(_shorten(arg.meta["size"], extra))
            return self._fold(arg, node)

        args, kwargs = map_nodes((node.args, dict(node.kwargs)), convert)
        laws = node.meta["sizes"]
        several = isinstance(laws, list)
        sizes = [_cut(law, extra) for law in laws] if several else _cut(laws, extra)
        self._check(node, args, kwargs, [value.node for value in settled.values()], sizes if several else [sizes])
        new = self.emit.call(node.target, args, sizes, kwargs)
        if not several:
            new.meta["dtype"] = node.meta["val"].dtype
            return Plain(new, extra)
        parts = [self.emit.call(operator.getitem, (new, i), law) for i, law in enumerate(sizes)]
        for part, val in zip(parts, node.meta["val"], strict=True):
            part.meta["dtype"] = val.dtype
        return [Plain(part, extra) for part in parts]

    def _check(self, node: Node, args: Any, kwargs: Any, inputs: list[Node], outputs: list[Any]) -> None:
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
                return doubled(given[arg] if arg in given else getattr(self.root, str(arg.target)))

            real_args, real_kwargs = map_nodes((args, kwargs), value)
            with torch.no_grad():
                return node.target(*real_args, **real_kwargs)  # type: ignore[operator]

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


def _shorten(size: Size, extra: int) -> Size:
    """The law of a size when `extra` of the positions it counts do not exist."""
    return Size(size.batch, size.scale, size.offset - size.scale * extra) if size.has_time else size


def _cut(sizes: Any, extra: int) -> Any:
    return tuple(_shorten(size, extra) for size in sizes) if isinstance(sizes, tuple) else sizes
