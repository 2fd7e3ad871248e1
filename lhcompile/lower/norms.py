"""Norms of a program: layer norm by name, and the root mean square as it is spelled out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

__all__ = ["Norm", "norm_of"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """scale · (x − mean) / √(var + ε) + shift  ("layer"),  scale · x / √(mean(x²) + ε)  ("rms"),  x  ("none")

    scale, shift: names of weights [width]
    """

    x: Node
    kind: str = "none"
    epsilon: float = 0.0
    scale: str | None = None
    shift: str | None = None


def norm_of(module: GraphModule, value: Node) -> Norm | None:
    """The norm over the channels that a value is; None where it is none, or one whose ε lies outside of the root."""
    if value.target == aten.layer_norm.default:
        x, shape, scale, shift, epsilon = (*value.args, None, None, 1e-5)[:5]
        constants = all(isinstance(table, Node) and table.op == "get_attr" for table in (scale, shift) if table)
        if len(shape) != 1 or scale is None or not constants:  # type: ignore[arg-type]
            return None
        return Norm(x, "layer", float(epsilon), _name(scale), _name(shift))  # type: ignore[arg-type]
    return _root_mean_square(module, value)


def _root_mean_square(module: GraphModule, value: Node) -> Norm | None:
    """scale · (x / √(mean(x²) + ε)), or with the reciprocal root"""
    for scale, normed in _orders(value, aten.mul.Tensor):
        if not (isinstance(scale, Node) and scale.op == "get_attr" and _is_vector(module, scale)):
            continue
        for x, mean in _divided(normed):
            epsilon = _epsilon(mean, x)
            if epsilon is not None:
                return Norm(x, "rms", epsilon, _name(scale))
    return None


def _divided(value: Any) -> list[tuple[Node, Node]]:
    """(x, m) where the value is x / √m"""
    if not isinstance(value, Node):
        return []
    pairs: list[tuple[Any, Any]]
    if value.target == aten.div.Tensor:
        pairs, root = [(value.args[0], value.args[1])], aten.sqrt.default
    else:
        pairs, root = _orders(value, aten.mul.Tensor), aten.rsqrt.default
    return [(x, size.args[0]) for x, size in pairs if isinstance(size, Node) and size.target == root]  # type: ignore[misc]


def _epsilon(value: Any, x: Node) -> float | None:
    """ε where the value is mean(x²) + ε over the last axis"""
    if not isinstance(value, Node) or value.target != aten.add.Tensor or not isinstance(value.args[1], float | int):
        return None
    mean = value.args[0]
    if not isinstance(mean, Node) or mean.target != aten.mean.dim or mean.args[1:] not in (([-1], True), ([2], True)):
        return None
    square = mean.args[0]
    if not isinstance(square, Node):
        return None
    squared = square.target == aten.square.default or (square.target == aten.pow.Tensor_Scalar and square.args[1] == 2)
    return float(value.args[1]) if squared and square.args[0] is x else None


def _orders(value: Any, target: Any) -> list[tuple[Any, Any]]:
    """The two arguments of an operator in either order."""
    if not isinstance(value, Node) or value.target != target:
        return []
    first, second = value.args
    return [(first, second), (second, first)]


def _is_vector(module: GraphModule, node: Node) -> bool:
    return getattr(module, str(node.target)).ndim == 1


def _name(node: Any) -> str | None:
    return None if node is None else str(node.target)
