"""manifest.json of a built directory, format_version 1: read, validated, and its files checked."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lhruntime.errors import FormatError

__all__ = [
    "FORMAT_VERSION",
    "FileRecord",
    "GraphPair",
    "GraphSpec",
    "Manifest",
    "PastSpec",
    "StateSpec",
    "WeightSpec",
    "check_files",
    "read_manifest",
]

FORMAT_VERSION = 1
DTYPES = ("float32", "float16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
_KINDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}


@dataclass(frozen=True)
class StateSpec:
    """One state: the graph input that reads it, the graph output that writes it, shape and dtype.

    shape holds sizes and at most one "batch"; capacity is the number of positions that a state which grows
    with the sequence has room for, None where any number will do.
    """

    input: str
    output: str
    shape: tuple[int | str, ...]
    dtype: np.dtype[Any]
    capacity: int | None = None

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape with "batch" replaced by a number."""
        return tuple(batch if isinstance(size, str) else size for size in self.shape)


@dataclass(frozen=True)
class FileRecord:
    """What the manifest promises about one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class WeightSpec:
    """One tensor in a file of weights."""

    file: str
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class GraphSpec:
    """One ONNX file, and where those of its initializers lie that are not in it."""

    file: str
    weights: Mapping[str, WeightSpec]


@dataclass(frozen=True)
class PastSpec:
    """A state [batch, positions, channels] that decode has in tensors of its own, one for each position.

    inputs: in its place among the inputs, the oldest first; output: in its place among the outputs, the newest
    dtype: of the tensors, where it is not the state's: "bfloat16", which holds all numbers of that state
    """

    inputs: tuple[str, ...]
    output: str
    dtype: str | None = None


@dataclass(frozen=True)
class GraphPair:
    """The graphs of one target; step and prefill are the same where it has one graph, of one position.

    decode: the step with the choice of the next token behind it, where there is one
    past: of its states, by their input in the step, those in tensors of their own
    """

    step: GraphSpec
    prefill: GraphSpec
    decode: GraphSpec | None = None
    past: Mapping[str, PastSpec] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """The part of manifest.json that running a model needs.

    features is True for a model of continuous signals: its input is float32 [batch, seq, channels] and
    vocab_size is None. Otherwise the input is int64 [batch, seq] of ids below vocab_size.
    target is the one that is run if no other is asked for; graphs holds those of every target.
    """

    directory: Path
    family: str
    vocab_size: int | None
    features: bool
    input: str
    output: str
    target: str
    graphs: Mapping[str, GraphPair]
    states: tuple[StateSpec, ...]
    tokenizer: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    @property
    def capacity(self) -> int | None:
        """The number of positions that fit into the states; None where any number does."""
        return min((state.capacity for state in self.states if state.capacity is not None), default=None)

    @property
    def fingerprint(self) -> str:
        """sha256 over the names and hashes of all files: equal for equal models."""
        hashes = {name: record.sha256 for name, record in self.files.items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and validate `directory/manifest.json`.

    Raises FormatError naming the field that is missing, of a wrong kind, or not understood.
    """
    root = Path(directory)
    raw = _read_json(root / "manifest.json")
    if raw.get("format") != "lhcompile":
        raise FormatError(f"manifest.json: format is {raw.get('format')!r}, expected 'lhcompile'")
    version = _get(raw, "format_version", int)
    if version != FORMAT_VERSION:
        raise FormatError(f"manifest.json: format_version is {version}, this runtime reads {FORMAT_VERSION}")
    model = _get(raw, "model", dict)
    input_name, features = _signal(raw)
    files = _files(_get(raw, "files", dict))
    graphs, target = _get(raw, "graphs", dict), _get(raw, "target", str)
    variants = _get(raw, "variants", dict) if "variants" in raw else {}
    states = _states(_get(raw, "states", list))
    tokenizer = _get(raw, "tokenizer", dict) if "tokenizer" in raw else {"kind": "none"}
    _get(tokenizer, "kind", str, "tokenizer.")
    return Manifest(
        directory=root,
        family=str(model.get("family", "")),
        vocab_size=None if features else _positive(model, "vocab_size", "model."),
        features=features,
        input=input_name,
        output=_get(_get(raw, "outputs", dict), "values" if features else "logits", str, "outputs."),
        target=target,
        graphs={target: _pair(graphs, "graphs.", files, states)}
        | {key: _pair(_get(variants, key, dict, "variants."), f"variants.{key}.", files, states) for key in variants},
        states=states,
        tokenizer=tokenizer,
        files=files,
    )


def check_files(manifest: Manifest) -> None:
    """Compare size and sha256 of every listed file with the manifest.

    Raises FormatError naming the first file that is missing or differs.
    """
    for name, record in manifest.files.items():
        path = manifest.directory / name
        if not path.is_file():
            raise FormatError(f"{name}: listed in manifest.json but not in {manifest.directory}")
        size = path.stat().st_size
        if size != record.bytes:
            raise FormatError(f"{name}: has {size} bytes, manifest.json says {record.bytes}")
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != record.sha256:
            raise FormatError(f"{name}: sha256 is {digest}, manifest.json says {record.sha256}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}): not a built directory") from error
    except ValueError as error:
        raise FormatError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise FormatError(f"{path}: holds {type(raw).__name__}, expected an object")
    return raw


