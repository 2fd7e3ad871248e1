"""Reads the tensors of a torch zip checkpoint whose pickle also names foreign classes.

Training frameworks store hyper-parameters beside the weights as objects of their own classes. Here every
name the pickle mentions becomes an inert stand-in of ours: nothing is imported and nothing of the file's
choosing is called. Tensors become references to bytes of the archive and are read only when asked for.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["StandIn", "TensorReference", "read_inert", "tensors_of"]

STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


@dataclass(frozen=True)
class StorageReference:
    record: str
    dtype: torch.dtype


@dataclass(frozen=True)
class TensorReference:
    storage: StorageReference
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class StandIn:
    """Takes the place of any object the pickle builds; keeps what it is given as data, and swallows the rest.

    state: the attributes the pickle sets; entries: what it puts into a mapping
    """

    state: Any
    entries: dict[Any, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> StandIn:
        made = super().__new__(cls)
        made.state, made.entries = None, {}
        return made

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> StandIn:
        return self

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, item: Any) -> None:
        pass

    def extend(self, items: Any) -> None:
        pass

    def add(self, item: Any) -> None:
        pass


class RebuildTensor:
    """Called where torch would build a tensor. An object without attributes, so a pickle cannot set any."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorReference:
        if not isinstance(storage, StorageReference):
            raise pickle.UnpicklingError("a tensor without a storage")
        return TensorReference(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


class RebuildParameter:
    """Called where torch would build a parameter; see RebuildTensor."""

    __slots__ = ()

    def __call__(self, data: Any, *rest: Any) -> Any:
        return data


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): RebuildTensor(),
            ("torch._utils", "_rebuild_parameter"): RebuildParameter(),
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) in known:
            return known[module, name]
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        return type(f"{module}.{name}", (StandIn,), {})

    def persistent_load(self, pid: Any) -> StorageReference:
        if not (isinstance(pid, tuple) and len(pid) == 5 and isinstance(pid[1], torch.dtype)):
            raise pickle.UnpicklingError(f"unknown storage {pid!r}")
        return StorageReference(str(pid[2]), pid[1])


def read_inert(path: Path) -> Any:
    """The object of the file's pickle, tensors as TensorReference, foreign objects as StandIn.

    Raises pickle.UnpicklingError, KeyError, ValueError, EOFError or zipfile.BadZipFile on a damaged file.
    """
    with zipfile.ZipFile(path) as archive:
        return _InertUnpickler(io.BytesIO(archive.read(_prefix(archive) + "data.pkl"))).load()


def tensors_of(path: Path, references: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the tensors that the values refer to; other values pass through. Sharing is kept."""
    storages: dict[StorageReference, Tensor] = {}
    found: dict[str, Any] = {}
    with zipfile.ZipFile(path) as archive:
        prefix = _prefix(archive)
        if prefix + "byteorder" in archive.namelist() and archive.read(prefix + "byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        for key, value in references.items():
            if isinstance(value, TensorReference):
                storage = value.storage
                if storage not in storages:
                    data = bytearray(archive.read(f"{prefix}data/{storage.record}"))
                    empty = torch.empty(0, dtype=storage.dtype)
                    storages[storage] = torch.frombuffer(data, dtype=storage.dtype) if data else empty
                value = torch.as_strided(storages[storage], value.size, value.stride, value.offset)
            found[key] = value
    return found


def _prefix(archive: zipfile.ZipFile) -> str:
    for name in archive.namelist():
        if name.endswith("/data.pkl") and name.count("/") == 1:
            return name.removesuffix("data.pkl")
    raise KeyError("data.pkl")
