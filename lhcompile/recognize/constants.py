"""The part of a program that depends on weights and sizes alone."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lhcompile.artifacts import map_nodes
from lhcompile.sizes import Point, Size

__all__ = ["Constants"]

aten = torch.ops.aten
_SHAPE_ONLY = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
}
"""Operators that read no more than the shape of their input."""


class Constants:
    """Which nodes do not depend on the tokens, and their values at any length (batch 1).

    Sizes of the input are known, so a node that reads only sizes and weights is a constant.
    """

    def __init__(self, module: GraphModule) -> None:
        self._module = module
        self._values: dict[tuple[Node, int], object] = {}
        self.dependent: set[Node] = set()
        for node in module.graph.nodes:
            reads = "size" not in node.meta and node.target not in _SHAPE_ONLY
            if node.op == "placeholder" or (reads and any(arg in self.dependent for arg in node.all_input_nodes)):
                self.dependent.add(node)

    def size(self, node: Node, time: int) -> int | float:
        """The value of a size expression at batch 1."""
        value = self.value(node, time)
        assert isinstance(value, (int, float))
        return value

    def tensor(self, node: Node, time: int) -> Tensor:
        value = self.value(node, time)
        assert isinstance(value, Tensor)
        return value

    def value(self, node: Node, time: int) -> object:
        """The value of a constant node for sequences of length `time`; masks, which are large, are not kept."""
        key = (node, time)
        if key in self._values:
            return self._values[key]
        value = self._compute(node, time)
        sizes = node.meta.get("sizes")
        if not (isinstance(sizes, tuple) and sum(size is not None and size.has_time for size in sizes) > 1):
            self._values[key] = value
        return value

    def _compute(self, node: Node, time: int) -> object:
        size = node.meta.get("size")
        if isinstance(size, Size):
            return size.at(Point(1, time))
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(self._module)
            return value.detach()
        if node in self.dependent:  # reached through an operator that reads its shape alone
            return torch.empty([axis.at(Point(1, time)) for axis in node.meta["sizes"]], dtype=node.meta["val"].dtype)
        args, kwargs = map_nodes((node.args, dict(node.kwargs)), lambda arg: self.value(arg, time))
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
