"""What the rules of recognition know: what each value of the old graph stands for, and how it becomes a tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lhcompile.artifacts import map_nodes
from lhcompile.recognize.constants import Constants
from lhcompile.recognize.emit import Emitter
from lhcompile.recognize.values import Parts, Plain, Scores, Spectrum, Value, Window, refuse, tensor_sizes
from lhcompile.sizes import Size

__all__ = ["Rule", "Signals", "bind", "rank_of"]


class Signals:
    """A program being rewritten. `values` says what each old node stands for in the new graph."""

    def __init__(self, module: GraphModule, context: int) -> None:
        self.old = module
        self.context = context
        self.constants = Constants(module)
        self.root = GraphModule(torch.nn.Module(), torch.fx.Graph())
        self.emit = Emitter(self.root)
        self.values: dict[Node, Value] = {}

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
            what = "scores of attention" if isinstance(value, Scores) else "several tensors"
            what = "a spectrum" if isinstance(value, (Spectrum, Parts)) else what
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

    def whole(self, arg: Node, reader: Node) -> Window:
        """The signal as an operator's finished result, to start the next one from."""
        plain = self.settle(arg, reader, cut=True)
        axis = next(i for i, size in enumerate(tensor_sizes(plain.node)) if size.has_time)
        return Window(plain.node, axis, 0, self.context)


Rule = Callable[[Signals, Node], Value | None]
"""(signals, node) → what the node stands for; None when it is an ordinary operator"""


def bind(node: Node) -> dict[str, Any]:
    """All arguments of an aten operator by the names of its schema, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound = {arg.name: arg.default_value for arg in schema.arguments if arg.has_default_value()}
    bound.update({arg.name: value for arg, value in zip(schema.arguments, node.args, strict=False)})
    bound.update(node.kwargs)
    return bound


def rank_of(node: Node) -> int:
    """Number of axes of a tensor of the old graph."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.ndim
