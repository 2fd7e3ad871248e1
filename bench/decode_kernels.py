"""One step of a convolution with all its past kept, as three Triton kernels: what bounds it is reading the past.

The past lies as [batch, time, channels], so that a step writes one row of it and reads all rows in order; several
sequences share each load of the taps, and where there are few of them the time axis is cut into pieces that are
summed afterwards.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["convolve"]

CHANNELS, TIMES = 64, 32
PROGRAMS = 1056
"""Eight for each of 132 multiprocessors: fewer do not hide the latency of memory."""


@triton.jit
def _enter(  # type: ignore[no-untyped-def]
    projected, before, weight, bias, past, gate, width, stride, taps: tl.constexpr, block: tl.constexpr
):
    """Short convolution of all three parts; the product of two goes into the past, the first part is the gate."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = channel < width
    wide = 3 * width
    for part in tl.static_range(3):
        at = part * width + channel
        last = tl.load(projected + row * wide + at, inside, 0.0)
        newest = tl.load(weight + (taps - 1) * wide + at, inside, 0.0)
        y = tl.load(bias + at, inside, 0.0) + last.to(tl.float32) * newest
        for lag in tl.static_range(taps - 1):
            here = before + (row * (taps - 1) + lag) * wide + at
            old = tl.load(here, inside, 0.0)
            y += old.to(tl.float32) * tl.load(weight + lag * wide + at, inside, 0.0)
            if lag > 0:
                tl.store(here - wide, old, inside)
            if lag == taps - 2:
                tl.store(here, last, inside)
        if part == 0:
            tl.store(gate + row * width + channel, y.to(gate.dtype.element_ty), inside)
        elif part == 1:
            u = y
        else:
            tl.store(past + row * stride + channel, (u * y).to(past.dtype.element_ty), inside)


@triton.autotune(
    [triton.Config({"times": times}, num_warps=warps) for times in (16, 32, 64) for warps in (4, 8)],
    key=["rows", "length", "width", "pieces"],
)
@triton.jit
def _sum(  # type: ignore[no-untyped-def]
    past, taps, parts, batch, length, width, stride, piece, pieces,
    rows: tl.constexpr, channels: tl.constexpr, times: tl.constexpr,
):  # fmt: skip
    """parts[piece, row, channel] = Σ over the piece's times of past · taps"""
    channel = tl.program_id(0) * channels + tl.arange(0, channels)
    row = (tl.program_id(1) * rows + tl.arange(0, rows)).to(tl.int64)
    start = tl.program_id(2) * piece
    stop = tl.minimum(start + piece, length)
    inside = (row[:, None, None] < batch) & (channel[None, None, :] < width)
    total = tl.zeros((rows, times, channels), tl.float32)
    for first in range(start, stop, times):
        time = first + tl.arange(0, times)
        here = time < stop
        h = tl.load(taps + time[:, None] * width + channel[None, :], here[:, None] & (channel[None, :] < width), 0.0)
        at = row[:, None, None] * stride + time[None, :, None].to(tl.int64) * width + channel[None, None, :]
        u = tl.load(past + at, inside & here[None, :, None], 0.0)
        total += u.to(tl.float32) * h.to(tl.float32)[None, :, :]
    y = tl.sum(total, 1)
    at = (tl.program_id(2) * batch + row[:, None]) * width + channel[None, :]
    tl.store(parts + at, y, (row[:, None] < batch) & (channel[None, :] < width))


@triton.jit
def _leave(  # type: ignore[no-untyped-def]
    parts, past, direct, gate, mixed, batch, width, stride, pieces, block: tl.constexpr
):
    """mixed = gate · (Σ parts + direct · u)"""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = channel < width
    u = tl.load(past + row * stride + channel, inside, 0.0).to(tl.float32)
    y = u * tl.load(direct + channel, inside, 0.0)
    for piece in range(pieces):
        y += tl.load(parts + (piece * batch + row) * width + channel, inside, 0.0)
    y *= tl.load(gate + row * width + channel, inside, 0.0).to(tl.float32)
    tl.store(mixed + row * width + channel, y.to(mixed.dtype.element_ty), inside)


def convolve(
    projected: Tensor, before: Tensor, weight: Tensor, bias: Tensor, past: Tensor, taps: Tensor, direct: Tensor
) -> Tensor:
    """A step of the Hyena mixer, [batch, 3 · width] → [batch, width]; the present goes into the last row of the past.

    projected: the output of the input projection; before [batch, k − 1, 3 · width]: those of the last tokens, updated
    weight [k, 3 · width], oldest tap first, bias [3 · width], direct [width]: float32
    past [batch, time, width], dense in its last two axes; taps [time, width], that of the present last
    """
    batch, length, width = past.shape
    stride = past.stride(0)
    present = past[:, -1]
    gate, mixed = (projected.new_empty(batch, width) for _ in range(2))
    block = 256
    over = (batch, triton.cdiv(width, block))
    _enter[over](projected, before, weight, bias, present, gate, width, stride, len(weight), block)
    rows = 4 if batch >= 32 else 1
    programs = triton.cdiv(width, CHANNELS) * triton.cdiv(batch, rows)
    pieces = max(1, min(triton.cdiv(PROGRAMS, programs), triton.cdiv(length, 2 * TIMES)))
    piece = triton.cdiv(length, pieces)
    parts = torch.empty(pieces, batch, width, dtype=torch.float32, device=past.device)
    grid = (triton.cdiv(width, CHANNELS), triton.cdiv(batch, rows), pieces)
    _sum[grid](past, taps, parts, batch, length, width, stride, piece, pieces, rows, CHANNELS)
    _leave[over](parts, present, direct, gate, mixed, batch, width, stride, pieces, block)
    return mixed
