"""Rounding of weights to 4 or 8 bits, a scale for every block of a row, in least squares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Codes", "nibbles", "round_rows"]

Array = NDArray[Any]
TRIED = 8
"""Scales tried for a block, from the one that clips nothing down to `CLIPPED` of it."""
CLIPPED = 0.7
SLICE = 1 << 20
"""Numbers rounded at a time."""
_TINIEST_HALF = np.float32(2**-24)
"""The least number of float16 above zero."""
TINIEST = 1e-30
"""Blocks below this are zero: the scale of a smaller one would not be a normal float32."""


@dataclass(frozen=True)
class Codes:
    """A matrix as ŵ = scale · code.

    codes: int8 [rows, columns], in −2^(bits−1) … 2^(bits−1) − 1; scales: float32 or float16 [rows, blocks], of either
    sign; block: columns that share a scale, the last block of a row may have fewer
    """

    codes: Array
    scales: Array
    block: int
    bits: int

    def values(self) -> Array:
        """ŵ, float32 [rows, columns]; exactly what DequantizeLinear gives."""
        columns = self.codes.shape[1]
        values = self.codes.astype(np.float32)
        for first in range(0, columns, self.block):
            values[:, first : first + self.block] *= self.scales[:, first // self.block, None]
        return values


def round_rows(rows: Array, bits: int, block: int | None, scale: type[np.floating[Any]] = np.float32) -> Codes:
    """The matrix [rows, columns] in codes of `bits`; block None: one scale a row; scale: the type of scales.

    For given codes c the best scale of a block w is s = ⟨w, c⟩ / ⟨c, c⟩, and leaves |w|² − ⟨w, c⟩² / ⟨c, c⟩. Codes are
    taken from `TRIED` scales, the best of them rounded once more with its own s. The first that is tried, of size
    max|w| / (2^(bits−1) − 1), clips nothing, and no later step adds to the error:

        |w − ŵ|² ≤ block · (max|w| / (2^bits − 2))²

    Scales of float16 are rounded before codes are found once more. That moves a number by 2^(bits−1) · 2⁻¹¹ of a step
    at most, where scales are not below float16's normal numbers, 6e-5.
    """
    count, columns = rows.shape
    block = columns if block is None else min(block, columns)
    blocks = -(-columns // block)
    codes = np.empty((count, columns), np.int8)
    scales = np.empty((count, blocks), scale)
    step = max(1, SLICE // columns)
    for first in range(0, count, step):
        part = np.zeros((min(step, count - first), blocks * block), np.float32)
        part[:, :columns] = rows[first : first + step]
        part = part.reshape(len(part), blocks, block)
        some, found = _round(part, 1 << (bits - 1))
        if scale is np.float16:
            found = _halves(found)
            some = _codes(part, found[..., None], 1 << (bits - 1)).astype(np.int8)
        scales[first : first + step] = found
        codes[first : first + step] = some.reshape(len(part), -1)[:, :columns]
    return Codes(codes, scales, block, bits)


def nibbles(low: Array, high: Array) -> Array:
    """Two 4-bit codes a byte, uint8 of the same shape; each is stored as code + 8."""
    return ((low + 8) | ((high + 8) << 4)).astype(np.uint8)


def _round(w: Array, top: int) -> tuple[Array, Array]:
    """w: [n, blocks, block] → codes, the same shape, and scales [n, blocks]; codes from −top to top − 1"""
    where = np.abs(w).argmax(-1, keepdims=True)
    largest = np.take_along_axis(w, where, -1)
    largest = np.where(np.abs(largest) < TINIEST, np.float32(TINIEST), largest)
    widest = -largest / np.float32(top - 1)  # negative codes reach further: the largest number gets one
    best = np.zeros_like(widest)
    gain = np.full(widest.shape, -1, np.float32)
    for factor in np.linspace(1, CLIPPED, TRIED, dtype=np.float32):
        scale, heard = _refit(w, _codes(w, widest * factor, top), largest)
        best = np.where(heard > gain, scale, best)
        gain = np.maximum(heard, gain)
    codes = _codes(w, best, top)
    scale, _ = _refit(w, codes, largest)
    return codes.astype(np.int8), scale[..., 0]


def _halves(scales: Array) -> Array:
    """The nearest numbers of float16 but zero, float32."""
    halves = scales.astype(np.float16).astype(np.float32)
    return np.where(halves == 0, np.copysign(_TINIEST_HALF, scales), halves)


def _codes(w: Array, scale: Array, top: int) -> Array:
    return np.clip(np.rint(w / scale), -top, top - 1)


def _refit(w: Array, codes: Array, largest: Array) -> tuple[Array, Array]:
    """The best scale for given codes, and how much of |w|² / max|w|² they then hold, both [n, blocks, 1]."""
    size = np.einsum("nbk,nbk->nb", codes, codes)[..., None]
    common = np.einsum("nbk,nbk->nb", w / largest, codes)[..., None]
    size = np.where(size == 0, np.float32(1), size)
    scale = np.where(common == 0, np.float32(1), common / size * largest)
    return scale, common * common / size
