"""torch.export at one fixed size, cleaned of what only training and checking need."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from lhcompile.errors import CaptureError
from lhcompile.sizes import Point

__all__ = ["export_at"]

aten = torch.ops.aten

_SAME_VALUE = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
}


def export_at(module: torch.nn.Module, point: Point) -> GraphModule:
    """Export module(ids [batch, time]) at fixed sizes, without decompositions and without mutation."""
    ids = torch.zeros(point.batch, point.time, dtype=torch.int64)
    try:
        exported = torch.export.export(module, (ids,), strict=False)
        if any(_mutates(node) for node in exported.graph.nodes):
            exported = exported.run_decompositions({})
        graph = exported.module()
    except Exception as error:  # torch.export raises many kinds; its first line says what
        detail = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CaptureError(f"torch.export cannot trace the module at {point.batch} × {point.time}: {detail}") from error
    assert isinstance(graph, GraphModule)
    _clean(graph)
    return graph


def _mutates(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _clean(graph: GraphModule) -> None:
    """Drop guards and assertions; let copies, dropout at rest and casts to the same type stand for their input."""
    for node in list(graph.graph.nodes):
        if node.op == "call_module" or (node.op == "call_function" and "_assert" in str(node.target)):
            graph.graph.erase_node(node)
        elif _is_copy(node):
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _is_copy(node: Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _SAME_VALUE:
        return True
    if node.target == aten.dropout.default:
        return node.args[2] is False
    if node.target in (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.to.device):
        source = node.args[0]
        return isinstance(source, Node) and source.meta["val"].dtype == node.meta["val"].dtype
    return False
