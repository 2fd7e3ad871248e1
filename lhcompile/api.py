"""The verbs of the command line as functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lhruntime import Session
from torch.fx import Node

from lhcompile import verify
from lhcompile.artifacts import Program, Signal, module_path
from lhcompile.calibrate import calibrate
from lhcompile.capture import capture
from lhcompile.config import CalibrationConfig, LoadConfig, build_config, validated
from lhcompile.errors import ConfigError
from lhcompile.load import load
from lhcompile.package import Manifest, verify_files
from lhcompile.pipeline import Progress
from lhcompile.pipeline import build as _build
from lhcompile.recognize import recognize
from lhcompile.running import Bench, bench, generate
from lhcompile.verify.decode import check_decode
from lhcompile.verify.model import Report, StageFidelity

__all__ = [
    "Bench",
    "Inspection",
    "LayerSummary",
    "Verification",
    "bench",
    "build",
    "generate",
    "inspect",
    "verify_directory",
]


def build(model: str, progress: Progress | None = None, command: str = "lhcompile.build", **options: Any) -> Report:
    """Compile `model` into the directory `output`; options are the fields of `lhcompile.config`'s classes.

    Raises an LhcompileError for everything a user can mend; the destination is then untouched.
    """
    return _build(str(model), build_config(**options), progress, command)


@dataclass(frozen=True)
class LayerSummary:
    """One operator with memory: its module, kind, filters, channels, taps and bytes of state per sequence if exact.

    taps: those kept, 0 of a state space, all positions of attention
    """

    module: str
    kind: str
    filters: int
    channels: int
    taps: int
    exact_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What was found in a model, without building it.

    vocab_size of a token model; features and channels, the axes of input and output, of a continuous signal
    """

    family: str
    parameters: int
    context_length: int
    vocab_size: int | None
    features: int | None
    channels: int | None
    config: dict[str, Any]
    notes: tuple[str, ...]
    layers: tuple[LayerSummary, ...]


def inspect(model: str, **options: Any) -> Inspection | Manifest:
    """The manifest of a built directory, or what a model is and which operators in it have memory.

    options: the fields of LoadConfig.
    """
    if (Path(model) / "manifest.json").is_file():
        return verify_files(Path(model))
    loaded = load(model, **dict(validated(LoadConfig, options)))
    program = recognize(capture(loaded))
    features = program.signal.features
    return Inspection(
        family=loaded.family,
        parameters=loaded.parameters,
        context_length=program.context,
        vocab_size=program.vocabulary if features is None else None,
        features=features,
        channels=None if features is None else program.vocabulary,
        config=loaded.config,
        notes=loaded.notes,
        layers=tuple(_layers(program)),
    )


def _layers(program: Program) -> Iterator[LayerSummary]:
    for node in program.graph.graph.nodes:
        if node.target in (torch.ops.lhc.modal_ssm.default, torch.ops.lhc.attention.default):
            yield _other(program, node)
        if node.target in (torch.ops.lhc.fir.default, torch.ops.lhc.long_conv.default):
            weight = getattr(program.graph, str(node.args[1].target))
            channels = node.args[0].meta["sizes"][2].offset
            kind = "short convolution" if node.target == torch.ops.lhc.fir.default else "long convolution"
            taps = weight.shape[-1]
            yield LayerSummary(module_path(node), kind, weight.shape[0], channels, taps, 4 * channels * (taps - 1))


def _other(program: Program, node: Node) -> LayerSummary:
    """A state space that the model has already, or attention, whose heads are counted by their keys and values."""
    if node.target == torch.ops.lhc.attention.default:
        keys, values = (arg.meta["sizes"] for arg in node.args[1:3])  # type: ignore[union-attr]
        heads, width = keys[2].offset, keys[3].offset + values[3].offset
        size = 4 * program.context * heads * width
        return LayerSummary(module_path(node), "attention", heads, heads * width, program.context, size)
    order, filters = getattr(program.graph, str(node.args[1].target)).shape  # type: ignore[union-attr]
    channels = node.args[0].meta["sizes"][2].offset  # type: ignore[union-attr]
    return LayerSummary(module_path(node), "state space", filters, channels, 0, 4 * order * channels)


