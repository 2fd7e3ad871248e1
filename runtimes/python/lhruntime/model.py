"""A loaded model: its manifest and the two ONNX Runtime sessions, shared by whatever runs it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from lhruntime.errors import ArgumentError, FormatError
from lhruntime.manifest import (
    GraphPair,
    GraphSpec,
    Manifest,
    PastSpec,
    StateSpec,
    WeightSpec,
    check_files,
    read_manifest,
)

__all__ = ["SETTINGS", "TOKENS", "LoadedModel", "load_model", "register_operators"]

Provider = str | tuple[str, dict[str, Any]]
Dim = int | str

_ORT_TYPES = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "bfloat16": "tensor(bfloat16)",
    "float64": "tensor(double)",
    "int64": "tensor(int64)",
    "int32": "tensor(int32)",
    "int16": "tensor(int16)",
    "int8": "tensor(int8)",
    "uint8": "tensor(uint8)",
    "bool": "tensor(bool)",
}
_OUTPUT_DTYPES = ("float32", "float16", "float64")
SETTINGS = {"uniform": "float32", "temperature": "float32", "top_k": "int64", "top_p": "float32"}
"""What the graph `decode` reads behind the states, each [batch]."""
TOKENS = "tokens"
"""What it writes in place of the logits, int64 [batch, 1]."""
_ERRORS_ONLY = 3
_CUDA = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}
"""Options of CUDA: factors of float32 products keep their 24 bits, where TF32 would round them to 11; memory grows by
what is asked for, not to the next power of two."""
_DEVICES = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}


@dataclass(frozen=True)
class LoadedModel:
    """A verified model, ready to run; holds no state.

    step:                    one position a call; the graph `decode` if it chooses
    chooses:                 whether step gives tokens, chosen as its SETTINGS say, in place of logits
    past:                    states that step has as one tensor for each position, by their input in prefill
    operators:               the library whose kernels both may take, None without one
    input_dtype, input_tail: int64, () for tokens; float32, (channels,) for features
    output_dtype, width:     of the logits or values [batch, seq, width]
    piece:                   positions that prefill takes in a call, None where any number will do
    device, device_id:       where the states live, "cpu" or "cuda", and which of several
    weights:                 what both graphs read from a mapped file; they do not hold it themselves
    """

    manifest: Manifest
    fingerprint: str
    step: ort.InferenceSession
    prefill: ort.InferenceSession
    input_dtype: np.dtype[Any]
    input_tail: tuple[int, ...]
    output_dtype: np.dtype[Any]
    width: int
    piece: int | None
    device: str
    device_id: int
    weights: tuple[ort.OrtValue, ...] = ()
    chooses: bool = False
    past: Mapping[str, PastSpec] = field(default_factory=dict)
    operators: str | None = None


def load_model(
    directory: str | os.PathLike[str],
    *,
    target: str | None,
    batch: int,
    providers: Sequence[Provider] | None,
    threads: int | None,
    verify: bool,
    share_weights: bool = False,
    operators: str | os.PathLike[str] | None = None,
    choose: bool = False,
    cuda_graph: bool = False,
) -> LoadedModel:
    """Open both graphs of a built directory and compare them with its manifest.

    target, verify, share_weights, operators: see Session.load
    choose:     open the graph `decode` in place of the step, where there is one
    cuda_graph: capture the calls of that graph on CUDA

    Raises FormatError if the directory is incomplete, altered or contradicts its manifest, ArgumentError for a
    provider, library or thread count that cannot be had.
    """
    manifest = read_manifest(directory)
    if verify:
        check_files(manifest)
    chosen = _check_providers(providers)
    if share_weights and chosen != ["CPUExecutionProvider"]:
        raise ArgumentError("share_weights is for the CPU: a device needs weights of its own")
    graphs = _graphs(manifest, target)
    mapped: dict[WeightSpec, ort.OrtValue] = {}
    decode = graphs.decode if choose else None
    one = decode or graphs.step

    def opened(graph: GraphSpec, providers: list[Provider]) -> ort.InferenceSession:
        options = _options(threads, manifest, graph, mapped if share_weights else None)
        register_operators(options, operators)
        return _open(manifest, graph.file, options, providers)

    step = opened(one, _capturing(chosen) if decode and cuda_graph else chosen)
    prefill = step if graphs.prefill == one else opened(graphs.prefill, chosen)
    channels = _last_dim(step.get_inputs(), one.file) if manifest.features else None
    width = manifest.vocab_size or _last_dim(step.get_outputs(), one.file)
    past = graphs.past if decode else {}
    _check_graph(step, one.file, manifest, batch, "one", channels, width, chooses=decode is not None, past=past)
    _check_graph(prefill, graphs.prefill.file, manifest, batch, "seq", channels, width)
    provider = step.get_providers()[0]
    return LoadedModel(
        manifest=manifest,
        fingerprint=manifest.fingerprint,
        step=step,
        prefill=prefill,
        input_dtype=np.dtype(np.int64 if channels is None else np.float32),
        input_tail=() if channels is None else (channels,),
        output_dtype=_output_dtype(manifest.output, graphs.prefill.file, prefill if decode else step, prefill),
        width=width,
        piece=piece if isinstance(piece := prefill.get_inputs()[0].shape[1], int) else None,
        device=_DEVICES.get(provider, "cpu"),
        device_id=int(step.get_provider_options()[provider].get("device_id", 0)),
        weights=tuple(mapped.values()),
        chooses=decode is not None,
        past=past,
        operators=None if operators is None else os.fspath(operators),
    )


def _graphs(manifest: Manifest, target: str | None) -> GraphPair:
    target = manifest.target if target is None else target
    if target not in manifest.graphs:
        raise ArgumentError(f"there are no graphs for {target!r} in it, only for {', '.join(manifest.graphs)}")
    return manifest.graphs[target]


def _check_providers(providers: Sequence[Provider] | None) -> list[Provider]:
    chosen: list[Provider] = ["CPUExecutionProvider"] if providers is None else list(providers)
    available = ort.get_available_providers()
    known = ", ".join(available)
    if not chosen:
        raise ArgumentError(f"providers is empty; this onnxruntime has {known}")
    for provider in chosen:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise ArgumentError(f"provider {name!r} is not in this onnxruntime, which has {known}")
    return [_with_defaults(provider) for provider in chosen]


def _with_defaults(provider: Provider) -> Provider:
    name, options = (provider, {}) if isinstance(provider, str) else provider
    return (name, _CUDA | options) if name == "CUDAExecutionProvider" else provider


def _capturing(providers: list[Provider]) -> list[Provider]:
    def capturing(provider: Provider) -> Provider:
        name, options = (provider, {}) if isinstance(provider, str) else provider
        return (name, {**options, "enable_cuda_graph": "1"}) if name == "CUDAExecutionProvider" else provider

    return [capturing(provider) for provider in providers]


def _options(
    threads: int | None, manifest: Manifest, graph: GraphSpec, mapped: dict[WeightSpec, ort.OrtValue] | None
) -> ort.SessionOptions:
    """mapped: weights of this directory that are mapped already, to which the graph's are added; None for its own."""
    if threads is not None and threads < 1:
        raise ArgumentError(f"threads is {threads}, expected at least 1")
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    if mapped is not None:
        options.add_session_config_entry("session.disable_prepacking", "1")  # a packed copy would be the graph's own
        for name, weight in graph.weights.items():
            if weight not in mapped:
                mapped[weight] = _map(manifest, weight)
            options.add_initializer(name, mapped[weight])
    return options


