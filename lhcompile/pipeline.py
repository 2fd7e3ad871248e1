"""The road of a model: checkpoint in, built directory out. Opening this file is opening the table of contents.

load       torch module from checkpoint, factory or archive
capture    program of its sizes; needs nothing of what the module is
recognize  names every convolution; after capture, because laws of sizes tell time from channels
calibrate  sequences to choose by and sequences to judge by; after recognize, because sampling needs a streamed program
distill    convolutions to modal systems; before streamify, while a program still takes whole sequences
streamify  states in and out
lower      ONNX graphs
quantize   smaller weights
compare    figures of the torch programs on held-out sequences, after which their memory is free for the graphs
verify     parity and figures of the graphs
package    the directory, whole or not at all
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from lhruntime import Session

from lhcompile import verify
from lhcompile.artifacts import LoadedModel, Lowered, Program
from lhcompile.assemble import fidelity_of, genai_of, graph_files, manifest_of, report_of
from lhcompile.calibrate import SAMPLED_LENGTH, calibrate, check_readable, token_limit
from lhcompile.capture import capture
from lhcompile.config import BuildConfig, DistillConfig
from lhcompile.distill import distill
from lhcompile.errors import ConfigError, DestinationError, DistillError
from lhcompile.load import load
from lhcompile.lower import lower
from lhcompile.package import Manifest, Source, check_destination, package, size_of, workspace
from lhcompile.package.genai import PROVIDERS, GenaiFiles
from lhcompile.quantize import quantize
from lhcompile.recognize import recognize
from lhcompile.streamify import check_capacity, streamify
from lhcompile.verify.graphs import check_graphs
from lhcompile.verify.masked import check_masked
from lhcompile.verify.model import Report, StageFidelity
from lhcompile.verify.report import render_report

__all__ = ["Progress", "build"]

SAMPLING = DistillConfig(order=12, method="hankel")
"""Calibration tokens are sampled from a stand-in of this order when there is no file."""
PARITY_TIME = 160
"""Tokens a row in the parity gates: several prefill chunks and a remainder."""
PARITY_ROWS = 3


@dataclass
class Progress:
    """Names, times and remarks of stages as they run; `on_stage` and `on_remark` are the screen's."""

    on_stage: Callable[[str], None] = lambda _: None
    on_remark: Callable[[str], None] = lambda _: None
    timings: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[Callable[[str], None]]:
        """Times the block under `name`; gives a function for remarks."""
        self.on_stage(name)
        started = time.perf_counter()
        yield self.on_remark
        self.timings[name] = time.perf_counter() - started


