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
from lhcompile.quantize.weights import DOMAIN, Use
from lhcompile.quantize.writer import Writer

__all__ = ["fp8_products"]

Array = NDArray[Any]
LARGEST = 448.0
"""The largest number of float8 e4m3."""
_TINIEST = 1e-30
"""Rows below it are zero."""
_SCALE = 6
"""LinearFp8's input for the scales."""


def fp8_products() -> Form:
    """LinearFp8 in the place of a fused Linear; products that are not fused run in fp16."""
    other = half_products("fp16")

    def store(use: Use) -> Stored:
        return _store(use) if use.fused else other.store(use)

    def write(writer: Writer, use: Use, stored: Stored) -> None:
        (_fuse if use.fused else other.step)(writer, use, stored)

    return Form(store, write, write)


def _store(use: Use) -> Stored:
    """fp8: FLOAT8E4M3FN [outputs, inputs]; fp8_scales: float32 [outputs], a row's largest number / 448"""
    rows = use.rows()
    scales = (np.maximum(np.abs(rows).max(1), _TINIEST) / LARGEST).astype(np.float32)
    codes = (rows / scales[:, None]).astype(ml_dtypes.float8_e4m3fn)
    tensors: dict[str, ir.TensorProtocol] = {"fp8": ir.tensor(codes), "fp8_scales": ir.tensor(scales)}
    return Stored(tensors, partial(_values, codes, scales))


def _values(codes: Array, scales: Array) -> Array:
    return codes.astype(np.float32) * scales[:, None]


def _fuse(writer: Writer, use: Use, stored: Stored) -> None:
    codes, scales = (writer.tensor(*item) for item in stored.tensors.items())
    signal, _, *others = use.node.inputs
    others += [None] * (_SCALE - 2 - len(others))
    attributes = {name: attribute.value for name, attribute in use.node.attributes.items()}
    writer.become(writer.op("LinearFp8", signal, codes, *others, scales, domain=DOMAIN, **attributes))
