"""Causal attention, fused or written out.

A rule returns the new value, or None when the operator has nothing to do with attention. With q and k read by time:

    q · kᵀ                    Scores            matmul, bmm or einsum with two time axes in its result
    · number                  Scores(scale)
    + mask, masked_fill …     Scores(keys)      the mask is constant and hides the later positions, nothing else
    softmax over the keys     Scores(weights)
    · v                       lhc.attention
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lhcompile.recognize.contraction import Contraction, attended, contraction_of, factor, fused_of
from lhcompile.recognize.signals import Rule, Signals, bind, rank_of
from lhcompile.recognize.values import Plain, Scores, Value, refuse, tensor_sizes
from lhcompile.sizes import TIME

__all__ = ["RULES"]

aten = torch.ops.aten
HIDDEN = -1e4
"""A number this small or smaller, added to a score, leaves no weight in single precision."""
Mask = Callable[[int], Tensor]
"""length of the sequence → what is added to the scores"""


# ---- the two products ----------------------------------------------------------------------------------------------


def _product(signals: Signals, node: Node) -> Value | None:
    """q · kᵀ of two signals, or the weights times v."""
    found = contraction_of(node)
    if found is None or any(signals.is_constant(arg) for arg in found.operands):
        return None
    tracked = [i for i, arg in enumerate(found.operands) if isinstance(signals.values[arg], Scores)]
    if len(tracked) == 2:
        raise refuse(node, "multiplies scores of attention with one another")
    if tracked:
        return _weighed(signals, node, found, tracked[0])
    laws = node.meta["sizes"]
    return _compared(signals, node, found) if sum(law.has_time for law in laws) == 2 else None


def _compared(signals: Signals, node: Node, found: Contraction) -> Scores:
    pairs = zip(found.operands, found.axes, strict=True)
    left, right = (factor(signals, node, arg, axes, found.sizes) for arg, axes in pairs)
    result = set("".join(found.result))
    times = [found.sizes[letter] for letter in result if found.sizes[letter].has_time]
    summed = (set(left.letters) | set(right.letters)) - result
    if summed != set(left.letters) & set(right.letters) - result or len(summed) != 1 or times != [TIME, TIME]:
        raise refuse(node, "compares positions in a way that is not attention: it is no sum over one axis of features")
    return Scores(left, right, tuple(found.result))


def _weighed(signals: Signals, node: Node, found: Contraction, place: int) -> Plain:
    """found.operands[place] are the weights."""
    weights = signals.values[found.operands[place]]
    assert isinstance(weights, Scores)
    if not weights.weights:
        raise refuse(node, "weighs positions by scores without a softmax, which is not understood")
    return attended(signals, node, weights, _as_scores_are(found, place, weights), 1 - place)


def _as_scores_are(found: Contraction, place: int, scores: Scores) -> Contraction:
    """A product with scores as operand `place`, in the scores' own letters."""
    known = {letter: scores.size(letter) for letter in "".join(scores.axes)}
    return found.renamed(1 - place, dict(zip(found.axes[place], scores.axes, strict=True)), known)


def _fused(signals: Signals, node: Node) -> Value:
    args = bind(node)
    q, k, v = (args[name] for name in ("query", "key", "value"))
    if any(signals.is_constant(arg) for arg in (q, k, v)):
        raise refuse(node, "its queries, keys or values do not depend on the tokens")
    if args["dropout_p"]:
        raise refuse(node, "drops weights at random")
    compared, weighed = fused_of(node, q, k, v, bool(args["enable_gqa"]))
    scores = _compared(signals, node, compared)
    width = tensor_sizes(scores.left.node)[-1].offset
    scale = width**-0.5 if args["scale"] is None else float(signals.number(args["scale"]))
    mask = args["attn_mask"]
    if args["is_causal"]:
        scores = replace(scores, keys=scores.times[1])
    elif mask is not None:
        scores = _masked(signals, node, scores, _mask_of(signals, node, mask, _additive))
    if scores.keys != scores.times[1]:
        raise refuse(node, "looks ahead: attention without a causal mask")
    scores = replace(scores, scale=scale, weights=True)
    return attended(signals, node, scores, weighed, 1)


# ---- between them: scale, mask, softmax ----------------------------------------------------------------------------


