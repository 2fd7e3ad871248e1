"""torch.export at one fixed size, cleaned of what only training and checking need."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

import torch
from torch.fx import GraphModule, Node

from lhcompile.artifacts import Signal, module_path, source_line
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
_DROPOUT = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}


def export_at(module: torch.nn.Module, point: Point, signal: Signal) -> GraphModule:
    """Export the module at fixed sizes of its input, without decompositions and without mutation."""
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise CaptureError(f"{path or 'the model'}: is a TorchScript module; torch.export takes the plain one")
    given = signal.constant(point.batch, point.time)
    try:
        with _quiet():
            exported = torch.export.export(module, (given,), strict=False)
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
        elif (same := _same_value(node)) is not None:
            node.replace_all_uses_with(same)
            graph.graph.erase_node(node)
        elif _is_random(node):
            raise CaptureError(
                f"{module_path(node)}: {node.target}: is random: the module has no fixed output ({source_line(node)})"
            )
    graph.graph.eliminate_dead_code()


def _same_value(node: Node) -> Node | None:
    """The earlier node that has the value of this one, None where it is a value of its own."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    if node.target in _SAME_VALUE:
        return source
    if node.target in _DROPOUT:
        return source if node.args[2] is False or node.args[1] == 0 else None
    if node.target in (aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.to.device):
        return source if _alike(source, node) else None
    if node.target == aten.copy.default and isinstance(node.args[1], Node):  # what x[…] = y leaves
        return node.args[1] if _alike(node.args[1], node) else None
    if node.target == aten.slice.Tensor and source.target == aten.slice_scatter.default:  # written, then read again
        return source.args[1] if source.args[2:] == node.args[1:] else None  # type: ignore[return-value]
    return None


def _alike(a: Node, b: Node) -> bool:
    mine, theirs = a.meta["val"], b.meta["val"]
    return mine.dtype == theirs.dtype and mine.shape == theirs.shape


def _is_random(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in node.target.tags:
        return False
    names = [argument.name for argument in node.target._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return all(bool(given.get(switch, switch not in names)) for switch in ("training", "dropout_p"))


@contextmanager
def _quiet() -> Iterator[None]:
    """What fails is told in one line of our own; torch's log of it, and its remarks on itself, are not the user's."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"copyreg|torch\..*")
            yield
    finally:
        log.setLevel(level)
