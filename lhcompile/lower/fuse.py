"""Fusion: groups of operators of a streamed program that one kernel computes become one operator.

    before                                           after
    z, c' = lhc.fir(x, w, b, c, 3 · D)               y, c', s' = lhc.hyena_mixer(x, c, s, …, outer=0)
    p, q, v = split(z)
    h, s' = lhc.modal_ssm(q · v, …, s);  y = h · p
    h = layer_norm(x);  h = linear(h, W, b)          y = lhc.linear(x, W, b, r, …, "layer", ε, "gelu_tanh")
    y = r + gelu(h)

Each part of the second group but the product itself may be missing. What does not match stays as it is: exact
convolutions, operators of higher order, outer products, attention. A norm is taken into a projection where projections
alone read it, also several; activations and residuals where nobody else hears what comes before them.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lhcompile.artifacts import Program
from lhcompile.lower import fused_ops  # noqa: F401  (registers lhc::hyena_mixer and lhc::linear)
from lhcompile.lower.norms import Norm, norm_of
from lhcompile.ops import per_channel

__all__ = ["KINDS", "fuse"]

KINDS = frozenset({"HyenaMixer", "Linear"})
aten, lhc = torch.ops.aten, torch.ops.lhc
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default}


def fuse(program: Program, kinds: Collection[str]) -> Program:
    """The same streamed program with fused operators of these kinds; the one that came in is left as it is."""
    if not kinds:
        return program
    module = copy.copy(program.graph)
    module.__dict__["_buffers"] = dict(program.graph._buffers)
    module.graph = copy.deepcopy(program.graph.graph)
    modals, products = (
        [node for node in module.graph.nodes if kind in kinds and node.target == target]
        for kind, target in (("HyenaMixer", lhc.modal_ssm.default), ("Linear", aten.linear.default))
    )
    for modal in modals:
        mixer = _mixer_around(module, modal)
        if mixer is not None:
            _write_mixer(module, mixer)
    for product in products:
        _write_linear(module, product)
    module.graph.eliminate_dead_code()
    module.recompile()
    return Program(graph=module, context=program.context, states=program.states)


# ---- the mixer -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mixer:
    """last: the node whose value the mixer gives; outer: the part of the short convolution that gates it"""

    fir: Node
    bias: Tensor | None
    modal: Node
    outer: int
    last: Node


def _mixer_around(module: GraphModule, modal: Node) -> _Mixer | None:
    """The group that a modal system stands in; None where it is another."""
    drive: Any = modal.args[0]
    heard = _result(modal, 0)
    if not _is_product(drive) or heard is None:
        return None
    last = _only_user(heard)
    if last is None or not _is_product(last) or _only_user(drive) is not modal:
        return None
    gate = last.args[1] if last.args[0] is heard else last.args[0]
    places = [_part(value) for value in (*drive.args, gate)]
    if any(place is None for place in places):
        return None
    sources, indices = zip(*places, strict=True)
    if len(set(sources)) != 1 or sorted(indices) != [0, 1, 2]:
        return None
    found = _short_convolution(module, sources[0])
    if found is None or 3 * _width(drive) != _buffer(module, found[0].args[1]).shape[0]:
        return None
    return _Mixer(*found, modal=modal, outer=indices[2], last=last)


def _short_convolution(module: GraphModule, split: Node) -> tuple[Node, Tensor | None] | None:
    """The depthwise convolution that is split, and its bias, which may be added behind it."""
    value: Any = split.args[0]
    added = None
    if isinstance(value, Node) and value.target == aten.add.Tensor and not value.kwargs and _only_user(value) is split:
        constants = [arg for arg in value.args if isinstance(arg, Node) and arg.op == "get_attr"]
        others = [arg for arg in value.args if isinstance(arg, Node) and arg.op != "get_attr"]
        if len(constants) != 1 or len(others) != 1:
            return None
        added = _buffer(module, constants[0])
        if added.numel() != added.shape[-1]:
            return None
        split, value = value, others[0]
    if not _is_result(value, lhc.fir.default) or _only_user(value) is not split:
        return None
    fir: Any = value.args[0]
    weight = _buffer(module, fir.args[1])
    if weight.shape[1] != 1 or weight.shape[0] != fir.args[4] or (added is not None and len(added.flatten()) == 1):
        return None
    bias = None if fir.args[2] is None else _buffer(module, fir.args[2])
    if added is not None:
        bias = added.flatten() if bias is None else bias + added.flatten()
    return fir, bias


def _write_mixer(module: GraphModule, mixer: _Mixer) -> None:
    graph, fir, modal = module.graph, mixer.fir, mixer.modal
    own, other, readout, direct = (_buffer(module, table) for table in modal.args[1:5])
    kept = None if modal.args[5] is None else _buffer(module, modal.args[5])
    channels, inner = _width(mixer.last), modal.args[7]
    assert isinstance(inner, int)
    wide = [per_channel(table, channels, inner).contiguous() for table in (own, other, readout, direct)]
    tables: dict[str, Tensor | None] = {
        "conv_weight": _buffer(module, fir.args[1])[:, 0].T.contiguous(),
        "conv_bias": mixer.bias,
        "own": wide[0],
        "other": wide[1] if wide[1].any() else None,
        "readout": wide[2],
        "direct": wide[3],
        "index": None if kept is None else _places(kept, own.shape, channels, inner),
    }
    with graph.inserting_before(mixer.last):
        held = [_held(module, f"{modal.name}_{name}", table) for name, table in tables.items()]
        arguments = (fir.args[0], fir.args[3], modal.args[6], *held, mixer.outer)
        fused = graph.call_function(lhc.hyena_mixer.default, arguments)
        results = [graph.call_function(operator.getitem, (fused, index)) for index in range(3)]
    results[0].meta["sizes"] = mixer.last.meta["sizes"]
    for old, new in zip((mixer.last, _result(fir, 1), _result(modal, 1)), results, strict=True):
        if old is not None:
            old.replace_all_uses_with(new)


def _places(kept: Tensor, table: torch.Size, channels: int, inner: int) -> Tensor:
    """int32 [order, channels]: where each channel's states lie in [outer · states · inner], −1 where it has none."""
    order, filters = table
    places = torch.full((order * filters,), -1, dtype=torch.int64)
    places[kept] = torch.arange(len(kept))
    channel = torch.arange(channels)
    block, lane = channel // (filters * inner), channel % inner
    within = places.reshape(order, filters)[:, channel // inner % filters]
    return torch.where(within < 0, -1, (block * len(kept) + within) * inner + lane).int()


def _held(module: GraphModule, name: str, table: Tensor | None) -> Node | None:
    """A node that reads the table, which becomes a buffer."""
    if table is None:
        return None
    module.register_buffer(name, table)
    return module.graph.get_attr(name)


# ---- the projection ------------------------------------------------------------------------------------------------


def _write_linear(module: GraphModule, product: Node) -> None:
    x, weight, bias = (*product.args, None)[:3]
    sizes = product.meta["sizes"]
    constant = _is_constant(weight) and (bias is None or _is_constant(bias))
    if not isinstance(x, Node) or not constant or len(sizes) != 3:
        return
    norm = norm_of(module, x)
    if norm is None or not all(user.target == aten.linear.default for user in x.users):
        norm = Norm(x)
    last, activation = product, "none"
    gelu = _only_user(last)
    if gelu is not None and gelu.target == aten.gelu.default:
        last, activation = gelu, "gelu_tanh" if gelu.kwargs.get("approximate") == "tanh" else "gelu"
    residual = _residual(last)
    if residual is not None:
        last = _only_user(last) or last
    with module.graph.inserting_before(last):
        scale, shift = (module.graph.get_attr(name) if name else None for name in (norm.scale, norm.shift))
        arguments = (norm.x, weight, bias, residual, scale, shift, norm.kind, norm.epsilon, activation)
        fused = module.graph.call_function(lhc.linear.default, arguments)
    fused.meta["sizes"] = sizes
    last.replace_all_uses_with(fused)


def _residual(value: Node) -> Node | None:
    """What the only reader of a value adds to it, of the same shape."""
    add = _only_user(value)
    if add is None or add.target != aten.add.Tensor or add.kwargs:
        return None
    others = [arg for arg in add.args if arg is not value]
    if len(others) != 1 or not isinstance(others[0], Node) or others[0].op == "get_attr":
        return None
    return others[0] if others[0].meta.get("sizes") == value.meta["sizes"] else None


# ---- small pieces --------------------------------------------------------------------------------------------------


def _is_product(value: Any) -> bool:
    """A product of two signals."""
    if not isinstance(value, Node) or value.target != aten.mul.Tensor:
        return False
    return all(isinstance(x, Node) for x in value.args)


def _part(value: Any) -> tuple[Node, int] | None:
    """(split, which of its three equal parts along the channels a value is)"""
    if not isinstance(value, Node) or value.target is not operator.getitem:
        return None
    split, index = value.args
    if not isinstance(split, Node) or split.target not in _SPLITS:
        return None
    axis = split.args[2] if len(split.args) > 2 else 0
    parts = split.meta["sizes"]
    thirds = len(parts) == 3 and all(part == parts[0] for part in parts)
    return (split, index) if thirds and axis in (2, -1) else None  # type: ignore[return-value]


def _is_result(value: Any, target: Any) -> bool:
    """The first result of an operator with several."""
    if not isinstance(value, Node) or value.target is not operator.getitem or value.args[1] != 0:
        return False
    source: Any = value.args[0]
    return bool(source.target == target)


def _result(node: Node, index: int) -> Node | None:
    return next(_results(node, index), None)


def _results(node: Node, index: int) -> Iterator[Node]:
    return (user for user in node.users if user.target is operator.getitem and user.args[1] == index)


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_constant(value: Any) -> bool:
    return isinstance(value, Node) and value.op == "get_attr"


def _width(value: Any) -> int:
    return int(value.meta["sizes"][-1].offset)


def _buffer(module: GraphModule, node: Any) -> Tensor:
    return getattr(module, str(node.target))
