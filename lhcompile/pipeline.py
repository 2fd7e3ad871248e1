"""The road of a model: checkpoint in, built directory out. Opening this file is opening the table of contents.

load       torch module from checkpoint, factory or archive
capture    program of its sizes; needs nothing of what the module is
recognize  names every convolution; after capture, because laws of sizes tell time from channels
calibrate  sequences to choose by and sequences to judge by; after recognize, because sampling needs a streamed program
distill    convolutions to modal systems; before streamify, while a program still takes whole sequences
streamify  states in and out, of poles that are rounded by then
lower      ONNX graphs
quantize   smaller weights, smaller states
compare    figures of the torch programs on held-out sequences, after which their memory is free for the graphs
verify     parity and figures of the graphs
package    the directory, whole or not at all
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from lhcompile import verify
from lhcompile.artifacts import LoadedModel, Lowered, Program, State
from lhcompile.assemble import fidelity_of, genai_of, graph_files, manifest_of, report_of, rounding_of
from lhcompile.calibrate import SAMPLED_LENGTH, calibrate, check_readable, token_limit
from lhcompile.capture import capture
from lhcompile.config import BuildConfig, DistillConfig
from lhcompile.distill import distill
from lhcompile.errors import ConfigError, DestinationError, DistillError
from lhcompile.load import load
from lhcompile.lower import apart_in_another_type, complete, lower, masked
from lhcompile.package import check_destination, package, size_of, workspace
from lhcompile.package.genai import PROVIDERS, GenaiFiles
from lhcompile.quantize import (
    half_pasts,
    keep_states,
    kept_in,
    plan_weights,
    quantize,
    quantize_poles,
    state_ranges,
)
from lhcompile.recognize import recognize
from lhcompile.streamify import check_capacity, streamify
from lhcompile.trial import Compiled, Contents, measure
from lhcompile.verify.graphs import check_graphs
from lhcompile.verify.model import Report
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


def build(model: str, config: BuildConfig, progress: Progress | None = None, command: str = "") -> Report:
    """Compile `model` as `config` asks and write the directory `config.package.output`.

    model: checkpoint file, `package.module:factory` or .pt2 archive. Returns the report that was written.
    Raises an LhcompileError for everything a user can mend; the destination is then as it was.
    """
    progress = progress or Progress()
    check_destination(config.package.output, config.package.force)
    check_readable(config.calibration)
    with workspace(config.package.output) as place:
        compiled = _compile(model, config, progress, place, command)
        gc.collect()  # programs hold themselves in circles
        with progress.stage("verify") as say:
            stages = measure(compiled, place, say)
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


def _compile(model: str, config: BuildConfig, progress: Progress, place: Path, command: str) -> Compiled:
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
        searched = config.distill.order is None and not config.distill.exact
        stand_in = partial(_stand_in, recognized)
        sequences = calibrate(config.calibration, recognized, loaded.parameters, stand_in, searched)
        heldout = sequences.heldout[:, : config.streamify.max_context]
        few = heldout[:PARITY_ROWS, :PARITY_TIME]
    with progress.stage("distill") as say:
        distilled = distill(
            recognized, config.distill, sequences.calibration, say, sequences.sampled, sequences.judging
        )
    programs, poles = {"captured": captured, "distilled": distilled.program}, None
    if config.quantize.poles is not None:
        with progress.stage("poles"):
            programs["poles"], poles = quantize_poles(distilled.program, config.quantize.poles)
    with progress.stage("streamify"):
        *_, whole = programs.values()
        streamed = streamify(whole, config.streamify.max_context)
        verify.check_streamed(streamed, whole, few)
    with progress.stage("lower"):
        targets = [lower(streamed, target) for target in config.lower.target]
        graph, *_ = [check_graphs(lowered, streamed.signal) for lowered in targets]
    with progress.stage("quantize") as say:
        plan = plan_weights(
            targets[0], config.quantize, config.weights_budget, sequences.calibration, sequences.sampled, say
        )
        quantized = [quantize(lowered, config.quantize, plan) for lowered in targets]
        states = _kept_states(streamed, [each.lowered for each in quantized], config, sequences.calibration)
    with progress.stage("compare") as say:
        say(f"on {heldout.shape[:2].numel()} held-out positions")
        try:
            reference = verify.Reference(loaded.module, heldout, place / "reference")
        except OSError as error:
            raise DestinationError(f"cannot write the source's outputs into {place}: {error.strerror}") from error
        stages = verify.fidelity(reference, programs | {"streamed": streamed})
        expected = verify.fed(streamed, few)
    product = [keep_states(each.lowered, states) for each in quantized]
    report = report_of(
        loaded, quantized[0], streamed, distilled, stages, graph, config.distill.rise, command, sequences.source
    )
    fixed = plan.fixed, plan.listened
    report = report.model_copy(update=rounding_of(config, poles, plan.allotted, fixed, product[0].states))
    stopping = None
    if config.lower.mask:
        first = next(each for each in quantized if each.lowered.target in PROVIDERS)
        stopping = keep_states(masked(first.lowered, first.inner_step), states)
    contents = partial(_contents, loaded, streamed, report, config, place)
    smaller, shorter = config.quantize.quantize != "none", states != streamed.states
    lasting = [each.lowered for each in quantized]
    return Compiled(
        targets={lowered.target: lowered.batch for lowered in targets},
        onnx=contents("onnx", targets, stopping, product=not smaller and not shorter),
        rounded=contents("rounded", [each.rounded for each in quantized]) if smaller else None,
        quantized=contents("quantized", lasting, stopping, product=not shorter) if smaller else None,
        kept=contents("kept", product, stopping, product=True) if shorter else None,
        states=(streamed.states, states),
        fixed=config.quantize.activations == "static",
        report=report,
        expected=expected,
        reference=reference,
        drift=heldout[:PARITY_ROWS],
    )


def _kept_states(
    streamed: Program, targets: Sequence[Lowered], config: BuildConfig, sequences: torch.Tensor
) -> tuple[State, ...]:
    dtype = config.quantize.state
    ranges = state_ranges(streamed, sequences[:, : config.streamify.max_context]) if dtype == "int8" else None
    halves, apart = (set.intersection(*map(named, targets)) for named in (half_pasts, apart_in_another_type))
    return kept_in(streamed.states, dtype, ranges, halves, apart)


def _contents(
    loaded: LoadedModel,
    program: Program,
    report: Report,
    config: BuildConfig,
    place: Path,
    name: str,
    targets: list[Lowered],
    stopping: Lowered | None = None,
    product: bool = False,
) -> Contents:
    """The graphs of every target, written into a folder of their own in `place`, and what goes with the product.

    stopping: graphs with an attention_mask, which the product has
    """
    (place / name).mkdir()
    tokenizer = config.calibration.tokenizer
    targets = [complete(lowered, decode=product) for lowered in targets]
    stopping = complete(stopping) if product and stopping is not None else None
    files = graph_files(targets, place / name, stopping)
    if tokenizer is not None:
        files["tokenizer.json"] = tokenizer
    manifest = manifest_of(loaded, targets, program, report, tokenizer is not None, stopping is not None)
    genai = genai_of(manifest, tokenizer) if product else GenaiFiles({})
    return Contents(name, files | genai.files, manifest, frozenset(genai.files), genai.notes)


def _probe(program: Program) -> torch.Tensor:
    """Random sequences for the gates before there are real ones, [rows, time, …]."""
    return program.signal.random(PARITY_ROWS, min(PARITY_TIME, program.context), token_limit(program))


def _stand_in(recognized: Program) -> Program:
    """A streamed program near enough to the model to sample calibration tokens from."""
    try:
        return streamify(distill(recognized, SAMPLING, None).program, SAMPLED_LENGTH)
    except DistillError:  # its filters have no stable system: --exact keeps them, and so does the sampling
        return streamify(recognized, SAMPLED_LENGTH)
