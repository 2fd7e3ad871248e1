"""Permutes move down through pointwise operators and splits until they meet and cancel.

    before                                          after
    p = permute(x, [0, 2, 1])                       a, b = split(x, d, 2)
    a, b = split(p, d, 1)                           y = mul(a, b)
    y = permute(mul(a, b), [0, 2, 1])

Published models compute in [batch, channels, time], the lhc operators in [batch, time, channels]: without this pass a
graph turns its tensors over and back several times a layer.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from lhcompile.artifacts import map_nodes

__all__ = ["sink_permutes"]

aten = torch.ops.aten
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}


def sink_permutes(module: GraphModule) -> bool:
    """Apply the rewrite in one walk down the graph; True when something changed."""
    graph, changed = module.graph, False
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.meta.get("sizes"), (tuple, list)):
            continue
        with graph.inserting_after(node):
            new = _joined(graph, node) or _split(graph, node) or _pointwise(module, node)
        if new is not None:
            node.replace_all_uses_with(new)
            changed = True
    if changed:
        graph.eliminate_dead_code()
        graph.lint()
        module.recompile()
    return changed


def _order(node: object) -> list[int] | None:
    """The order of a permute or transpose; None for anything else."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target == aten.permute.default:
        rank = len(node.meta["sizes"])
        dims: Any = node.args[1]
        return [int(dim) % rank for dim in dims]
    if node.target == aten.transpose.int:
        order = list(range(len(node.meta["sizes"])))
        first, second = (int(dim) % len(order) for dim in node.args[1:])  # type: ignore[arg-type]
        order[first], order[second] = order[second], order[first]
        return order
    return None


def _joined(graph: Graph, node: Node) -> Node | None:
    """permute(permute(x, p), q) → permute(x, p[q]); x itself when that is no permutation."""
    outer = _order(node)
    if outer is None:
        return None
    source = node.args[0]
    assert isinstance(source, Node)
    inner = _order(source)
    order = outer if inner is None else [inner[i] for i in outer]
    root = source if inner is None else source.args[0]
    assert isinstance(root, Node)
    if order == sorted(order):
        return root
    return None if inner is None else _permute(graph, root, order, node)


def _split(graph: Graph, node: Node) -> Node | None:
    """getitem(split(permute(x, p), size, dim), i) → permute(getitem(split(x, size, p[dim]), i), p)"""
    if node.target is not operator.getitem:
        return None
    whole: Any = node.args[0]
    order = _order(whole.args[0]) if whole.target in _SPLITS else None
    if order is None:
        return None
    source = whole.args[0].args[0]
    dim = whole.args[2] if len(whole.args) > 2 else 0
    with graph.inserting_before(whole):
        twin = next((user for user in source.users if user.meta.get("twin") is whole), None)
        if twin is None:
            twin = graph.call_function(whole.target, (source, whole.args[1], order[dim % len(order)]))
            twin.meta = {**whole.meta, "twin": whole, "sizes": [_undone(axes, order) for axes in whole.meta["sizes"]]}
    part = graph.call_function(operator.getitem, (twin, node.args[1]))
    part.meta = {**node.meta, "sizes": _undone(node.meta["sizes"], order)}
    with graph.inserting_after(part):
        return _permute(graph, part, order, node)


def _pointwise(module: GraphModule, node: Node) -> Node | None:
    """f(permute(x, p), permute(y, p), constants) → permute(f(x, y, constants), p)"""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
        return None
    inputs = [arg for arg in node.all_input_nodes if "size" not in arg.meta]
    signals = [arg for arg in inputs if arg.op != "get_attr"]
    orders = [_order(arg) for arg in signals]
    order = orders[0] if orders else None
    if order is None or any(other != order for other in orders) or not isinstance(node.meta["sizes"], tuple):
        return None
    if len(node.meta["sizes"]) != len(order):
        return None  # a constant adds axes
    graph = module.graph

    def source(arg: Node) -> Node:
        if arg in signals:
            root = arg.args[0]
            assert isinstance(root, Node)
            return root
        if "size" in arg.meta:
            return arg
        value = _undone_constant(getattr(module, str(arg.target)), order)
        name = f"{arg.target}_{''.join(map(str, order))}"
        module.register_buffer(name, value)
        with graph.inserting_before(node):
            attribute = graph.get_attr(name)
        attribute.meta["sizes"] = arg.meta.get("sizes")
        return attribute

    args, kwargs = map_nodes((node.args, dict(node.kwargs)), source)
    new = graph.call_function(node.target, args, kwargs)
    new.meta = {**node.meta, "sizes": _undone(node.meta["sizes"], order)}
    with graph.inserting_after(new):
        return _permute(graph, new, order, node)


def _permute(graph: Graph, source: Node, order: list[int], like: Node) -> Node:
    new = graph.call_function(aten.permute.default, (source, order))
    new.meta = {**like.meta, "sizes": tuple(source.meta["sizes"][i] for i in order)}
    return new


def _undone(axes: Any, order: list[int]) -> tuple[Any, ...]:
    """The axes as they were before the permute: axis order[i] of the source is axis i."""
    before: list[Any] = [None] * len(order)
    for i, axis in enumerate(order):
        before[axis] = axes[i]
    return tuple(before)


def _undone_constant(value: Tensor, order: list[int]) -> Tensor:
    """A constant that is broadcast against the permuted tensor, for the tensor before it."""
    if value.ndim == 0:
        return value
    full = value.reshape((1,) * (len(order) - value.ndim) + value.shape)
    return full.permute([order.index(i) for i in range(len(order))]).contiguous()
