"""Pages of mapped checkpoints: they count as memory in use from the first read on, until they are given back."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

from torch import Tensor

__all__ = ["MappedFiles"]

MAPS = Path("/proc/self/maps")


class MappedFiles:
    """Where files are mapped in this process at this moment; nowhere, on systems that do not say."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        if not MAPS.is_file() or not hasattr(mmap, "MADV_DONTNEED"):
            return
        for line in MAPS.read_text().splitlines():
            addresses, _, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0":
                first, _, last = addresses.partition("-")
                self._ranges.append((int(first, 16), int(last, 16)))
        self._madvise = ctypes.CDLL(None).madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def let_go(self, tensor: Tensor) -> None:
        """Gives back the whole pages under a tensor that lies in a mapped file; reading it again reads the file.

        The tensor must not have been written to: what was written would be lost.
        """
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        last = end // mmap.PAGESIZE * mmap.PAGESIZE
        if first < last and any(low <= start and end <= high for low, high in self._ranges):
            self._madvise(first, last - first, mmap.MADV_DONTNEED)
