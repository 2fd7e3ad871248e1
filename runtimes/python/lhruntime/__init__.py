"""lhruntime: runs a directory built by lhcompile, token by token, with numpy and onnxruntime only."""

from __future__ import annotations

from lhruntime.engine import Engine
from lhruntime.errors import ArgumentError, BusyError, EngineError, FormatError, LhruntimeError, SnapshotError
from lhruntime.handles import Handle
from lhruntime.loops import DeviceLoop
from lhruntime.manifest import Manifest, StateSpec
from lhruntime.sampling import Sampler
from lhruntime.session import Session
from lhruntime.tokenizer import ByteTokenizer, IdsOnly, StreamDecoder

__all__ = [
    "ArgumentError",
    "BusyError",
    "ByteTokenizer",
    "DeviceLoop",
    "Engine",
    "EngineError",
    "FormatError",
    "Handle",
    "IdsOnly",
    "LhruntimeError",
    "Manifest",
    "Sampler",
    "Session",
    "SnapshotError",
    "StateSpec",
    "StreamDecoder",
]
