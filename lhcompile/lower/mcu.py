"""The lowering for C on a microcontroller: one row, one token, every shape static.

The C that emx-onnx-cgen makes of the step graph has no loops that a size at run time bounds, and with its option
`--large-temp-threshold 0` nothing in it allocates. It has no general Einsum: products of tensors are written as MatMul
(docs/decisions/011).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lhcompile.lower import portable
from lhcompile.lower.einsum import einsum

__all__ = ["BATCH", "Prefill", "Step"]

BATCH: int | None = 1
Prefill = None


class Step(portable.Step):
    """One token of one row."""

    def table(self) -> dict[Any, Callable[..., Any]]:
        return super().table() | {torch.ops.aten.einsum.default: _einsum}


def _einsum(equation: str, tensors: Sequence[Any], path: Any = None) -> Any:
    return einsum(equation, tensors)
