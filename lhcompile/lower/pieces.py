"""Small pieces of a graph that is being traced: constants, and the layouts of channels that share filters.

`lead` are the axes of the channels as a system sees them, [outer, filters, inner] (`lhcompile.ops`), without those of
length one besides the filters.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxscript import opset20

__all__ = ["END", "Value", "aligned", "constant", "grouped", "ints", "joined", "lead_of", "op"]

END = 2**63 - 1
Value = Any  # a value of the graph being traced
op: Any = opset20


def constant(value: torch.Tensor | NDArray[Any]) -> Value:
    """A constant of the graph, float64 as float32."""
    array = value.numpy() if isinstance(value, torch.Tensor) else value
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    return op.Constant(value=ir.tensor(np.ascontiguousarray(array).reshape(array.shape)))


def ints(*values: int) -> Value:
    """int64 [values]"""
    return op.Constant(value_ints=list(values))


def lead_of(u: Value, filters: int, inner: int) -> list[int]:
    """The lead of a signal [batch, time, channels]."""
    outer = int(u.shape[2]) // (filters * inner)
    return [*([outer] if outer > 1 else []), filters, *([inner] if inner > 1 else [])]


def grouped(x: Value, lead: list[int]) -> Value:
    """[batch, rows, channels] → [batch, rows, lead…]"""
    return x if len(lead) == 1 else op.Reshape(x, ints(0, 0, *lead))


def joined(x: Value, lead: list[int]) -> Value:
    """The inverse of `grouped`."""
    return x if len(lead) == 1 else op.Reshape(x, ints(0, 0, math.prod(lead)))


def aligned(table: torch.Tensor, lead: list[int], inner: int) -> torch.Tensor:
    """[…, filters] → broadcast against [batch, rows, lead…]"""
    shape = [*table.shape[:-1], *([1] if len(lead) > 1 + (inner > 1) else []), table.shape[-1]]
    return table.reshape(*shape, *([1] if inner > 1 else []))
