"""Numbers of bfloat16, which numpy has no type for, as their bits: the upper half of a float32."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnxruntime as ort

__all__ = ["BFLOAT16", "array_of", "from_bits", "to_bits", "value_of"]

Array = np.ndarray[Any, np.dtype[Any]]
BFLOAT16 = 16
"""The type's number in ONNX, by which onnxruntime makes tensors of it."""


def to_bits(numbers: Array) -> Array:
    """float32 to the nearest numbers, of two as near the even one, uint16; NaN stays NaN."""
    bits = np.ascontiguousarray(numbers, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(numbers), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def from_bits(bits: Array) -> Array:
    """uint16 to the numbers they mean, float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def value_of(array: Array, kind: str) -> ort.OrtValue:
    """What a graph on a processor reads as an input of that type: float32 is rounded for "tensor(bfloat16)"."""
    if kind == "tensor(bfloat16)":
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(to_bits(array), BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def array_of(value: ort.OrtValue) -> Array:
    """A copy of what a graph on a processor wrote; numbers of bfloat16 as float32."""
    if value.data_type() != "tensor(bfloat16)":
        return np.array(value.numpy())
    place = ctypes.cast(value.data_ptr(), ctypes.POINTER(ctypes.c_uint16))
    return from_bits(np.ctypeslib.as_array(place, value.shape()))
