"""A session's memory as one small file.

    magic     8 bytes    b"LHSTATE\\n"
    version   uint32     1
    header    uint32     length of the header in bytes
    states    uint64     length of the state bytes
    header    JSON       {"model": fingerprint, "position": n, "batch": b,
                          "states": [{"name": graph input, "shape": [...], "dtype": "float32"}, ...]}
    states    raw        one after another, C order
    checksum  32 bytes   sha256 of everything before it

All numbers are little-endian. The same states mean the same file, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lhruntime.errors import SnapshotError
from lhruntime.manifest import StateSpec

__all__ = ["Snapshot", "pack", "unpack"]

MAGIC = b"LHSTATE\n"
VERSION = 1
_PREFIX = struct.Struct("<8sIIQ")
_CHECKSUM = 32

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Snapshot:
    """model: the fingerprint; position: tokens consumed; states: one array per state of the manifest."""

    model: str
    position: int
    batch: int
    states: Sequence[Array]


def pack(snapshot: Snapshot, specs: Sequence[StateSpec]) -> bytes:
    """The bytes of a snapshot."""
    header = json.dumps(
        {
            "model": snapshot.model,
            "position": snapshot.position,
            "batch": snapshot.batch,
            "states": _layout(specs, snapshot.batch),
        },
        sort_keys=True,
    ).encode()
    body = b"".join(
        state.astype(spec.dtype.newbyteorder("<"), copy=False).tobytes()
        for state, spec in zip(snapshot.states, specs, strict=True)
    )
    data = _PREFIX.pack(MAGIC, VERSION, len(header), len(body)) + header + body
    return data + hashlib.sha256(data).digest()


def unpack(data: bytes, model: str, batch: int, specs: Sequence[StateSpec]) -> Snapshot:
    """The snapshot in `data`, which must be of this model and this batch.

    Raises SnapshotError if it is not a snapshot, truncated, corrupted, of another model or another batch.
    """
    header, body = _split(data)
    if header.get("model") != model:
        raise SnapshotError("the snapshot belongs to another model")
    if header.get("batch") != batch:
        raise SnapshotError(f"the snapshot holds batch {header.get('batch')}, this session has batch {batch}")
    sizes = [spec.dtype.itemsize * int(np.prod(spec.sized(batch), dtype=np.int64)) for spec in specs]
    if header.get("states") != _layout(specs, batch) or len(body) != sum(sizes):
        raise SnapshotError("the snapshot's states differ from the model's")
    position = header.get("position")
    if not isinstance(position, int) or position < 0:
        raise SnapshotError(f"the snapshot's position is {position!r}")
    starts = np.cumsum([0, *sizes])
    return Snapshot(
        model,
        position,
        batch,
        [
            np.frombuffer(body[start : start + size], spec.dtype.newbyteorder("<"))
            .astype(spec.dtype)
            .reshape(spec.sized(batch))
            for spec, start, size in zip(specs, starts, sizes, strict=False)
        ],
    )


def _layout(specs: Sequence[StateSpec], batch: int) -> list[dict[str, Any]]:
    return [
        {"name": spec.input, "shape": list(spec.sized(batch)), "dtype": spec.dtype.name} for spec in specs
    ]


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and state bytes, once magic, version, length and checksum agree."""
    if data[: len(MAGIC)] != MAGIC[: len(data)] or not data:
        raise SnapshotError("not a snapshot: it does not begin with the snapshot's magic bytes")
    if len(data) < _PREFIX.size:
        raise SnapshotError(f"the snapshot is truncated: it has {len(data)} bytes")
    _, version, header_size, body_size = _PREFIX.unpack_from(data)
    if version != VERSION:
        raise SnapshotError(f"the snapshot has version {version}, this runtime reads {VERSION}")
    end = _PREFIX.size + header_size + body_size
    if len(data) != end + _CHECKSUM:
        kind = "truncated" if len(data) < end + _CHECKSUM else "too long"
        raise SnapshotError(f"the snapshot is {kind}: {len(data)} bytes, expected {end + _CHECKSUM}")
    if hashlib.sha256(data[:end]).digest() != data[end:]:
        raise SnapshotError("the snapshot is corrupted: its checksum does not match")
    try:
        header = json.loads(data[_PREFIX.size : _PREFIX.size + header_size])
    except ValueError as error:
        raise SnapshotError(f"the snapshot's header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise SnapshotError("the snapshot's header is not a JSON object")
    return header, data[_PREFIX.size + header_size : end]
