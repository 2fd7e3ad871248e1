"""Weights in 4 bits, a float16 scale for 32 inputs, for the fused projection that widens them as it multiplies.

An embedding of such a width is stored in the same way, so one that is tied to the head is there once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lhcompile.artifacts import LARGEST_HALF
from lhcompile.errors import LowerError
from lhcompile.quantize.blocks import BLOCK, fused_weight, integer_table, look_up_nibbles
from lhcompile.quantize.rounding import nibbles, round_rows
from lhcompile.quantize.stored import Form, Stored
from lhcompile.quantize.weights import DOMAIN, Use
from lhcompile.quantize.writer import Writer

__all__ = ["int4_products", "int4_table", "whole_blocks"]

Array = NDArray[Any]
_LARGEST = LARGEST_HALF * 7 / 8
"""The largest weight: its scale is a seventh of it, and one more of that fits into float16."""


def whole_blocks(use: Use) -> bool:
    """Whether the inputs of a weight are whole blocks, as LinearInt4 takes them."""
    tensor = use.value.const_value
    assert tensor is not None
    return bool(tensor.shape.numpy()[-1] % BLOCK == 0)


def int4_products() -> Form:
    """LinearInt4 in the place of a fused Linear, whose blocks are whole; products that are not fused: MatMulNBits."""
    other = fused_weight(4)

    def store(use: Use) -> Stored:
        return _store(use) if use.fused else other.store(use)

    def write(writer: Writer, use: Use, stored: Stored) -> None:
        if use.fused:
            writer.project("LinearInt4", stored.tensors)
        else:
            other.step(writer, use, stored)

    return Form(store, write, write)


def int4_table(halves: bool) -> Form:
    """What LinearInt4 reads, looked up; a table of another width is `integer_table`.

    halves: whether entries are numbers of float16, as signals are, by EmbeddingInt4; otherwise they are not rounded
    """
    other = integer_table(4)

    def store(use: Use) -> Stored:
        return _store(use) if whole_blocks(use) else other.store(use)

    def write(writer: Writer, use: Use, stored: Stored) -> None:
        write_whole = _embed if halves else _look_up
        (write_whole if whole_blocks(use) else other.step)(writer, use, stored)

    return Form(store, write, write)


def _store(use: Use) -> Stored:
    """codes4: uint8 [outputs, inputs / 32, 16], code + 8, the even input in the lower half; half_scales: float16
    [outputs, inputs / 32]. Raises LowerError for a weight that is too large."""
    rows = use.rows()
    largest = float(np.abs(rows).max(initial=0))
    if largest > _LARGEST:
        raise LowerError(f"{use.value.name}: int4 cannot hold its largest weight {largest:.3g} with scales of float16")
    codes = round_rows(rows, 4, BLOCK, np.float16)
    blocks = codes.codes.reshape(len(rows), -1, BLOCK).astype(np.int16)
    packed = nibbles(blocks[..., 0::2], blocks[..., 1::2])
    return Stored({"codes4": ir.tensor(packed), "half_scales": ir.tensor(codes.scales)}, codes.values)


def _embed(writer: Writer, use: Use, stored: Stored) -> None:
    codes, scales = (writer.tensor(*item) for item in stored.tensors.items())
    tokens = writer.signal
    if tokens.dtype != ir.DataType.INT64:
        tokens = writer.op("Cast", tokens, to=ir.DataType.INT64.value)
    entries = writer.op("EmbeddingInt4", codes, tokens, scales, domain=DOMAIN)
    entries.shape, entries.type = use.node.outputs[0].shape, ir.TensorType(ir.DataType.FLOAT16)
    writer.become(writer.op("Cast", entries, to=ir.DataType.FLOAT.value))


def _look_up(writer: Writer, use: Use, stored: Stored) -> None:
    codes, scales = (
        writer.op("Gather", writer.tensor(*item), writer.signal, axis=0) for item in stored.tensors.items()
    )
    scales = writer.op("Unsqueeze", writer.op("Cast", scales, to=ir.DataType.FLOAT.value), writer.ints(-1))
    writer.become(look_up_nibbles(writer, codes, scales, stored.tensors["codes4"].shape.numpy()))
