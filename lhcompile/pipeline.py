"""The road of a model: checkpoint in, built directory out. Opening this file is opening the table of contents.

load       torch module from checkpoint, factory or archive
capture    program of its sizes; needs nothing of what the module is
recognize  names every convolution; after capture, because laws of sizes tell time from channels
calibrate  sequences to choose by and sequences to judge by; after recognize, because sampling needs a streamed program
distill    convolutions to modal systems; before streamify, while a program still takes whole sequences
streamify  states in and out
lower      ONNX graphs
verify     parity of each stage, figures on held-out sequences
package    the directory, whole or not at all
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from lhruntime import Session

from lhcompile import verify
from lhcompile.artifacts import Program
from lhcompile.assemble import graph_files, manifest_of, report_of
from lhcompile.calibrate import SAMPLED_LENGTH, calibrate, check_readable, token_limit
from lhcompile.capture import capture
from lhcompile.config import BuildConfig, DistillConfig
from lhcompile.distill import distill
from lhcompile.errors import DistillError
from lhcompile.load import load
from lhcompile.lower import lower
from lhcompile.package import Manifest, Source, check_destination, package, size_of, workspace
from lhcompile.recognize import recognize
from lhcompile.streamify import check_capacity, streamify
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
    with progress.stage("load"):
        loaded = load(model, **dict(config.load))
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
    with workspace(config.package.output) as place:
        with progress.stage("lower"):
            lowered = lower(streamed, config.lower)
            graph = check_graphs(lowered, streamed.signal)
            files = graph_files(lowered, place)
            if config.calibration.tokenizer is not None:
                files["tokenizer.json"] = config.calibration.tokenizer
        tokenizer = "tokenizer.json" if "tokenizer.json" in files else None
        with progress.stage("verify") as say, _rehearsal(files, manifest_of(loaded, lowered, streamed), place) as onnx:
            say("feeding the graphs in every cut")
            verify.check_session(onnx, streamed, few)
            say(f"measuring on {heldout.shape[:2].numel()} held-out positions")
            stages = verify.fidelity(
                loaded.module,
                {"captured": captured, "distilled": distilled.program, "streamed": streamed, "onnx": onnx},
                heldout,
            )
        with progress.stage("package"):
            sizes = {name: size_of(file) for name, file in files.items()}
            searched = config.distill.rise if distilled.trials else None
            report = report_of(
                loaded, lowered, streamed, distilled, stages, graph, searched, sizes, progress.timings, command,
                sequences.source,
            )  # fmt: skip
            files["report.json"] = report.model_dump_json(indent=1).encode()
            files["report.html"] = render_report(report).encode()
            manifest = manifest_of(loaded, lowered, streamed, report.layers, stages, progress.timings, tokenizer)
            package(config.package.output, files, manifest, force=config.package.force)
    return report


def _probe(program: Program) -> torch.Tensor:
    """Random sequences for the gates before there are real ones, [rows, time, …]."""
    return program.signal.random(PARITY_ROWS, min(PARITY_TIME, program.context), token_limit(program))


def _stand_in(recognized: Program) -> Program:
    """A streamed program near enough to the model to sample calibration tokens from."""
    try:
        return streamify(distill(recognized, SAMPLING, None).program, SAMPLED_LENGTH)
    except DistillError:  # its filters have no stable system: --exact keeps them, and so does the sampling
        return streamify(recognized, SAMPLED_LENGTH)


@contextmanager
def _rehearsal(files: dict[str, Source], manifest: Manifest, place: Path) -> Iterator[verify.SessionModel]:
    """The graphs in a directory of their own in `place`, driven by the runtime as users will drive them."""
    directory = package(place / "rehearsal", files, manifest, force=False)
    yield verify.SessionModel(lambda batch: Session.load(directory, batch=batch, verify=False))
