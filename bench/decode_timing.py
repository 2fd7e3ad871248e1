"""Seconds of a step, on a GPU by replay of a CUDA graph, and the rates that bound them."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

__all__ = ["Rates", "captured", "clear", "is_full", "measure_rates", "seconds", "used"]

GROUPS, LEAST = 9, 0.025
NOMINAL = 750e12
"""Operations a second in half precision that an H100 or H200 sustains on matrices, rounded."""


def captured(step: Callable[[], object], warm: int = 3) -> Callable[[], object]:
    """The step as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(run: Callable[[], object], groups: int = GROUPS, least: float = LEAST) -> float:
    """Median over groups of runs that each take `least` seconds or more, of a run's share; after a group to warm up."""
    _group(run, 2)
    once = _group(run, 2)
    count = int(min(64, max(1, np.ceil(least / once))))
    return float(np.median([_group(run, count) for _ in range(groups)]))


def _group(run: Callable[[], object], count: int) -> float:
    _wait()
    started = time.perf_counter()
    for _ in range(count):
        run()
    _wait()
    return (time.perf_counter() - started) / count


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def clear() -> None:
    """Gives back what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def used() -> tuple[int, int]:
    """Bytes of the device's memory in use, whoever holds them, and those that are free."""
    if not torch.cuda.is_available():
        return 0, 1 << 30
    free, total = torch.cuda.mem_get_info()
    return total - free, free


def is_full(error: BaseException | None) -> bool:
    """Whether the device's memory did not suffice, in torch's words or in onnxruntime's, here or in what led here."""
    words = ("out of memory", "failed to allocate memory", "alloc_failed", "memoryallocation")
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or any(word in str(error).lower() for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass(frozen=True)
class Rates:
    """What the device does: bytes a second copied (read and written) and read, operations a second on matrices.

    matrix: at the model's own shapes or 8192 cubed, whichever is more; nominal: a round figure for the same
    """

    copy: float
    read: float
    matrix: float
    nominal: float

    @property
    def bandwidth(self) -> float:
        """The larger of the two rates of memory: floors are not flattered by a slow measurement."""
        return max(self.copy, self.read)

    def floor(self, weights: int, traffic: int, operations: int, speed: float = 1.0, measured: bool = False) -> float:
        """Seconds below which no step is.

        All bytes at the rate of memory, or the operations with the state's bytes after them, for they depend on one
        another, whichever is more.
        weights, traffic: bytes read, and of states read and written; operations: multiplications and additions
        speed: of the weights' type against half precision; measured: operations at the measured rate, not the nominal
        """
        rate = speed * (self.matrix if measured else self.nominal)
        return max((weights + traffic) / self.bandwidth, operations / rate + traffic / self.bandwidth)


def measure_rates(device: torch.device, dtype: torch.dtype, width: int, tiny: bool) -> Rates:
    """Rates of this device, each the best of its candidates, each a median."""
    copy, read = _memory_rates(device, 1 << (22 if tiny else 30))
    clear()
    edge = 256 if tiny else 8192
    sizes = [(edge, edge, edge)] if tiny else [(edge, edge, edge), (4096, 4 * width, width), (4096, width, 4 * width)]
    matrix = 0.0
    for rows, columns, inner in sizes:
        a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((rows, inner), (columns, inner)))
        out = torch.empty(rows, columns, device=device, dtype=dtype)
        matrix = max(matrix, 2.0 * rows * columns * inner / seconds(partial(torch.mm, a, b.t(), out=out), 5))
    nominal = NOMINAL if device.type == "cuda" else matrix
    return Rates(copy, read, matrix, nominal)


def _memory_rates(device: torch.device, count: int) -> tuple[float, float]:
    """Bytes a second (copied, read) of so many numbers in float32."""
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source), 5)
    return copy, source.nbytes / min(seconds(source.sum, 5), seconds(source.amax, 5))
