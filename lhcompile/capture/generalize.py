"""Two exports of one module at different sizes become one program of its sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from lhcompile.artifacts import module_path, source_line
from lhcompile.errors import CaptureError
from lhcompile.sizes import BATCH, TIME, Point, Size, emit_size, solve

__all__ = ["generalize"]

aten = torch.ops.aten


def generalize(first: GraphModule, second: GraphModule, at_first: Point, at_second: Point) -> GraphModule:
    """Replace in `second` every number that differs from `first` by its law in batch and time.

    Each node gains meta["sizes"]: the law of each axis of its value (a tuple of Size, None for other values).
    Raises CaptureError at the first node that is not the same in both, or whose sizes follow no law.
    """
    pairs = _pair(first, second)
    graph = second.graph
    (ids,) = [node for node in graph.nodes if node.op == "placeholder"]
    anchor = ids.next
    with graph.inserting_before(anchor):
        time = graph.call_function(aten.sym_size.int, (ids, 1))
        batch = graph.call_function(aten.sym_size.int, (ids, 0))
    batch.meta["size"], time.meta["size"] = BATCH, TIME

    def law(a: int, b: int, node: Node) -> Size:
        size = solve(a, b, at_first, at_second)
        if size is None:
            raise CaptureError(
                f"{module_path(node)}: {node.target}: a size is {a} at {at_first.batch} × {at_first.time} and {b} at "
                f"{at_second.batch} × {at_second.time}, which follows neither batch nor length ({source_line(node)})"
            )
        return size

    emitted: dict[Size, Node | int] = {}

    def number(a: int | float, b: int | float, node: Node) -> Node | int | float:
        if a == b or b != b:
            return b
        if a != int(a):  # a factor like 1 / (2 T)
            return _call(graph, operator.truediv, 1.0, number(round(1 / a), round(1 / b), node))
        size = law(int(a), int(b), node)
        if size not in emitted:
            with graph.inserting_before(anchor):
                emitted[size] = emit_size(graph, size, batch, time)
        return emitted[size]

    for a, b in pairs:
        b.meta["sizes"] = _axis_laws(a, b, law, at_first, at_second)
        if b.op == "call_function":
            with graph.inserting_before(b):
                b.args = _merge(a.args, b.args, lambda x, y, b=b: number(x, y, b))  # type: ignore[misc]
                b.kwargs = _merge(a.kwargs, b.kwargs, lambda x, y, b=b: number(x, y, b))  # type: ignore[misc]
    graph.eliminate_dead_code()
    second.recompile()
    return second


def _pair(first: GraphModule, second: GraphModule) -> list[tuple[Node, Node]]:
    """The nodes of both graphs side by side; CaptureError where they part."""
    ours, theirs = list(first.graph.nodes), list(second.graph.nodes)
    for a, b in zip(ours, theirs, strict=False):
        if (a.op, a.target) != (b.op, b.target):
            raise CaptureError(
                f"{module_path(b)}: the program changes with the sequence length: {a.target} becomes {b.target} "
                f"({source_line(b)})"
            )
        if a.op == "get_attr" and not torch.equal(_attribute(first, a), _attribute(second, b)):
            raise CaptureError(f"{module_path(b)}: the constant {b.target} changes with the sequence length")
    if len(ours) != len(theirs):
        raise CaptureError("the program changes with the sequence length: it has more operators at one length")
    return list(zip(ours, theirs, strict=True))


def _attribute(module: GraphModule, node: Node) -> torch.Tensor:
    value = operator.attrgetter(str(node.target))(module)
    assert isinstance(value, torch.Tensor)
    return value


def _axis_laws(
    a: Node, b: Node, law: Callable[[int, int, Node], Size], at_first: Point, at_second: Point
) -> object:
    """The laws of a node's axes: a tuple for a tensor, a list of tuples for several."""
    mine, theirs = a.meta.get("val"), b.meta.get("val")

    def axes(x: torch.Tensor, y: torch.Tensor) -> tuple[Size, ...]:
        if y.is_complex():  # the bins of a spectrum may follow the length in halves; nothing reads them
            return tuple(solve(m, n, at_first, at_second) or TIME for m, n in zip(x.shape, y.shape, strict=True))
        return tuple(law(m, n, b) for m, n in zip(x.shape, y.shape, strict=True))

    if isinstance(theirs, torch.Tensor) and isinstance(mine, torch.Tensor):
        return axes(mine, theirs)
    if isinstance(theirs, (list, tuple)) and isinstance(mine, (list, tuple)):
        return [axes(p, q) if isinstance(q, torch.Tensor) else None for p, q in zip(mine, theirs, strict=True)]
    return None


def _merge(a: object, b: object, number: Callable[[int | float, int | float], object]) -> object:
    """`b` with every number that differs from its counterpart in `a` replaced by number(a, b)."""
    flat: list[object] = []
    map_aggregate(a, lambda leaf: flat.append(leaf))  # type: ignore[arg-type, func-returns-value]
    leaves = iter(flat)

    def leaf(value: object) -> object:
        other = next(leaves)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and isinstance(other, (int, float)):
            return number(other, value)
        return value

    return map_aggregate(b, leaf)  # type: ignore[arg-type]


def _call(graph: torch.fx.Graph, target: Callable[..., object], *args: object) -> Node:
    return graph.call_function(target, args)  # type: ignore[arg-type]
