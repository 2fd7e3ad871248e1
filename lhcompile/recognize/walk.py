"""The walk over a captured program: one method per thing that can happen to a signal along time."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lhcompile.artifacts import map_nodes
from lhcompile.recognize import lti
from lhcompile.recognize.constants import Constants
from lhcompile.recognize.emit import Emitter, dtype_of
from lhcompile.recognize.pointwise import check_pointwise, doubled
from lhcompile.recognize.values import Parts, Plain, Spectrum, Value, Window, refuse, tensor_sizes
from lhcompile.sizes import Point, Size

__all__ = ["Walk"]


class Walk:
    """Rewrites one program. `values` says what each old node stands for in the new graph."""

    def __init__(self, module: GraphModule, context: int) -> None:
        self.old = module
        self.context = context
        self.constants = Constants(module)
        self.root = GraphModule(torch.nn.Module(), torch.fx.Graph())
        self.emit = Emitter(self.root)
        self.values: dict[Node, Value] = {}
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
        rule = lti.RULES.get(node.target)
        if rule is not None:
            value = rule(self, node)
            if value is not None:
                return value
        return self._ordinary(node)

    # ---- what rules need ---------------------------------------------------------------------------------------

    def is_constant(self, arg: object) -> bool:
        return not (isinstance(arg, Node) and arg in self.constants.dependent)

    def number(self, arg: Any, time: int | None = None) -> Any:
        """An argument's numbers at the context length (or `time`), batch 1."""
        at = self.context if time is None else time
        return map_nodes(arg, lambda node: self.constants.value(node, at))

    def signal(self, node: Node) -> Window | None:
        """A tensor of the old graph as a window along its own time axis; None for spectra."""
        value = self.values[node]
        if isinstance(value, Window):
            return value
        if isinstance(value, Plain) and value.extra <= 0:
            sizes = tensor_sizes(value.node)
            times = [i for i, size in enumerate(sizes) if size.has_time]
            if len(times) == 1 and sizes[times[0]] == Size(0, 1, 0):
                return Window(value.node, times[0], 0, self.context + value.extra)
        return None

    def settle(self, node: Node, reader: Node, cut: bool = False) -> Plain:
        """The tensor an ordinary operator reads: tracked signals become an operator here."""
        value = self.values[node]
        if isinstance(value, Window):
            value = self.values[node] = self._materialize(value, node)
        if not isinstance(value, Plain):
            what = "a spectrum" if isinstance(value, (Spectrum, Parts)) else "several tensors"
            raise refuse(reader, f"reads {what} in a way that is not understood")
        if cut and value.extra > 0:
            raise refuse(reader, f"its input is {value.extra} positions longer than the sequence and never cut")
        if cut and value.extra < 0:
            raise refuse(reader, f"its input lacks the last {-value.extra} positions of the sequence")
        return value

    def _materialize(self, window: Window, node: Node) -> Plain:
        time, length, dtype = self.context, window.stop - window.start, node.meta["val"].dtype
        if window.start == 0 and window.stop > time and any(size.scale > 1 for size in tensor_sizes(node)):
            origin = window.origin or node
            raise refuse(origin, f"is {length} positions long where the sequence has {time}, and read before a cut")
        if window.taps is None and window.start == 0:
            return Plain(self.emit.cast(window.source, dtype), window.stop - time)
        node = window.origin or node
        if window.start > 0:
            raise refuse(node, f"looks ahead by {window.start} positions")
        if window.start < 0 and length != time:
            raise refuse(node, f"is {length} positions long where the sequence has {time}, and never cut")
        reader, self.emit.origin = self.emit.origin, node
        y = self.emit.convolution(window, node, -window.start, self.context)
        self.emit.origin = reader
        return Plain(self.emit.cast(y, dtype), window.stop - time if window.start == 0 else 0)

    # ---- ordinary operators ------------------------------------------------------------------------------------

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