@dataclass(frozen=True)
class _Contents:
    """A directory to be: its files, and its manifest without figures.

    genai: the files that onnxruntime-genai alone reads; notes: what to know of them
    """

    name: str
    files: dict[str, Source]
    manifest: Manifest
    genai: frozenset[str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Compiled:
    """What is left of a model when its torch programs are gone: a build holds the weights of one at a time.

    targets: rows that their graphs are for, None for any number
    onnx: graphs in float32; rounded: the same with the values of quantized weights; quantized: as they are stored
    report: without figures of the graphs
    expected, reference: what the graphs are compared with, in every cut and on held-out sequences
    """

    targets: dict[str, int | None]
    onnx: _Contents
    rounded: _Contents | None
    quantized: _Contents | None
    report: Report
    expected: verify.Fed
    reference: verify.Reference

    @property
    def product(self) -> _Contents:
        return self.quantized or self.onnx


def build(model: str, config: BuildConfig, progress: Progress | None = None, command: str = "") -> Report:
    """Compile `model` as `config` asks and write the directory `config.package.output`.

    model: checkpoint file, `package.module:factory` or .pt2 archive. Returns the report that was written.
    Raises an LhcompileError for everything a user can mend; the destination is then as it was.
    """
    progress = progress or Progress()
    check_destination(config.package.output, config.package.force)
    check_readable(config.calibration)
    _check_providers(config)
    with workspace(config.package.output) as place:
        compiled = _compile(model, config, progress, place, command)
        gc.collect()  # programs hold themselves in circles
        with progress.stage("verify") as say:
            stages = _measure(compiled, place, say)
        with progress.stage("package"):
            files, manifest = compiled.product.files, compiled.product.manifest
            sizes = {name: size_of(file) for name, file in files.items() if name not in compiled.product.genai}
            report = compiled.report.measured(stages, sizes, progress.timings)
            report = report.model_copy(update={"genai": list(compiled.product.notes)})
            figures = {"fidelity": fidelity_of(stages), "timings": report.timings}
            files["report.json"] = report.model_dump_json(indent=1).encode()
            files["report.html"] = render_report(report).encode()
            package(config.package.output, files, manifest.model_copy(update=figures), force=config.package.force)
    return report


def _check_providers(config: BuildConfig) -> None:
    """Raise ConfigError for graphs that cannot be tried here."""
    if "cuda" in config.lower.target and config.quantize.quantize == "bf16" and not _providers("cuda"):
        raise ConfigError("products in bf16 run on a GPU alone: build for cuda where onnxruntime has it, or use fp16")


def _providers(target: str) -> list[str | tuple[str, dict[str, Any]]] | None:
    """What tries a target's graphs; None: a CPU."""
    if target == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return ["CUDAExecutionProvider", "CPUExecutionProvider"]
    return None


def _compile(model: str, config: BuildConfig, progress: Progress, place: Path, command: str) -> _Compiled:
    """Every stage that holds the model in torch, up to the graph files in `place`."""
    with progress.stage("load"):
        loaded = load(model, **dict(config.load))
        if config.lower.mask and loaded.signal.features is not None:
            raise ConfigError("--mask is for models of tokens")
    with progress.stage("capture"):
        captured = capture(loaded)
        probe = _probe(captured)
        verify.check_stage(captured, loaded.module, probe, verify.CAPTURED)
    with progress.stage("recognize"):
        recognized = recognize(captured)
        check_capacity(recognized, config.streamify.max_context)
        verify.check_stage(recognized, captured, probe, verify.RECOGNIZED)
    with progress.stage("calibrate") as say:
        if config.calibration.calibration is None:
            say("sampling sequences")
        sequences = calibrate(config.calibration, recognized, loaded.parameters, lambda: _stand_in(recognized))
        heldout = sequences.heldout[:, : config.streamify.max_context]
        few = heldout[:PARITY_ROWS, :PARITY_TIME]
    with progress.stage("distill") as say:
        distilled = distill(recognized, config.distill, sequences.calibration, say, sequences.sampled)
    with progress.stage("streamify"):
        streamed = streamify(distilled.program, config.streamify.max_context)
        verify.check_streamed(streamed, distilled.program, few)
    with progress.stage("lower"):
        targets = [lower(streamed, target) for target in config.lower.target]
        graph, *_ = [check_graphs(lowered, streamed.signal) for lowered in targets]
    with progress.stage("quantize"):
        quantized = [quantize(lowered, config.quantize) for lowered in targets]
    with progress.stage("compare") as say:
        say(f"on {heldout.shape[:2].numel()} held-out positions")
        try:
            reference = verify.Reference(loaded.module, heldout, place / "reference")
        except OSError as error:
            raise DestinationError(f"cannot write the source's outputs into {place}: {error.strerror}") from error
        programs = {"captured": captured, "distilled": distilled.program, "streamed": streamed}
        stages = verify.fidelity(reference, programs)
        expected = verify.fed(streamed, few)
    report = report_of(
        loaded, quantized[0], streamed, distilled, stages, graph, config.distill.rise, command, sequences.source
    )
    contents = partial(_contents, loaded, streamed, report, config, place)
    smaller = config.quantize.quantize != "none"
    return _Compiled(
        targets={lowered.target: lowered.batch for lowered in targets},
        onnx=contents("onnx", targets, product=not smaller),
        rounded=contents("rounded", [each.rounded for each in quantized], product=False) if smaller else None,
        quantized=contents("quantized", [each.lowered for each in quantized], product=True) if smaller else None,
        report=report,
        expected=expected,
        reference=reference,
    )


def _contents(
    loaded: LoadedModel,
    program: Program,
    report: Report,
    config: BuildConfig,
    place: Path,
    name: str,
    targets: list[Lowered],
    product: bool,
) -> _Contents:
    """The graphs of every target, written into a folder of their own in `place`, and what goes with the product."""
    (place / name).mkdir()
    tokenizer = config.calibration.tokenizer
    mask = config.lower.mask and product
    files = graph_files(targets, place / name, mask)
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer
    manifest = manifest_of(loaded, targets, program, report, tokenizer is not None, mask)
    genai = genai_of(manifest, tokenizer) if product else GenaiFiles({})
    return _Contents(name, files | genai.files, manifest, frozenset(genai.files), genai.notes)


def _measure(compiled: _Compiled, place: Path, say: Callable[[str], None]) -> list[StageFidelity]:
    """The figures of every stage; graphs are tried in a directory, through the runtime that users drive them with.

    Those of the graphs come last, target by target, and that of the first target at the very end. Quantized graphs are
    held against those of the weights' rounded values, their figures against the source.
    """

    def model(contents: _Contents, target: str, shared: bool = True) -> verify.SessionModel:
        directory = place / f"{contents.name}, tried"
        if not directory.exists():
            package(directory, contents.files, contents.manifest, force=False)
        return verify.SessionModel(partial(_open, directory, target, shared), compiled.targets[target])

    stages = list(compiled.report.stages)
    first, precision = next(iter(compiled.targets)), compiled.report.quantize
    with_mask = compiled.product.manifest.masked is not None
    stopping = next((target for target in compiled.targets if with_mask and target in PROVIDERS), None)
    for target in reversed(compiled.targets):
        behind = "" if target == first else f", {target}"
        say(f"feeding the graphs for {target} in every cut")
        onnx = model(compiled.onnx, target)
        verify.check_session(onnx, compiled.expected)
        say("measuring on the held-out positions")
        stages += verify.fidelity(compiled.reference, {f"onnx{behind}": onnx})[1:]
        if compiled.quantized is None and target == stopping:
            _check_masked(compiled, place, onnx, compiled.expected, verify.ONNX)
        del onnx  # its memory is for the next
        if compiled.rounded is None or compiled.quantized is None:
            continue
        tokens = compiled.expected.tokens
        expected = model(compiled.rounded, target).feed(tokens, [tokens.shape[1]])
        smaller = model(compiled.quantized, target, shared=False)
        say(f"feeding the graphs in {precision} for {target} in every cut")
        tolerance = verify.quantized_tolerance(target, precision)
        verify.check_session(smaller, expected, tolerance)
        if target == stopping:
            _check_masked(compiled, place, smaller, expected, tolerance)
        stages += verify.fidelity(compiled.reference, {f"{precision}{behind}": smaller})[1:]
    verify.check_finite(stages)
    return stages


def _check_masked(
    compiled: _Compiled, place: Path, plain: verify.SessionModel, expected: verify.Fed, tolerance: verify.Tolerance
) -> None:
    contents = compiled.product
    assert contents.manifest.masked is not None
    folder = place / contents.name
    step, prefill = contents.manifest.masked.step, contents.manifest.masked.prefill
    check_masked(folder / step.file, folder / prefill.file, plain, expected, tolerance)


def _open(directory: Path, target: str, shared: bool, batch: int) -> Session:
    providers = _providers(target)
    shared = shared and providers is None
    return Session.load(
        directory, target=target, batch=batch, providers=providers, verify=False, share_weights=shared
    )


def _probe(program: Program) -> torch.Tensor:
    """Random sequences for the gates before there are real ones, [rows, time, …]."""
    return program.signal.random(PARITY_ROWS, min(PARITY_TIME, program.context), token_limit(program))


def _stand_in(recognized: Program) -> Program:
    """A streamed program near enough to the model to sample calibration tokens from."""
    try:
        return streamify(distill(recognized, SAMPLING, None).program, SAMPLED_LENGTH)
    except DistillError:  # its filters have no stable system: --exact keeps them, and so does the sampling
        return streamify(recognized, SAMPLED_LENGTH)
