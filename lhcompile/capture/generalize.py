"""Two exports of one module at different sizes become one program of its sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lhcompile.artifacts import map_leaves, module_path, source_line
from lhcompile.errors import CaptureError
from lhcompile.extremes import extremes
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

    def refused(what: str, a: float, b: float, node: Node) -> CaptureError:
        return CaptureError(
            f"{module_path(node)}: {node.target}: a {what} is {a} at {at_first.batch} × {at_first.time} and {b} at "
            f"{at_second.batch} × {at_second.time}, which follows neither batch nor length ({source_line(node)})"
        )

    def law(a: int, b: int, node: Node) -> Size:
        size = solve(a, b, at_first, at_second)
        if size is None:
            raise refused("size", a, b, node)
        return size

    partner = dict(pairs)
    emitted: dict[Size, Node | int] = {}

    def number(a: int | float, b: int | float, node: Node) -> Node | int | float:
        if a == b or b != b:
            return b
        if not (float(a).is_integer() and float(b).is_integer()):  # a factor like 1 / (2 T)
            below = round(1 / a) if a else 0, round(1 / b) if b else 0
            if 0 in below or (1 / below[0], 1 / below[1]) != (a, b):
                raise refused("number", a, b, node)
            return _call(graph, operator.truediv, 1.0, number(*below, node))
        size = law(int(a), int(b), node)
        if size not in emitted:
            with graph.inserting_before(anchor):
                emitted[size] = emit_size(graph, size, batch, time)
        return emitted[size]

    def argument(a: object, b: object, node: Node) -> object:
        if isinstance(a, (int, float)) and isinstance(b, (int, float)) and not isinstance(b, bool):
            return number(a, b, node)
        if (partner.get(a) is not b) if isinstance(a, Node) else a != b:
            raise CaptureError(
                f"{module_path(node)}: the program changes with the sequence length: {node.target} reads {a} at one "
                f"length and {b} at another ({source_line(node)})"
            )
        return b

    for a, b in pairs:
        b.meta["sizes"] = _axis_laws(a, b, law, at_first, at_second)
        if b.op == "call_function":
            with graph.inserting_before(b):
                merge = partial(_merge, choose=partial(argument, node=b))
                b.args, b.kwargs = merge(a.args, b.args), merge(a.kwargs, b.kwargs)
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
        if a.op == "get_attr":
            _same_constant(_attribute(first, a), _attribute(second, b), b)
    if len(ours) != len(theirs):
        raise CaptureError("the program changes with the sequence length: it has more operators at one length")
    return list(zip(ours, theirs, strict=True))


def _same_constant(a: torch.Tensor, b: torch.Tensor, node: Node) -> None:
    ends = extremes(b)
    if bool(ends.isnan().any()) or (isinstance(b, torch.nn.Parameter) and not bool(ends.isfinite().all())):
        raise CaptureError(f"the weight {node.target} holds NaN or infinite numbers")
    if not torch.equal(a, b):
        raise CaptureError(f"the constant {node.target} changes with the sequence length")


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


def _merge(a: object, b: object, choose: Callable[[object, object], object]) -> Any:
    """`b` with every leaf replaced by choose(its counterpart in `a`, it)."""
    ours: list[object] = []
    theirs: list[object] = []
    map_leaves(a, ours.append)
    map_leaves(b, theirs.append)
    if len(ours) != len(theirs):
        choose(f"{len(ours)} values", f"{len(theirs)} values")
    leaves = iter(ours)
    return map_leaves(b, lambda value: choose(next(leaves), value))


def _call(graph: torch.fx.Graph, target: Callable[..., object], *args: object) -> Node:
    return graph.call_function(target, args)  # type: ignore[arg-type]
