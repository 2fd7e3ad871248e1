"""Weights in 8 bits, a scale an output, and in 4 bits, a scale for 32 inputs, in the forms measured fastest.

Standard operators: DequantizeLinear before MatMul, which onnxruntime turns into one kernel as it loads. Fused: that
kernel by name, com.microsoft MatMulNBits. Entries of an embedding are looked up in codes and scaled afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lhcompile.quantize.rounding import Codes, nibbles, round_rows
from lhcompile.quantize.stored import Form, Stored
from lhcompile.quantize.weights import Use
from lhcompile.quantize.writer import Writer

__all__ = [
    "BLOCK",
    "fixed_signals",
    "fused_weight",
    "integer_products",
    "integer_table",
    "linear_weight",
    "look_up_nibbles",
]

Array = NDArray[Any]
BLOCK, SMALLER = 32, 16
"""Inputs that share a scale of 4-bit codes, and of 8-bit ones in the fused kernel: the first that divides their number,
because engines other than onnxruntime refuse a last block of fewer."""
_NARROW = 7
"""Bits of weights that are multiplied as bytes. CPUs without VNNI add two products in 16 bits, where 2 · 255 · 64 fits
and 2 · 255 · 128 does not; taking the bit from the signal instead changes the logits more (docs/decisions/013)."""
_LEVELS = 127
"""Codes of a signal on either side of zero."""
_SMALLEST = 1e-30
"""A row of a signal below it is taken for zero."""
_SIGNED_BYTES = 4
"""accuracy_level of MatMulNBits: signals in 8 bits, a scale a block, products of bytes."""


def linear_weight(bits: int) -> Form:
    """MatMul(x, DequantizeLinear(codes, scales)) for codes [inputs, outputs] of 4 or 8 bits.

    onnxruntime makes one kernel of both where one operator alone reads the codes and the scales, so each has its own.
    """
    return Form(partial(_store_linear, bits), _dequantize, _dequantize)


def integer_products() -> Form:
    """Codes of 7 bits in 8: the step graph as in `linear_weight`, and prefill with products of bytes.

    A row of the signal is rounded to 8 bits by its own largest number, so that no token depends on what others are in
    the call: x ≈ a (q − 128), y = a · s ∘ MatMulInteger(q, codes).
    """
    return Form(partial(_store_linear, _NARROW), _dequantize, _multiply)


def fixed_signals(low: float, high: float) -> Form:
    """Codes of 7 bits, and signals in 8 by one scale and zero point for all tokens, from what calibration reached:
    MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear(codes, scales)), a product of bytes in onnxruntime."""
    least, largest = min(low, 0.0), max(high, _SMALLEST)
    unit = (largest - least) / 255
    zero = round(-least / unit)
    return Form(partial(_store_linear, _NARROW), *[partial(_multiply_fixed, unit, zero)] * 2)


def fused_weight(bits: int) -> Form:
    """com.microsoft MatMulNBits, codes [outputs, blocks, bytes]."""
    return Form(partial(_store_fused, bits), _fuse, _fuse)


def integer_table(bits: int) -> Form:
    """Mul(codes of the entry, scales of the entry); two codes a byte are told apart by a table of all bytes."""
    return Form(partial(_store_table, bits), partial(_look_up, bits), partial(_look_up, bits))


# ---- what is stored ------------------------------------------------------------------------------------------------


def _store_linear(bits: int, use: Use) -> Stored:
    """codes: INT8 or INT4 [inputs, outputs]; scales: float32 [outputs], or [blocks, outputs] where there are several"""
    rows = use.rows()
    codes = round_rows(rows, bits, _block(rows) if bits == 4 else None)
    columns = np.ascontiguousarray(codes.codes.T)
    scales = np.ascontiguousarray(codes.scales.T)
    role, tensor = ("int4", _packed(columns)) if bits == 4 else ("int8", ir.tensor(columns))
    return Stored({role: tensor, "scales": ir.tensor(scales[0] if len(scales) == 1 else scales)}, codes.values)


def _packed(codes: Array) -> ir.PackedTensor:
    """INT4, two codes a byte in the order of memory, the first in the lower half; an odd last one stands alone."""
    flat = np.append(codes.ravel(), np.zeros(codes.size % 2, np.int8)) & 15
    return ir.PackedTensor((flat[0::2] | (flat[1::2] << 4)).astype(np.uint8), ir.DataType.INT4, shape=codes.shape)


def _store_fused(bits: int, use: Use) -> Stored:
    """blocks: uint8 [outputs, blocks, block · bits / 8], codes + 2^(bits−1), filled up with zeros; scales: float32
    [outputs, blocks]"""
    rows = use.rows()
    codes = round_rows(rows, bits, _block(rows))
    blocks = _blocks(codes, _block(rows))
    packed = nibbles(blocks[..., 0::2], blocks[..., 1::2]) if bits == 4 else (blocks + 128).astype(np.uint8)
    return Stored({f"blocks{bits}": ir.tensor(packed), "block_scales": ir.tensor(codes.scales)}, codes.values)


def _store_table(bits: int, use: Use) -> Stored:
    """8 bits: INT8 [entries, width] and scales [entries, 1]. 4 bits: bytes [entries, blocks, block / 2] and scales
    [entries, blocks, 1]"""
    rows = use.rows()
    codes = round_rows(rows, bits, _block(rows) if bits == 4 else None)
    if bits == 8:
        return Stored({"entries": ir.tensor(codes.codes), "entry_scales": ir.tensor(codes.scales)}, codes.values)
    blocks = _blocks(codes, codes.block + codes.block % 2)
    packed = nibbles(blocks[..., 0::2], blocks[..., 1::2])
    return Stored({"bytes": ir.tensor(packed), "byte_scales": ir.tensor(codes.scales[..., None])}, codes.values)


def _block(rows: Array) -> int:
    """The block for so many columns."""
    columns = rows.shape[1]
    return SMALLER if columns % BLOCK and columns % SMALLER == 0 else BLOCK


def _blocks(codes: Codes, block: int) -> Array:
    """int16 [rows, blocks, block], zeros behind the last code of a row"""
    rows, columns = codes.codes.shape
    blocks = np.zeros((rows, codes.scales.shape[1] * block), np.int16)
    blocks[:, :columns] = codes.codes
    return blocks.reshape(rows, -1, block)


# ---- how it is read ------------------------------------------------------------------------------------------------


def _dequantize(writer: Writer, use: Use, stored: Stored) -> None:
    codes, scales = (writer.tensor(*item, apart=True) for item in stored.tensors.items())
    blocks: dict[str, Any] = {"axis": 1}
    if len(stored.tensors["scales"].shape) == 2:
        blocks = {"axis": 0, "block_size": _block(use.rows())}
    writer.read(writer.op("DequantizeLinear", codes, scales, **blocks))


def _multiply(writer: Writer, use: Use, stored: Stored) -> None:
    codes, scales = (writer.tensor(*item) for item in stored.tensors.items())
    x, op = writer.signal, writer.op
    largest = op("ReduceMax", op("Abs", x), writer.ints(-1), keepdims=1)
    unit = op("Mul", op("Max", largest, writer.number(_SMALLEST)), writer.number(1 / _LEVELS))
    zero = writer.constant(np.array(_LEVELS + 1, np.uint8))
    bytes_ = op("QuantizeLinear", op("Div", x, unit), writer.number(1), zero)
    total = op("Cast", op("MatMulInteger", bytes_, codes, zero), to=ir.DataType.FLOAT.value)
    writer.become(op("Mul", op("Mul", total, scales), unit))


def _multiply_fixed(unit: float, zero: int, writer: Writer, use: Use, stored: Stored) -> None:
    ends = writer.number(unit), writer.constant(np.array(zero, np.uint8))
    signal = writer.op("DequantizeLinear", writer.op("QuantizeLinear", writer.signal, *ends), *ends)
    codes, scales = (writer.tensor(*item) for item in stored.tensors.items())
    writer.become(writer.op("MatMul", signal, writer.op("DequantizeLinear", codes, scales, axis=1)))


def _fuse(writer: Writer, use: Use, stored: Stored) -> None:
    ((role, codes), scales), rows = stored.tensors.items(), use.rows()
    value = writer.fused(
        "MatMulNBits",
        writer.signal,
        writer.tensor(role, codes),
        writer.tensor(*scales),
        K=rows.shape[1],
        N=codes.shape.numpy()[0],
        bits=int(role.removeprefix("blocks")),
        block_size=_block(rows),
        accuracy_level=_SIGNED_BYTES,
    )
    writer.become(value)


def _look_up(bits: int, writer: Writer, use: Use, stored: Stored) -> None:
    width = use.rows().shape[1]
    tensors = (writer.tensor(*item) for item in stored.tensors.items())
    codes, scales = (writer.op("Gather", tensor, writer.signal, axis=0) for tensor in tensors)
    if bits == 8:
        codes = writer.op("Cast", codes, to=ir.DataType.FLOAT.value)
        writer.become(writer.op("Mul", codes, scales))
        return
    shape = stored.tensors["bytes"].shape.numpy()
    entries = look_up_nibbles(writer, codes, scales, shape)
    if width < shape[1] * shape[2] * 2:
        entries = writer.op("Slice", entries, writer.ints(0), writer.ints(width), writer.ints(2))
    writer.become(entries)


def look_up_nibbles(writer: Writer, codes: ir.Value, scales: ir.Value, shape: Sequence[int]) -> ir.Value:
    """Entries [batch, time, blocks · 2 · half] of a table of bytes, whose shape is [entries, blocks, half], from what
    was gathered of it: codes [batch, time, blocks, half] and scales [batch, time, blocks, 1]"""
    _, blocks, half = shape
    every = np.arange(256)
    table = writer.tensor("nibbles", ir.tensor(np.stack([every & 15, every >> 4], 1).astype(np.float32) - 8))
    codes = writer.op("Gather", table, writer.op("Cast", codes, to=ir.DataType.INT32.value), axis=0)
    codes = writer.op("Reshape", codes, writer.ints(0, 0, blocks, 2 * half))
    return writer.op("Reshape", writer.op("Mul", codes, scales), writer.ints(0, 0, blocks * 2 * half))