def _scores(signals: Signals, node: Node, name: str = "self") -> Scores | None:
    """The scores an operator is applied to, before the softmax; refused after it."""
    arg = bind(node)[name]
    value = None if signals.is_constant(arg) else signals.values[arg]
    if not isinstance(value, Scores):
        return None
    if value.weights:
        raise refuse(node, "changes the weights of attention after the softmax")
    return value


def _scaled(divide: bool) -> Rule:
    def rule(signals: Signals, node: Node) -> Value | None:
        left, right = node.args[:2]
        name = "self" if not signals.is_constant(left) and isinstance(signals.values[left], Scores) else "other"  # type: ignore[index]
        scores, other = _scores(signals, node, name), right if name == "self" else left
        if scores is None:
            return None
        if (divide and name == "other") or not signals.is_constant(other):
            raise refuse(node, "multiplies scores of attention by something that depends on the tokens")
        numbers = [torch.as_tensor(signals.number(other, time), dtype=torch.float64) for time in _lengths(signals)]
        if any(number.numel() != 1 for number in numbers) or not torch.equal(*numbers):
            raise refuse(node, "multiplies scores of attention by something else than one number")
        factor = float(numbers[0])
        return replace(scores, scale=scores.scale / factor if divide else scores.scale * factor)

    return rule


def _added(sign: int) -> Rule:
    def rule(signals: Signals, node: Node) -> Value | None:
        args = bind(node)
        swapped = sign > 0 and not signals.is_constant(args["other"]) and _scores(signals, node, "other") is not None
        scores = _scores(signals, node, "other" if swapped else "self")
        if scores is None:
            return None
        mask = args["self"] if swapped else args["other"]
        scale = sign * (1 if swapped else args["alpha"])
        return _masked(signals, node, scores, _mask_of(signals, node, mask, lambda x: scale * x))

    return rule


def _filled(signals: Signals, node: Node) -> Value | None:
    scores = _scores(signals, node)
    if scores is None:
        return None
    args = bind(node)
    fill = _number(signals, node, args["value"])
    return _masked(signals, node, scores, _mask_of(signals, node, args["mask"], lambda x: torch.where(x, fill, 0.0)))


def _where(signals: Signals, node: Node) -> Value | None:
    """where(past, scores, small), or the other way round"""
    args = bind(node)
    for name, other, past in (("self", "other", True), ("other", "self", False)):
        scores = _scores(signals, node, name) if isinstance(args[name], Node) else None
        if scores is not None:
            fill = _number(signals, node, args[other])

            def added(x: Tensor, fill: float = fill, past: bool = past) -> Tensor:
                return torch.where(x, 0.0, fill) if past else torch.where(x, fill, 0.0)

            return _masked(signals, node, scores, _mask_of(signals, node, args["condition"], added))
    return None


def _number(signals: Signals, node: Node, arg: Any) -> float:
    if not signals.is_constant(arg) or torch.as_tensor(signals.number(arg)).numel() != 1:
        raise refuse(node, "fills hidden scores with something else than one number")
    return float(signals.number(arg))


def _additive(mask: Tensor) -> Tensor:
    """A mask as the fused operator takes it, true or 0 where positions are heard."""
    return torch.where(mask, 0.0, float("-inf")) if mask.dtype == torch.bool else mask


def _mask_of(signals: Signals, node: Node, arg: Any, added: Callable[[Tensor], Tensor]) -> Mask:
    if not signals.is_constant(arg):
        raise refuse(node, "its mask depends on the tokens: only a causal mask is understood")
    return lambda time: added(torch.as_tensor(signals.number(arg, time)))


def _masked(signals: Signals, node: Node, scores: Scores, mask: Mask) -> Scores:
    """The scores with a mask that must be causal, which says which of the time axes counts the keys."""
    places = [next(i for i, group in enumerate(scores.axes) if letter in group) for letter in scores.times]
    reasons = []
    for keys, (i, j) in zip(scores.times[::-1], (places, places[::-1]), strict=True):
        reason = next(filter(None, (_not_causal(mask, time, len(scores.axes), i, j) for time in _lengths(signals))), "")
        if not reason and scores.keys in ("", keys):
            return replace(scores, keys=keys)
        reasons.append(reason)
    raise refuse(node, reasons[0] or "hides the earlier positions: it looks ahead")


