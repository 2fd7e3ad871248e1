"""Weights in float8 e4m3, a scale an output, for the fused projection that multiplies them with signals in 8 bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lhcompile.quantize.halves import half_products
from lhcompile.quantize.stored import Form, Stored
from lhcompile.quantize.weights import Use
from lhcompile.quantize.writer import Writer

__all__ = ["fp8_products"]

Array = NDArray[Any]
LARGEST = 448.0
"""The largest number of float8 e4m3."""
_TINIEST = 1e-30
"""Rows below it are zero."""
_MULTIPLE = 16
"""Of inputs and of outputs: cuBLASLt multiplies no other matrices in 8 bits."""


def fp8_products() -> Form:
    """LinearFp8 in the place of a fused Linear; products that are not fused, or of other sizes than multiples of 16
    (many a vocabulary), run in fp16."""
    other = half_products("fp16")

    def store(use: Use) -> Stored:
        return _store(use) if _takes(use) else other.store(use)

    def write(writer: Writer, use: Use, stored: Stored) -> None:
        if _takes(use):
            writer.project("LinearFp8", stored.tensors)
        else:
            other.step(writer, use, stored)

    return Form(store, write, write)


def _takes(use: Use) -> bool:
    return use.fused and all(size % _MULTIPLE == 0 for size in use.rows().shape)


def _store(use: Use) -> Stored:
    """fp8: FLOAT8E4M3FN [outputs, inputs]; fp8_scales: float32 [outputs], a row's largest number / 448"""
    rows = use.rows()
    scales = (np.maximum(np.abs(rows).max(1), _TINIEST) / LARGEST).astype(np.float32)
    codes = (rows / scales[:, None]).astype(ml_dtypes.float8_e4m3fn)
    tensors: dict[str, ir.TensorProtocol] = {"fp8": ir.tensor(codes), "fp8_scales": ir.tensor(scales)}
    return Stored(tensors, partial(_values, codes, scales))


def _values(codes: Array, scales: Array) -> Array:
    return codes.astype(np.float32) * scales[:, None]
