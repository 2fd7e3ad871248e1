"""Weights in 16 bits. Either they become float32 where they are read, or products run in 16 bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lhcompile.errors import LowerError
from lhcompile.quantize.stored import Form, Stored
from lhcompile.quantize.weights import Use
from lhcompile.quantize.writer import Writer

__all__ = ["half_products", "half_table", "half_weight"]

Array = NDArray[Any]
_TYPES: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def half_weight(precision: str) -> Form:
    """MatMul(x, Cast(w)): float32 products. onnxruntime casts once, as it loads."""
    return Form(partial(_store, precision), _cast, _cast)


def half_products(precision: str) -> Form:
    """For a GPU. A fused Linear reads the weight as it is (`quantize.signals`). Any other product runs in 16 bits,
    Cast(MatMul(Cast(x), w)), in float32 for bf16, which not every runtime multiplies."""
    write = _multiply if precision == "fp16" else _widen
    return Form(partial(_store, precision), write, write)


def half_table(precision: str) -> Form:
    """Cast(Gather(w, tokens)): the entries of this call become float32, never the table."""
    return Form(partial(_store, precision), _look_up, _look_up)


def _store(precision: str, use: Use) -> Stored:
    """Rounded to nearest, ties to even. Raises LowerError for a weight that 16 bits cannot hold."""
    weight = use.laid_out(use.rows())
    with np.errstate(over="ignore"):
        half = np.ascontiguousarray(weight).astype(_TYPES[precision])
    if not np.isfinite(half).all():
        largest = float(np.abs(weight).max())
        raise LowerError(f"{use.value.name}: {precision} cannot hold its largest weight {largest:.3g}; bf16 can")
    rows = use.laid_out(half)
    return Stored({precision: ir.tensor(half)}, lambda: rows.astype(np.float32))


def _half(writer: Writer, stored: Stored) -> ir.Value:
    ((role, tensor),) = stored.tensors.items()
    return writer.tensor(role, tensor)


def _cast(writer: Writer, use: Use, stored: Stored) -> None:
    writer.read(writer.op("Cast", _half(writer, stored), to=ir.DataType.FLOAT.value))


def _multiply(writer: Writer, use: Use, stored: Stored) -> None:
    weight = _half(writer, stored)
    if use.fused:
        writer.read(weight)
        return
    assert weight.dtype is not None
    x = writer.op("Cast", writer.signal, to=weight.dtype.value)
    writer.become(writer.op("Cast", writer.op("MatMul", x, weight), to=ir.DataType.FLOAT.value))


def _widen(writer: Writer, use: Use, stored: Stored) -> None:
    if use.fused:
        writer.read(_half(writer, stored))
    else:
        _cast(writer, use, stored)


def _look_up(writer: Writer, use: Use, stored: Stored) -> None:
    table, entry = _half(writer, stored), use.node.outputs[0]
    entries = writer.op("Gather", table, writer.signal, axis=0)
    entries.shape, entries.type = entry.shape, table.type
    writer.become(writer.op("Cast", entries, to=ir.DataType.FLOAT.value))
