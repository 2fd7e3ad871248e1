"""Graphs as files; weights too large for them in one file beside both, each distinct tensor once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir
import torch

__all__ = ["WEIGHTS_NAME", "WeightPlace", "share_tensors", "weight_places", "write_graphs"]

WEIGHTS_NAME = "weights.bin"
MOST_INLINE = 64 << 20
"""Bytes of weights up to which a graph holds them itself: one file is handy while it is small, and both hold them all.
A protobuf ends at 2 GiB."""
SMALL = 1024
"""Bytes below which a tensor stays in the graph all the same."""
PAGE = 4096
"""Offsets are multiples of it, so that a runtime can map a tensor where it lies."""


def write_graphs(models: dict[str, ir.Model], directory: Path, shared: bool = False) -> list[Path]:
    """Writes each model under its name, through to the device; returns the paths of all files written.

    Where they are to be `shared`, or the weights of one model exceed `MOST_INLINE`, those of all go to weights.bin as
    ONNX external data, and models that hold the same tensor refer to the same place. One tensor at a time is copied;
    afterwards the models refer to the file as well and hold the weights no longer.
    Raises OSError when a file exists or cannot be written.
    """
    paths = [directory / name for name in models]
    if not shared and max(map(_weight_bytes, models.values())) <= MOST_INLINE:
        for path, model in zip(paths, models.values(), strict=True):
            _write(path, model)
        return paths
    beside = directory / WEIGHTS_NAME
    with _created(beside) as stream:
        weights = _Weights(stream)
        for path, model in zip(paths, models.values(), strict=True):
            weights.take(model)
            _write(path, model)
    return [*paths, beside]


@dataclass(frozen=True)
class WeightPlace:
    """One tensor in weights.bin: its first byte, the name of its dtype, its shape."""

    offset: int
    dtype: str
    shape: tuple[int, ...]


class _Weights:
    """weights.bin while it is written: where each tensor begins, by the hash of its bytes.

    Graphs that share a tensor object have its bytes made and hashed once.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._offsets: dict[bytes, int] = {}
        self._taken: dict[int, tuple[ir.TensorProtocol, int, int]] = {}  # a tensor lives as long as its id is kept

    def take(self, model: ir.Model) -> None:
        """Writes the model's weights; its initializers refer to the file from then on."""
        for value, tensor in _initializers(model):
            if tensor.nbytes >= SMALL:
                value.const_value = self._external(value, tensor)

    def _external(self, value: ir.Value, tensor: ir.TensorProtocol) -> ir.ExternalTensor:
        if id(tensor) not in self._taken:
            self._taken[id(tensor)] = tensor, *self._place(tensor.tobytes())
        _, offset, length = self._taken[id(tensor)]
        assert value.name is not None
        shape = ir.Shape(tensor.shape.numpy())
        return ir.ExternalTensor(WEIGHTS_NAME, offset, length, tensor.dtype, shape=shape, name=value.name)

    def _place(self, data: bytes) -> tuple[int, int]:
        """Offset and length of bytes that are in the file, from now on if they were not."""
        key = hashlib.sha256(data).digest()
        if key not in self._offsets:
            self._stream.write(b"\0" * (-self._stream.tell() % PAGE))
            self._offsets[key] = self._stream.tell()
            self._stream.write(data)
        return self._offsets[key], len(data)


def share_tensors(one: ir.Model, other: ir.Model) -> None:
    """Weights of the other model that lie where one of the first model's does become the same object: both are views of
    the module's memory."""
    known = {view: tensor for _, tensor in _initializers(one) if (view := _view(tensor)) is not None}
    for value, tensor in _initializers(other):
        view = _view(tensor)
        if view in known:
            value.const_value = known[view]


def _view(tensor: ir.TensorProtocol) -> tuple[Any, ...] | None:
    """The memory that a tensor of torch's is a view of, and how."""
    raw = tensor.raw
    if not isinstance(raw, torch.Tensor) or not raw.numel():
        return None
    return raw.data_ptr(), raw.dtype, raw.shape, raw.stride()


def weight_places(model: ir.Model) -> dict[str, WeightPlace]:
    """Where the initializers of a model that was written lie outside of it, by name; of a dtype that numpy has."""
    return {
        str(value.name): WeightPlace(tensor.offset or 0, tensor.dtype.numpy().name, tuple(tensor.shape.numpy()))
        for value, tensor in _initializers(model)
        if isinstance(tensor, ir.ExternalTensor) and tensor.dtype.numpy().isbuiltin == 1
    }


def _initializers(model: ir.Model) -> Iterator[tuple[ir.Value, ir.TensorProtocol]]:
    """Every initializer with its tensor, those of graphs inside nodes as well."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value, value.const_value


def _weight_bytes(model: ir.Model) -> int:
    return sum(tensor.nbytes for _, tensor in _initializers(model))


def _write(path: Path, model: ir.Model) -> None:
    with _created(path) as stream:
        stream.write(ir.to_proto(model).SerializeToString())


@contextmanager
def _created(path: Path) -> Iterator[BinaryIO]:
    """A new file, on the device at the end of the block."""
    with open(path, "xb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
