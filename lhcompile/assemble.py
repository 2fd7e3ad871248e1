"""The manifest and the report of a build, put together from what the stages left."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

from lhcompile.artifacts import Distilled, LoadedModel, Lowered, Program
from lhcompile.errors import DestinationError
from lhcompile.lower import write_graphs
from lhcompile.package import Link, Source
from lhcompile.package.manifest import (
    Distillation,
    FeatureFidelity,
    Graph,
    Graphs,
    Inputs,
    Manifest,
    ModelInfo,
    Outputs,
    State,
    TokenFidelity,
    Tokenizer,
)
from lhcompile.verify import summary
from lhcompile.verify.model import BudgetReport, GraphReport, LayerReport, ModelReport, Report, StageFidelity

__all__ = ["VERSIONED", "graph_files", "manifest_of", "report_of"]

VERSIONED = ("lhcompile", "torch", "onnx", "onnxruntime", "onnxscript", "numpy")
STEP, PREFILL = "step.onnx", "prefill.onnx"


def graph_files(lowered: Lowered, place: Path) -> dict[str, Source]:
    """Both graphs, and their weights if those are large, as files in the workspace `place`, for `package`.

    Raises DestinationError where they cannot be written.
    """
    try:
        paths = write_graphs({STEP: lowered.step, PREFILL: lowered.prefill}, place)
    except OSError as error:
        raise DestinationError(f"cannot write into {place.parent}: {error.strerror or error}") from error
    return {path.name: Link(path) for path in paths}


def manifest_of(
    loaded: LoadedModel,
    lowered: Lowered,
    program: Program,
    layers: list[LayerReport] | None = None,
    stages: list[StageFidelity] | None = None,
    timings: dict[str, float] | None = None,
    tokenizer: str | None = None,
) -> Manifest:
    """manifest.json without its file list, which packaging fills in.

    tokenizer: name of the tokenizer file in the directory, None for a byte model or one that takes ids.
    """
    tokens = program.signal.features is None
    modal = [layer for layer in layers or [] if not layer.kept]
    return Manifest(
        lhcompile_version=version("lhcompile"),
        target=lowered.target,  # type: ignore[arg-type]
        model=ModelInfo(
            family=loaded.family,
            vocab_size=program.vocabulary if tokens else None,
            context_length=program.context,
            parameters=loaded.parameters,
        ),
        tokenizer=_tokenizer(program, tokenizer),
        graphs=Graphs(step=Graph(file=STEP), prefill=Graph(file=PREFILL)),
        inputs=Inputs(**{"tokens" if tokens else "features": program.signal.input}),
        outputs=Outputs(**{"logits" if tokens else "values": program.signal.output}),
        states=[
            State(
                input=state.name,
                output=state.output,
                shape=["batch", *state.shape],
                dtype=state.dtype,  # type: ignore[arg-type]
                kind=state.kind,
                module=state.module,
                capacity=state.capacity,
            )
            for state in lowered.states
        ],
        distillation=[
            Distillation(
                module=layer.module,
                method=layer.method,
                filters=layer.filters,
                order_max=layer.order_max,
                order_mean=layer.order_mean,
                tap_error=layer.tap_error or 0.0,
                hankel_bound=layer.hankel_bound,
            )
            for layer in modal
        ],
        fidelity=_fidelity(stages),
        timings={name: round(seconds, 3) for name, seconds in (timings or {}).items()},
    )


def _tokenizer(program: Program, file: str | None) -> Tokenizer | None:
    if program.signal.features is not None:
        return None
    if file is not None:
        return Tokenizer(kind="tokenizers", file=file)
    return Tokenizer(kind="bytes") if program.reads_bytes else Tokenizer(kind="none")


def _fidelity(stages: list[StageFidelity] | None) -> TokenFidelity | FeatureFidelity | None:
    if not stages:
        return None
    first, last = stages[0], stages[-1]
    if last.relative_error is not None:
        return FeatureFidelity.model_validate(
            {
                "positions": last.tokens,
                "relative_error": last.relative_error,
                "max_difference": last.max_difference,
            }
        )
    return TokenFidelity.model_validate(
        {
            "tokens": last.tokens,
            "loss_reference": first.loss,
            "loss_compiled": last.loss,
            "kl_mean": last.kl_mean,
            "top1_agreement": last.top1_agreement,
        }
    )


def report_of(
    loaded: LoadedModel,
    lowered: Lowered,
    program: Program,
    distilled: Distilled,
    stages: list[StageFidelity],
    graph: GraphReport,
    budget: float | None,
    files: dict[str, int],
    timings: dict[str, float],
    command: str,
    calibration: str,
) -> Report:
    """Everything the build has to say.

    budget: the relative rise asked for, None where an order was given; calibration: where the sequences came from
    """
    rise = stages[-1].relative_error
    if stages[0].loss and stages[-1].loss is not None:
        rise = (stages[-1].loss - stages[0].loss) / abs(stages[0].loss)
    signal = program.signal
    blocks = len({_block(state.module) for state in lowered.states})
    return Report(
        model=ModelReport(
            family=loaded.family,
            source=loaded.source,
            parameters=loaded.parameters,
            vocab_size=program.vocabulary if signal.features is None else None,
            features=signal.features,
            context_length=program.context,
        ),
        target=lowered.target,
        command=command,
        versions={name: version(name) for name in VERSIONED},
        calibration=calibration,
        notes=list(loaded.notes),
        stages=stages,
        layers=summary.layers_of(distilled, lowered.states),
        samples=summary.samples_of(distilled),
        spectra=summary.spectra_of(distilled),
        poles=summary.poles_of(distilled),
        budget=None
        if budget is None
        else BudgetReport(requested=budget, measured=rise, orders=summary.orders_tried(distilled)),
        healing=summary.healing_of(distilled),
        graph=graph.model_copy(update={"nodes_per_layer": graph.step_nodes / blocks if blocks else None}),
        state_bytes=summary.state_bytes(lowered.states),
        capacity=program.capacity,
        timings=timings,
        files=files,
    )


def _block(path: str) -> str:
    """The part of a module path up to its first number: one layer of the model."""
    match = re.match(r".*?\b\d+\b", path)
    return match.group(0) if match else path
