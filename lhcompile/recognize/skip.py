"""The direct term beside a long convolution joins its first tap.

    before                                     after
    y = lhc.long_conv(u, taps, None, R)        y = lhc.long_conv(u, taps + D·δ₀, None, R)
    z = y + u · D                              z = y
"""

from __future__ import annotations

import math
import operator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lhcompile.sizes import Point

__all__ = ["absorb_skips"]

aten = torch.ops.aten
_LAYOUT = {aten.reshape.default, aten.permute.default}


def absorb_skips(module: GraphModule) -> bool:
    """Apply the rewrite wherever D has one value per filter; True when something changed."""
    changed = False
    for node in list(module.graph.nodes):
        if node.target == aten.add.Tensor and not node.kwargs:
            changed |= any(_absorb(module, node, y, other) for y, other in (node.args, node.args[::-1]))
    if changed:
        module.graph.eliminate_dead_code()
        module.recompile()
    return changed


def _absorb(module: GraphModule, add: Node, y: object, other: object) -> bool:
    if not (isinstance(y, Node) and isinstance(other, Node)):
        return False
    chain = _chain(y)
    if chain is None or len(y.users) != 1 or other.target != aten.mul.Tensor:
        return False
    conv, after = chain
    before = _source_chain(conv.args[0])
    for signal, scale in (other.args, other.args[::-1]):
        if not (isinstance(scale, Node) and scale.op == "get_attr" and isinstance(signal, Node)):
            continue
        if signal not in before or not _returns(signal, [*before[signal], *after]):
            continue
        direct = _per_filter(module, conv, signal, scale)
        if direct is None:
            continue
        taps = getattr(module, str(conv.args[1].target)).clone()  # type: ignore[union-attr]
        taps[:, 0] += direct.to(taps.dtype)
        name = f"{conv.args[1].target}_with_skip"  # type: ignore[union-attr]
        module.register_buffer(name, taps)
        with module.graph.inserting_before(conv):
            attribute = module.graph.get_attr(name)
        attribute.meta["sizes"] = conv.args[1].meta["sizes"]  # type: ignore[union-attr]
        conv.args = (conv.args[0], attribute, *conv.args[2:])
        add.replace_all_uses_with(y)
        module.graph.erase_node(add)
        return True
    return False


def _chain(y: Node) -> tuple[Node, list[Node]] | None:
    """The convolution y is a layout of, and the layout's steps."""
    steps: list[Node] = []
    while y.target in _LAYOUT and len(y.users) == 1:
        steps.insert(0, y)
        y = y.args[0]  # type: ignore[assignment]
    if y.target is not operator.getitem or len(y.users) != 1:
        return None
    conv = y.args[0]
    if isinstance(conv, Node) and conv.target == torch.ops.lhc.long_conv.default:
        return conv, steps
    return None


def _source_chain(u: object) -> dict[Node, list[Node]]:
    """Every tensor the convolution's input is a layout of, with the steps between."""
    found: dict[Node, list[Node]] = {}
    steps: list[Node] = []
    while isinstance(u, Node):
        found[u] = list(steps)
        if u.target not in _LAYOUT:
            break
        steps.insert(0, u)
        u = u.args[0]
    return found


def _returns(signal: Node, steps: list[Node]) -> bool:
    """Whether the layout steps together put every entry of the signal back in its place."""
    index = torch.arange(math.prod(_shape(signal))).reshape(_shape(signal))
    moved = index
    for step in steps:
        permutes = step.target == aten.permute.default
        moved = moved.permute(step.args[1]) if permutes else moved.reshape(_shape(step))  # type: ignore[arg-type]
    return torch.equal(moved, index)


def _shape(node: Node) -> list[int]:
    return [size.at(Point(2, 3)) for size in node.meta["sizes"]]


def _per_filter(module: GraphModule, conv: Node, signal: Node, scale: Node) -> Tensor | None:
    """The scale as one number per filter, [filters]; None when channels of one filter differ."""
    sizes = signal.meta["sizes"]
    value: Tensor = getattr(module, str(scale.target))
    value = value.reshape((1,) * (len(sizes) - value.ndim) + value.shape)
    axes = [i for i, size in enumerate(sizes) if size.fixed]
    if value.ndim != len(sizes) or any(value.shape[i] != 1 for i in range(value.ndim) if i not in axes):
        return None
    batch = next(i for i, size in enumerate(sizes) if size.has_batch)
    shape = [sizes[batch].offset, *(sizes[i].offset for i in axes)]
    value = value.permute([batch, *axes, *(i for i in range(value.ndim) if i != batch and i not in axes)])
    channels = value.reshape(value.shape[: len(shape)]).expand(shape).reshape(-1)
    taps: Tensor = getattr(module, str(conv.args[1].target))  # type: ignore[union-attr]
    inner = conv.args[3]
    assert isinstance(inner, int)
    grouped = channels.reshape(-1, taps.shape[0], inner)
    direct = grouped[0, :, 0]
    return direct if torch.equal(grouped, direct[None, :, None].expand_as(grouped)) else None
