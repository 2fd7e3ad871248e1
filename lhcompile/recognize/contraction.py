"""Products of two tensors with a letter for every axis, and the attention that two of them make.

A *group* is the letters of one axis of the old graph: one, several where batch and heads are merged, none where its
size is 1 and the other operand is broadcast along it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_letters, ascii_lowercase
from typing import cast

import torch
from torch.fx import Node

from lhcompile.recognize.signals import Signals
from lhcompile.recognize.values import Factor, Plain, Scores, refuse
from lhcompile.sizes import BATCH, TIME, Size

__all__ = ["Contraction", "attended", "contraction_of", "factor", "fused_of"]

aten = torch.ops.aten
ONE = Size(0, 0, 1)


@dataclass(frozen=True)
class Contraction:
    """Σ over all letters that the result lacks of the product of two operands.

    axes: the group of each axis of each operand; result: those of the result; sizes: the law of each letter
    """

    operands: tuple[Node, Node]
    axes: tuple[list[str], list[str]]
    result: list[str]
    sizes: Mapping[str, Size]

    def renamed(self, which: int, names: Mapping[str, str], known: Mapping[str, Size]) -> Contraction:
        """The same with the groups of one operand, and of the result, called by other names.

        names: group → its letters, whose laws are `known`; all other groups get letters that are not among these
        """
        free: Iterator[str] = (letter for letter in ascii_letters if letter not in known)
        called, sizes = {**names, "": ""}, dict(known)
        for group in self.axes[which]:
            if group not in called:
                called[group] = "".join(next(free) for _ in group)
                sizes.update(zip(called[group], (self.sizes[letter] for letter in group), strict=True))
        axes = [[called.get(group, group) for group in groups] for groups in self.axes]
        return Contraction(self.operands, (axes[0], axes[1]), [called[group] for group in self.result], sizes)


def contraction_of(node: Node) -> Contraction | None:
    """The letters of a matmul, bmm or einsum of two tensors; None for one of any other form."""
    if node.target == aten.einsum.default:
        return _einsum(node)
    left, right = cast(tuple[Node, Node], node.args[:2])
    ranks = [len(arg.meta["sizes"]) for arg in (left, right)]
    if min(ranks) < 2:
        return None
    lead = ascii_lowercase[: max(ranks) - 2]
    first, second = (lead[len(lead) - (rank - 2) :] for rank in ranks)
    return _spelled((left, right), (first + "xy", second + "yz"), lead + "xz")


def _einsum(node: Node) -> Contraction | None:
    equation, operands = str(node.args[0]).replace(" ", ""), cast(list[Node], node.args[1])
    inputs, arrow, result = equation.partition("->")
    parts = inputs.split(",")
    plain = arrow and "." not in equation and all(len(set(part)) == len(part) for part in (*parts, result))
    if not plain or len(parts) != 2 or set(result) - set(inputs):
        return None
    names = str.maketrans({letter: ascii_lowercase[i] for i, letter in enumerate(sorted(set("".join(parts))))})
    left, right = operands
    return _spelled((left, right), (parts[0].translate(names), parts[1].translate(names)), result.translate(names))


def fused_of(node: Node, q: Node, k: Node, v: Node, grouped: bool) -> tuple[Contraction, Contraction]:
    """The two products in a scaled_dot_product_attention: q · kᵀ, and its result (in place of q) · v.

    grouped: the axis before time counts heads, and keys and values have a divisor of the queries' number
    """
    ranks = {len(arg.meta["sizes"]) for arg in (q, k, v)}
    if len(ranks) != 1:
        raise refuse(node, "its queries, keys and values differ in their number of axes")
    lead = ascii_lowercase[: ranks.pop() - 2]
    compared = _spelled((q, k), (lead + "xy", lead + "zy"), lead + "xz")
    weighed = _spelled((k, v), (lead + "zy", lead + "zw"), lead + "yw")
    first, second = compared.axes[0], compared.axes[1]
    values, sizes, told = weighed.axes[1], dict(compared.sizes), list(compared.result)
    sizes |= {letter: weighed.sizes[letter] for letter in "".join(values)}
    heads = [arg.meta["sizes"][-3] for arg in (q, k, v)]
    if grouped and heads[0] != heads[1] and ONE not in heads:
        groups, shared = heads[1].offset, heads[0].offset // heads[1].offset
        if heads[1] != heads[2] or not all(size.fixed for size in heads) or groups * shared != heads[0].offset:
            counts = f"{heads[1]} heads of keys and {heads[2]} of values"
            raise refuse(node, f"its {heads[0]} query heads do not share {counts}")
        letter = lead[-1]
        sizes |= {letter: heads[1], "R": Size(0, 0, shared)}
        first[-3] = told[-3] = letter + "R"
    scored = Contraction((q, k), (first, second), told, sizes)
    return scored, Contraction((q, v), (told, values), [*told[:-1], values[-1]], sizes)


def _spelled(operands: tuple[Node, Node], letters: tuple[str, str], result: str) -> Contraction:
    """The groups of operands whose axes have these letters: an axis where batch and heads are merged gets two."""
    sizes: dict[str, Size] = {}
    axes: tuple[list[str], list[str]] = ([], [])
    for arg, own, groups in zip(operands, letters, axes, strict=True):
        for law, letter in zip(arg.meta["sizes"], own, strict=True):
            merged = law.has_batch and law.offset > 1 and not law.has_time
            group = "" if law == ONE and letter in result else letter + letter.upper() * merged
            groups.append(group)
            sizes |= dict(zip(group, (BATCH, Size(0, 0, law.offset)) if merged else (law,), strict=False))
    named = {group[0]: group for group in (*axes[0], *axes[1]) if group}
    return Contraction(operands, axes, [named.get(letter, "") for letter in result], sizes)


def factor(signals: Signals, node: Node, arg: Node, axes: Sequence[str], sizes: Mapping[str, Size]) -> Factor:
    """The finished tensor of an operand, one axis a letter."""
    source = signals.settle(arg, node, cut=True).node
    letters = "".join(axes)
    return Factor(signals.emit.reshape(source, tuple(sizes[letter] for letter in letters)), letters)


def attended(signals: Signals, node: Node, scores: Scores, found: Contraction, which: int) -> Plain:
    """lhc.attention in place of the product of weights with `found.operands[which]`, laid out as the product is."""
    emit = signals.emit
    v = factor(signals, node, found.operands[which], found.axes[which], found.sizes)
    q, k = (scores.left, scores.right) if scores.keys in scores.right.letters else (scores.right, scores.left)
    inside = "".join(scores.axes)
    (t,) = (letter for letter in scores.times if letter != scores.keys)
    (b,) = (letter for letter in inside if scores.size(letter).has_batch)
    heads = [letter for letter in inside if letter not in (b, t, scores.keys)]
    features = [letter for letter in v.letters if letter not in inside]
    result = "".join(found.result)
    whole = set(result) == {b, t, *heads, *features} and len(result) == len(heads) + 3 and len(features) == 1
    if not whole or scores.keys not in v.letters or b not in v.letters or b not in k.letters:
        raise refuse(node, "weighs its values in a way that is not attention")
    if set(heads) - set(q.letters) or t in v.letters:
        raise refuse(node, "compares each head of queries with several heads of keys")
    owned = [letter for letter in heads if letter in k.letters or letter in v.letters]
    order = [*owned, *(letter for letter in heads if letter not in owned)]
    (width,) = set(q.letters) & set(k.letters) - set(inside)
    count = math.prod(scores.size(letter).offset for letter in order)
    operands = (
        _laid_out(signals, q, scores, b + t, order, width),
        _laid_out(signals, k, scores, b + scores.keys, owned, width),
        _laid_out(signals, v, scores, b + scores.keys, owned, features[0]),
    )
    every = emit.call(torch.ops.lhc.attention.default, (*operands, None, None, None, scores.scale), None)
    every_size = v.size(features[0])
    y = emit.call(operator.getitem, (every, 0), (BATCH, TIME, Size(0, 0, count), every_size))
    y = emit.reshape(y, (BATCH, TIME, *(scores.size(letter) for letter in order), every_size))
    letters = [b, t, *order, features[0]]
    y = emit.permute(y, [letters.index(letter) for letter in result])
    y = emit.reshape(y, tuple(_joint([found.sizes[letter] for letter in group]) for group in found.result))
    return Plain(emit.cast(y, node.meta["val"].dtype))


def _laid_out(signals: Signals, x: Factor, scores: Scores, first: str, heads: Sequence[str], last: str) -> Node:
    """x as [batch, time, heads, width], repeated over heads it does not tell apart."""
    emit, letters = signals.emit, x.letters
    node = emit.cast(x.node, torch.float32)
    missing = [letter for letter in heads if letter not in letters]
    if missing:
        own = [x.size(letter) for letter in letters]
        node = emit.reshape(node, (*own, *[ONE] * len(missing)))
        node = emit.expand(node, (*own, *(scores.size(letter) for letter in missing)))
        letters += "".join(missing)
    node = emit.permute(node, [letters.index(letter) for letter in (*first, *heads, last)])
    count = math.prod(scores.size(letter).offset for letter in heads)
    return emit.reshape(node, (BATCH, TIME, Size(0, 0, count), x.size(last)))


def _joint(sizes: Sequence[Size]) -> Size:
    """The law of merged axes, of which no two count time."""
    if any(size.has_time for size in sizes):
        (time,) = sizes
        return time
    return Size(sum(size.batch for size in sizes), 0, math.prod(size.offset for size in sizes))