def _lengths(signals: Signals) -> tuple[int, int]:
    return signals.context, signals.context // 2


def _not_causal(mask: Mask, time: int, rank: int, queries: int, keys: int) -> str | None:
    """Why a mask at this length is not the causal one, with queries and keys along those axes; None where it is."""
    value = mask(time)
    if value.ndim > rank:
        return "its mask has more axes than the scores"
    value = value.reshape((1,) * (rank - value.ndim) + value.shape).movedim((queries, keys), (-2, -1)).flatten(0, -3)
    if value.shape[-2:] != (time, time):
        return "adds a bias to the scores that is not a causal mask"
    later = torch.ones(time, time, dtype=torch.bool).triu(1)
    if not bool((value[:, later] <= HIDDEN).all()):
        return "looks ahead: its mask does not hide every later position"
    past = value[:, ~later]
    if bool((past <= HIDDEN).any()):
        return "its mask hides earlier positions, like a window: only attention to all of them is understood"
    return "adds a bias to the scores that is not a causal mask" if bool(past.any()) else None


def _softmax(signals: Signals, node: Node) -> Value | None:
    scores = _scores(signals, node)
    if scores is None:
        return None
    if not scores.keys:
        raise refuse(node, "looks ahead: attention without a causal mask")
    if scores.axes[bind(node)["dim"] % rank_of(node)] != scores.keys:
        raise refuse(node, "takes the softmax of attention over another axis than the positions looked back at")
    return replace(scores, weights=True)


# ---- casts and layouts ---------------------------------------------------------------------------------------------


def _same(signals: Signals, node: Node) -> Value | None:
    """A cast of scores is the scores: attention is computed in float32."""
    value = signals.values[node.args[0]]  # type: ignore[index]
    return value if isinstance(value, Scores) else None


def _permuted(signals: Signals, node: Node) -> Value | None:
    args = bind(node)
    value = signals.values[args["self"]]
    if not isinstance(value, Scores):
        return None
    order = list(range(len(value.axes)))
    if node.target == aten.permute.default:
        order = [dim % len(order) for dim in args["dims"]]
    else:
        first, second = args.get("dim0", -2) % len(order), args.get("dim1", -1) % len(order)
        order[first], order[second] = order[second], order[first]
    return replace(value, axes=tuple(value.axes[i] for i in order))


def _viewed(signals: Signals, node: Node) -> Value | None:
    """Batch and heads merged or apart, [batch · heads, time, time] ↔ [batch, heads, time, time]."""
    value = signals.values[node.args[0]]  # type: ignore[index]
    if not isinstance(value, Scores):
        return None
    left, groups = list("".join(value.axes)), []
    for law in node.meta["sizes"]:
        group, power, count, times = "", 0, 1, 0
        while (power, count, times) != (law.batch, 1 if law.has_time else law.offset, law.scale) and left:
            size = value.size(left[0])
            power, times = power + size.batch, times + size.scale
            count *= 1 if size.has_time else size.offset
            group += left.pop(0)
        groups.append(group)
    if left or len(set("".join(groups))) != len("".join(value.axes)):
        raise refuse(node, "lays scores of attention out in a way that is not understood")
    return replace(value, axes=tuple(groups))


RULES: dict[object, Rule] = {
    aten.scaled_dot_product_attention.default: _fused,
    aten.matmul.default: _product,
    aten.bmm.default: _product,
    aten.einsum.default: _product,
    aten.mul.Tensor: _scaled(divide=False),
    aten.div.Tensor: _scaled(divide=True),
    aten.add.Tensor: _added(1),
    aten.sub.Tensor: _added(-1),
    aten.masked_fill.Scalar: _filled,
    aten.masked_fill.Tensor: _filled,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.where.ScalarSelf: _where,
    aten.softmax.int: _softmax,
    aten._softmax.default: _softmax,
    aten.to.dtype: _same,
    aten._to_copy.default: _same,
    aten.permute.default: _permuted,
    aten.transpose.int: _permuted,
    aten.mT.default: _permuted,
    aten.view.default: _viewed,
    aten.reshape.default: _viewed,
    aten._unsafe_view.default: _viewed,
}
