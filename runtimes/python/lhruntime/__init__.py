"""lhruntime: runs a directory built by lhcompile, token by token, with numpy and onnxruntime only."""

from __future__ import annotations

from lhruntime.errors import ArgumentError, FormatError, LhruntimeError, SnapshotError
from lhruntime.manifest import Manifest, StateSpec
from lhruntime.sampling import Sampler
from lhruntime.session import Session
from lhruntime.tokenizer import ByteTokenizer, IdsOnly, StreamDecoder

__all__ = [
    "ArgumentError",
    "ByteTokenizer",
    "FormatError",
    "IdsOnly",
    "LhruntimeError",
    "Manifest",
    "Sampler",
    "Session",
    "SnapshotError",
    "StateSpec",
    "StreamDecoder",
]
