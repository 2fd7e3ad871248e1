"""Einsum of tensors whose sizes are all known, as matrix products, for runtimes that have no Einsum of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from onnxscript import opset20

from lhcompile.errors import LowerError

__all__ = ["einsum"]

Value = Any  # a value of the graph being traced
op: Any = opset20


def einsum(equation: str, tensors: Sequence[Value]) -> Value:
    """`equation` as torch.einsum reads it, without an ellipsis and without a label twice in one term.

    Two tensors at a time: with the axes of each sorted into [common…, own, summed…], the product is one MatMul.
    Raises LowerError for an equation outside of this.
    """
    terms, result = _parsed(equation)
    operands = [
        _Labelled(tensor, {label: int(size) for label, size in zip(term, tensor.shape, strict=True)})
        for tensor, term in zip(tensors, terms, strict=True)
    ]
    while len(operands) > 1:
        first, second, *others = operands
        kept = set(result).union(*(operand.sizes for operand in others))
        first, second = first.summed(kept | second.sizes.keys()), second.summed(kept | first.sizes.keys())
        operands = [_product(first, second, kept), *others]
    return operands[0].summed(set(result)).ordered(result)


def _parsed(equation: str) -> tuple[list[str], str]:
    """The labels of each operand, and of the result: where it is not written, those that occur once, sorted."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        result = "".join(sorted(label for label in set(left) - {","} if left.count(label) == 1))
    if "." in equation or any(len(set(term)) < len(term) for term in [*terms, result]):
        raise LowerError(f"einsum {equation!r} has an ellipsis or a label twice in one term: no form as MatMul")
    return terms, result


@dataclass(frozen=True)
class _Labelled:
    """A value of the graph; the label and size of each of its axes, in their order."""

    value: Value
    sizes: dict[str, int]

    def summed(self, kept: Set[str]) -> _Labelled:
        """The sum over all axes but those kept."""
        gone = [axis for axis, label in enumerate(self.sizes) if label not in kept]
        if not gone:
            return self
        sizes = {label: size for label, size in self.sizes.items() if label in kept}
        return _Labelled(op.ReduceSum(self.value, _ints(*gone), keepdims=0), sizes)

    def ordered(self, labels: str) -> Value:
        """The value with its axes in the order of `labels`."""
        order = [list(self.sizes).index(label) for label in labels]
        return self.value if order == sorted(order) else op.Transpose(self.value, perm=order)


def _product(first: _Labelled, second: _Labelled, kept: Set[str]) -> _Labelled:
    """Σ first · second over the labels that both have and that are not kept.

    [common…, own, summed] × [common…, summed, own]; the labels that one of them has alone are all kept.
    """
    one, other = first.sizes, second.sizes
    if any(one[label] != other[label] for label in one.keys() & other.keys()):
        raise LowerError("an einsum repeats an axis of size one: no form as MatMul")
    both = one | other
    common, summed = ("".join(x for x in one if x in other and (x in kept) == stays) for stays in (True, False))
    left, right = "".join(x for x in one if x not in other), "".join(x for x in other if x not in one)

    def sizes(labels: str) -> list[int]:
        return [both[label] for label in labels]

    rows, inner, columns = (math.prod(sizes(labels)) for labels in (left, summed, right))
    a = op.Reshape(first.ordered(common + left + summed), _ints(*sizes(common), rows, inner))
    b = op.Reshape(second.ordered(common + summed + right), _ints(*sizes(common), inner, columns))
    labels = common + left + right
    y = op.Reshape(op.MatMul(a, b), _ints(*sizes(labels)))
    return _Labelled(y, {label: both[label] for label in labels})


def _ints(*values: int) -> Value:
    return op.Constant(value_ints=list(values))