def _get(raw: Mapping[str, Any], key: str, kind: type, where: str = "") -> Any:
    if key not in raw:
        raise FormatError(f"manifest.json: {where}{key} is missing")
    value = raw[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise FormatError(f"manifest.json: {where}{key} is {value!r}, expected {_KINDS[kind]}")
    return value


def _positive(raw: Mapping[str, Any], key: str, where: str) -> int:
    value: int = _get(raw, key, int, where)
    if value < 1:
        raise FormatError(f"manifest.json: {where}{key} is {value}, expected at least 1")
    return value


def _signal(raw: Mapping[str, Any]) -> tuple[str, bool]:
    inputs = _get(raw, "inputs", dict)
    if set(inputs) not in ({"tokens"}, {"features"}):
        raise FormatError(f"manifest.json: inputs has {sorted(inputs)}, expected one of 'tokens', 'features'")
    kind = next(iter(inputs))
    return _get(inputs, kind, str, "inputs."), kind == "features"


def _files(raw: Mapping[str, Any]) -> dict[str, FileRecord]:
    files = {}
    for name in raw:
        if name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name:
            raise FormatError(f"manifest.json: files names {name!r}, expected a plain file name")
        record = _get(raw, name, dict, "files.")
        sha256 = _get(record, "sha256", str, f"files.{name}.")
        files[name] = FileRecord(sha256.lower(), _get(record, "bytes", int, f"files.{name}."))
    return files


def _pair(
    graphs: Mapping[str, Any], where: str, files: Mapping[str, FileRecord], states: Sequence[StateSpec]
) -> GraphPair:
    step, prefill = (_graph(graphs, kind, where, files) for kind in ("step", "prefill"))
    decode = _graph(graphs, "decode", where, files) if "decode" in graphs else None
    past = _get(graphs, "past", dict, where) if "past" in graphs else {}
    if past and decode is None:
        raise FormatError(f"manifest.json: {where}past is of decode, which is missing")
    return GraphPair(step, prefill, decode, {name: _past(past, name, f"{where}past.", states) for name in past})


def _past(raw: Mapping[str, Any], name: str, where: str, states: Sequence[StateSpec]) -> PastSpec:
    entry = _get(raw, name, dict, where)
    where = f"{where}{name}."
    inputs = _get(entry, "inputs", list, where)
    state = next((state for state in states if state.input == name), None)
    shape = () if state is None else state.shape
    named = inputs and all(isinstance(each, str) for each in inputs)
    if not named or len(shape) != 3 or shape[:2] != ("batch", len(inputs)):
        raise FormatError(f"manifest.json: {where}inputs is {inputs}, the state is {list(shape)}")
    dtype = _get(entry, "dtype", str, where) if "dtype" in entry else None
    if dtype is not None and (dtype != "bfloat16" or state is None or state.dtype != np.float32):
        raise FormatError(f"manifest.json: {where}dtype is {dtype!r}, expected 'bfloat16' for a state of float32")
    return PastSpec(tuple(inputs), _get(entry, "output", str, where), dtype)


def _graph(graphs: Mapping[str, Any], kind: str, where: str, files: Mapping[str, FileRecord]) -> GraphSpec:
    raw = _get(graphs, kind, dict, where)
    where = f"{where}{kind}."
    name = _listed(raw, where, files)
    if "weights" not in raw:
        return GraphSpec(name, {})
    outside = _get(raw, "weights", dict, where)
    where += "weights."
    file = _listed(outside, where, files)
    tensors = _get(outside, "tensors", dict, where)
    return GraphSpec(name, {key: _weight(tensors, key, f"{where}tensors.", file, files) for key in tensors})


def _listed(raw: Mapping[str, Any], where: str, files: Mapping[str, FileRecord]) -> str:
    name: str = _get(raw, "file", str, where)
    if name not in files:
        raise FormatError(f"manifest.json: {where}file is {name!r}, which files does not list")
    return name


def _weight(
    raw: Mapping[str, Any], key: str, where: str, file: str, files: Mapping[str, FileRecord]
) -> WeightSpec:
    entry = _get(raw, key, dict, where)
    where = f"{where}{key}."
    offset, shape = _get(entry, "offset", int, where), _get(entry, "shape", list, where)
    if offset < 0 or not all(type(size) is int and size >= 0 for size in shape):
        raise FormatError(f"manifest.json: {where}offset and shape are {offset} and {shape}, expected sizes")
    name = _get(entry, "dtype", str, where)
    if name not in DTYPES:
        raise FormatError(f"manifest.json: {where}dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    dtype = np.dtype(name)
    if offset + dtype.itemsize * math.prod(shape) > files[file].bytes:
        raise FormatError(f"manifest.json: {where}offset is {offset}: the tensor ends behind the end of {file}")
    return WeightSpec(file, offset, dtype, tuple(shape))


def _states(raw: list[Any]) -> tuple[StateSpec, ...]:
    states = tuple(_state(entry, f"states[{index}]") for index, entry in enumerate(raw))
    for side in ("input", "output"):
        names = [getattr(state, side) for state in states]
        for name in names:
            if names.count(name) > 1:
                raise FormatError(f"manifest.json: states has two entries with {side} {name!r}")
    return states


def _state(raw: Any, where: str) -> StateSpec:
    if not isinstance(raw, dict):
        raise FormatError(f"manifest.json: {where} is {raw!r}, expected an object")
    shape = tuple(_get(raw, "shape", list, f"{where}."))
    sizes = [size for size in shape if size != "batch"]
    if len(shape) - len(sizes) > 1 or not all(type(size) is int and size >= 0 for size in sizes):
        raise FormatError(f"manifest.json: {where}.shape is {list(shape)}, expected sizes and one 'batch'")
    dtype = _get(raw, "dtype", str, f"{where}.")
    if dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise FormatError(f"manifest.json: {where}.dtype is {dtype!r}, expected one of {known}")
    names = (_get(raw, "input", str, f"{where}."), _get(raw, "output", str, f"{where}."))
    capacity = _positive(raw, "capacity", f"{where}.") if "capacity" in raw else None
    return StateSpec(*names, shape, np.dtype(dtype), capacity)