def register_operators(options: ort.SessionOptions, operators: str | os.PathLike[str] | None) -> None:
    """Let graphs take the kernels of a library for lhcompile's own operators. Raises ArgumentError if it has none."""
    if operators is None:
        return
    try:
        options.register_custom_ops_library(os.path.abspath(operators))
    except Exception as error:  # onnxruntime's exceptions have no common base
        reason = str(error).partition("\n")[0]
        raise ArgumentError(f"operators: {os.fspath(operators)} cannot be loaded: {reason}") from error


def _map(manifest: Manifest, weight: WeightSpec) -> ort.OrtValue:
    """A tensor as it lies in its file, no copy of it."""
    path = manifest.directory / weight.file
    try:
        array = np.memmap(path, weight.dtype, "r", weight.offset, weight.shape)
    except (OSError, ValueError) as error:
        raise FormatError(f"{weight.file}: cannot be mapped ({error})") from error
    return ort.OrtValue.ortvalue_from_numpy(array)


def _open(
    manifest: Manifest, file: str, options: ort.SessionOptions, providers: list[Provider]
) -> ort.InferenceSession:
    path = manifest.directory / file
    if not path.is_file():
        raise FormatError(f"{file}: not in {manifest.directory}")
    try:
        session = ort.InferenceSession(path, options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common base
        reason = str(error).partition("\n")[0]
        raise FormatError(f"{file}: ONNX Runtime cannot load it: {reason}") from error
    first = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != first:
        raise ArgumentError(f"provider {first!r} could not be started for {file}")
    return session


def _check_graph(
    graph: ort.InferenceSession,
    file: str,
    manifest: Manifest,
    batch: int,
    seq: str,
    channels: int | None,
    width: int,
    *,
    chooses: bool = False,
    past: Mapping[str, PastSpec] | None = None,
) -> None:
    """Names, order, dtypes and shapes; an output may leave sizes undeclared, an input may not.

    seq is "seq" for a graph of many positions, "one" for that of one; chooses, past: for the graph `decode`.
    """
    carried, kept = _carried(manifest.states, past or {})
    lead: tuple[Dim, ...] = ("batch", seq)
    tail = () if channels is None else (channels,)
    settings = SETTINGS if chooses else {}
    output = TOKENS if chooses else manifest.output
    for kind, values, names in (
        ("input", graph.get_inputs(), [manifest.input, *(value.name for value in carried), *settings]),
        ("output", graph.get_outputs(), [output, *(value.name for value in kept)]),
    ):
        found = [value.name for value in values]
        if found != names:
            raise FormatError(f"{file}: {kind}s are {found}, manifest.json says {names}")
    reads, writes = graph.get_inputs(), graph.get_outputs()
    input_type = "int64" if channels is None else "float32"
    _check_value(file, reads[0], (input_type,), lead + tail, batch, declared=True)
    dtypes, shape = (("int64",), lead) if chooses else (_OUTPUT_DTYPES, (*lead, width))
    _check_value(file, writes[0], dtypes, shape, batch, declared=False)
    for values, declared, states in ((reads, True, carried), (writes, False, kept)):
        for value, state in zip(values[1:], states, strict=False):
            _check_value(file, value, (state.dtype,), state.shape, batch, declared=declared)
    for dtype, read in zip(settings.values(), reads[1 + len(carried) :], strict=True):
        _check_value(file, read, (dtype,), ("batch",), batch, declared=True)


class _Carried(NamedTuple):
    """An input or output of a graph that is a state, or a position of one."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


def _carried(states: Sequence[StateSpec], past: Mapping[str, PastSpec]) -> tuple[list[_Carried], list[_Carried]]:
    """Inputs and outputs."""
    reads, writes = [], []
    for state in states:
        apart, shape = PastSpec((state.input,), state.output), state.shape
        if state.input in past:
            apart, shape = past[state.input], (shape[0], 1, *shape[2:])
        dtype = apart.dtype or state.dtype.name
        reads += [_Carried(name, dtype, shape) for name in apart.inputs]
        writes.append(_Carried(apart.output, dtype, shape))
    return reads, writes


def _check_value(
    file: str, value: ort.NodeArg, dtypes: Sequence[str], shape: Sequence[Dim], batch: int, *, declared: bool
) -> None:
    if value.type not in {_ORT_TYPES[dtype] for dtype in dtypes}:
        raise FormatError(f"{file}: {value.name} is {value.type}, manifest.json says {' or '.join(dtypes)}")
    if len(value.shape) != len(shape):
        raise FormatError(f"{file}: {value.name} has shape {value.shape}, manifest.json says {list(shape)}")
    for axis, (found, wanted) in enumerate(zip(value.shape, shape, strict=True)):
        _check_dim(f"{file}: axis {axis} of {value.name}", found, wanted, batch, declared)


def _check_dim(where: str, found: Any, wanted: Dim, batch: int, declared: bool) -> None:
    fixed = isinstance(found, int)
    if wanted == "batch":
        if fixed and found != batch:
            raise FormatError(f"{where} has the fixed batch {found}, this session asks for batch {batch}")
    elif wanted == "seq":
        if fixed and found < 1:
            raise FormatError(f"{where} has the fixed length {found}, expected at least 1")
    elif wanted == "one":
        if fixed and found != 1:
            raise FormatError(f"{where} has the fixed length {found}, expected 1")
    elif fixed and found != wanted:
        raise FormatError(f"{where} has size {found}, manifest.json says {wanted}")
    elif not fixed and declared:
        raise FormatError(f"{where} has no fixed size, manifest.json says {wanted}")


def _last_dim(values: Sequence[ort.NodeArg], file: str) -> int:
    shape = values[0].shape if values else []
    if not shape or not isinstance(shape[-1], int):
        name = values[0].name if values else "the graph"
        raise FormatError(f"{file}: {name} has shape {shape}, expected a fixed number of channels last")
    return int(shape[-1])


def _output_dtype(
    output: str, file: str, step: ort.InferenceSession, prefill: ort.InferenceSession
) -> np.dtype[Any]:
    first, second = (graph.get_outputs()[0].type for graph in (step, prefill))
    if first != second:
        raise FormatError(f"{file}: {output} is {second}, in the step {first}")
    return np.dtype(next(name for name, kind in _ORT_TYPES.items() if kind == first))