@dataclass(frozen=True)
class Verification:
    """What was checked of a built directory: files, cuts, and its figures on text or signals.

    stages: figures of the directory, and of the source model when one was given
    """

    files: int
    cuts: int
    stages: tuple[StageFidelity, ...] = ()


def verify_directory(
    directory: str | Path,
    against: str | None = None,
    calibration: Path | None = None,
    tokenizer: Path | None = None,
    sequences: int = 16,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Verification:
    """Check a built directory: checksums, every way of cutting a sequence, and with `against` the source model.

    against: the model it was built from, loaded with `options` (fields of LoadConfig); its outputs and loss are
    compared on `calibration` text or signals, or on random ones where none are given. say: told what is going on.
    Raises PackageError for a damaged directory and ParityError when a gate is not met; the outputs of a build whose
    convolutions are all kept must be the source's own.
    """
    path = Path(directory)
    say("comparing checksums")
    manifest = verify_files(path)
    graphs = {manifest.target: manifest.graphs, **(manifest.variants or {})}
    models = {
        target: verify.SessionModel(partial(_open, path, target), pair.batch) for target, pair in graphs.items()
    }
    model = models[manifest.target]
    tail = model.session(1).tail
    signal = Signal(tail[0]) if tail else Signal()
    source = None if against is None else load(against, **dict(validated(LoadConfig, options)))
    if source is not None and source.parameters != manifest.model.parameters:
        built = f"{directory} was built from one of {manifest.model.parameters}"
        raise ConfigError(f"{against} is another model: it has {source.parameters} parameters, {built}")
    if source is not None and source.signal != signal:
        raise ConfigError(f"{against} is another model: it takes {source.signal}, {directory} takes {signal}")
    if calibration is None:
        length = min(256, manifest.model.context_length)
        rows = signal.random(sequences, length, tokens=manifest.model.vocab_size or 0)
    else:
        if source is None:
            raise ConfigError("text is for comparing with the source model: name it with --against")
        say("reading the text")
        values = {"calibration": calibration, "tokenizer": tokenizer, "sequences": sequences}
        config = validated(CalibrationConfig, values)
        program = recognize(capture(source))
        rows = calibrate(config, program, source.parameters, lambda: program, judged=False).heldout
    rows = rows[:, : model.session(1).manifest.capacity]
    say("feeding the graphs in every cut")
    few = rows[:3, : min(160, rows.shape[1])]
    cuts = 0
    for target, each in models.items():
        cuts += verify.check_cuts(each, few, _tolerance(manifest, target))
        pair = graphs[target]
        if pair.decode is not None:
            files = path / pair.step.file, path / pair.decode.file
            check_decode(*files, pair.apart, each, few[: pair.batch], _tolerance(manifest, target))
        each.close()
    if source is None:
        return Verification(len(manifest.files), cuts)
    exact = all(layer.tap_error == 0 for layer in manifest.distillation) and manifest.quantize in (None, "none")
    if exact and verify.rounded_to(manifest.states) is None:
        verify.check_stage(model, source.module, few, verify.ONNX)
    say(f"measuring on {rows.shape[:2].numel()} positions")
    with TemporaryDirectory() as place:
        reference = verify.Reference(source.module, rows, Path(place) / "reference")
        stages = verify.fidelity(reference, {})
        for target, each in reversed(models.items()):
            name = "onnx" if target == manifest.target else f"onnx, {target}"
            stages += verify.fidelity(reference, {name: each})[1:]
            each.close()
    verify.check_finite(stages)
    return Verification(len(manifest.files), cuts, tuple(stages))


def _tolerance(manifest: Manifest, target: str) -> verify.Tolerance:
    """For one way of cutting a sequence against another: states in fewer bits are rounded wherever it is cut."""
    tolerance = verify.quantized_tolerance(target, manifest.quantize or "none")
    dtype = verify.rounded_to(manifest.states)
    if dtype is None:
        return tolerance
    return max(verify.state_tolerance(dtype), tolerance, key=lambda each: each.relative)


def _open(directory: Path, target: str, batch: int) -> Session:
    return Session.load(directory, target=target, batch=batch)
