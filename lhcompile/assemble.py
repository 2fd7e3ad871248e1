"""The manifest and the report of a build, put together from what the stages left."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lhcompile.artifacts import Allotted, Distilled, LoadedModel, Lowered, Part, Program, Quantized
from lhcompile.artifacts import State as LoweredState
from lhcompile.config import BuildConfig
from lhcompile.errors import DestinationError
from lhcompile.lower import WEIGHTS_NAME, weight_places, write_graphs
from lhcompile.package import Link, Source
from lhcompile.package.genai import GenaiFiles, genai_files
from lhcompile.package.manifest import (
    Distillation,
    ExternalWeights,
    FeatureFidelity,
    Graph,
    Graphs,
    Inputs,
    Manifest,
    ModelInfo,
    Outputs,
    Past,
    State,
    TokenFidelity,
    Tokenizer,
    Weight,
)
from lhcompile.verify import summary
from lhcompile.verify.model import (
    BudgetReport,
    GraphReport,
    ModelReport,
    Report,
    RoundingBudget,
    StageFidelity,
    WeightPrecision,
    WeightsReport,
)

__all__ = [
    "VERSIONED",
    "fidelity_of",
    "genai_of",
    "graph_files",
    "graph_names",
    "manifest_of",
    "report_of",
    "rounding_of",
]

DECODE = "decode"
MASKED = ("step.masked.onnx", "prefill.masked.onnx")
VERSIONED = ("lhcompile", "torch", "onnx", "onnxruntime", "onnxscript", "numpy")


def graph_names(targets: Sequence[Lowered]) -> list[tuple[str, str]]:
    """File names of each target's step and prefill graphs; the same twice where one graph is both."""
    names = []
    for index, lowered in enumerate(targets):
        step, prefill = (f"{kind}{f'.{lowered.target}' if index else ''}.onnx" for kind in ("step", "prefill"))
        names.append((step, step if lowered.prefill is lowered.step else prefill))
    return names


def decode_names(targets: Sequence[Lowered]) -> list[str | None]:
    """File name of each target's decode graph, None where it has none."""
    names = [f"{DECODE}{f'.{lowered.target}' if index else ''}.onnx" for index, lowered in enumerate(targets)]
    return [None if lowered.decode is None else name for lowered, name in zip(targets, names, strict=True)]


def graph_files(targets: Sequence[Lowered], place: Path, masked: Lowered | None = None) -> dict[str, Source]:
    """The graphs of every target, and their weights if those are large or shared, as files in the workspace `place`.

    masked: and those with an attention_mask
    Raises DestinationError where they cannot be written.
    """
    graphs: dict[str, ir.Model] = {}
    for lowered, names in zip(targets, graph_names(targets), strict=True):
        graphs |= dict(zip(names, (lowered.step, lowered.prefill), strict=True))
    pairs = zip(decode_names(targets), targets, strict=True)
    more = {name: lowered.decode for name, lowered in pairs if name is not None and lowered.decode is not None}
    if masked is not None:
        more |= dict(zip(MASKED, (masked.step, masked.prefill), strict=True))
    try:
        paths = write_graphs(graphs | more, place, shared=bool(more) or len(targets) > 1)
    except OSError as error:
        raise DestinationError(f"cannot write into {place.parent}: {error.strerror or error}") from error
    return {path.name: Link(path) for path in paths}


def genai_of(manifest: Manifest, tokenizer: Path | None) -> GenaiFiles:
    """What onnxruntime-genai reads beside the graphs; tokenizer: the file that becomes tokenizer.json."""
    return genai_files(manifest, None if tokenizer is None else tokenizer.read_bytes(), manifest.masked)


def manifest_of(
    loaded: LoadedModel,
    targets: Sequence[Lowered],
    program: Program,
    report: Report,
    tokenizer: bool,
    mask: bool = False,
) -> Manifest:
    """manifest.json without figures of the graphs, and without its file list, which packaging fills in.

    tokenizer: there is a tokenizer.json; without one the model reads bytes or takes ids
    mask: there are graphs with an attention_mask
    """
    tokens = program.signal.features is None
    modal = [layer for layer in report.layers if not layer.kept]
    first = targets[0]
    graphs = {
        lowered.target: Graphs(
            step=_graph(step, lowered.step),
            prefill=_graph(prefill, lowered.prefill),
            decode=None if decode is None or lowered.decode is None else _graph(decode, lowered.decode),
            past={name: Past(**asdict(each)) for name, each in lowered.past.items()} or None,
            batch=lowered.batch,
        )
        for lowered, (step, prefill), decode in zip(targets, graph_names(targets), decode_names(targets), strict=True)
    }
    return Manifest(
        lhcompile_version=version("lhcompile"),
        target=first.target,  # type: ignore[arg-type]
        quantize=first.precision,  # type: ignore[arg-type]
        model=ModelInfo(
            family=loaded.family,
            vocab_size=program.vocabulary if tokens else None,
            context_length=program.context,
            parameters=loaded.parameters,
        ),
        tokenizer=_tokenizer(program, tokenizer),
        graphs=graphs[first.target],
        variants={target: each for target, each in graphs.items() if target != first.target} or None,  # type: ignore[misc]
        masked=Graphs(step=Graph(file=MASKED[0]), prefill=Graph(file=MASKED[1])) if mask else None,
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
            for state in first.states
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
    )


def _graph(file: str, model: ir.Model) -> Graph:
    """The entry of a graph that was written."""
    tensors = {
        name: Weight(offset=place.offset, dtype=place.dtype, shape=list(place.shape))
        for name, place in weight_places(model).items()
    }
    return Graph(file=file, weights=ExternalWeights(file=WEIGHTS_NAME, tensors=tensors) if tensors else None)


def _tokenizer(program: Program, file: bool) -> Tokenizer | None:
    if program.signal.features is not None:
        return None
    if file:
        return Tokenizer(kind="tokenizers", file="tokenizer.json")
    return Tokenizer(kind="bytes") if program.reads_bytes else Tokenizer(kind="none")


def fidelity_of(stages: list[StageFidelity]) -> TokenFidelity | FeatureFidelity:
    """The manifest's figures: the last stage against the first."""
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
    quantized: Quantized,
    program: Program,
    distilled: Distilled,
    stages: list[StageFidelity],
    graph: GraphReport,
    budget: float,
    command: str,
    calibration: str,
) -> Report:
    """Everything the build has to say but for the graphs' own figures (`Report.measured`).

    stages: those in torch; budget: the relative rise allowed; calibration: where the sequences came from
    """
    signal, lowered = program.signal, quantized.lowered
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
        quantize=lowered.precision,
        weights=[WeightsReport(**vars(part)) for part in quantized.parts],
        command=command,
        versions={name: _version(name) for name in VERSIONED},
        calibration=calibration,
        notes=list(loaded.notes),
        stages=stages,
        layers=summary.layers_of(distilled, lowered.states),
        samples=summary.samples_of(distilled),
        spectra=summary.spectra_of(distilled),
        poles=summary.poles_of(distilled),
        budget=BudgetReport(requested=budget, orders=summary.orders_tried(distilled)) if distilled.trials else None,
        healing=summary.healing_of(distilled),
        graph=graph.model_copy(update={"nodes_per_layer": graph.step_nodes / blocks if blocks else None}),
        state_bytes=summary.state_bytes(lowered.states),
        capacity=program.capacity,
    )


def rounding_of(
    config: BuildConfig,
    poles: Part | None,
    allotted: Sequence[Allotted],
    fixed: tuple[int, int],
    states: Sequence[LoweredState],
) -> dict[str, Any]:
    """The parts of a report that say how numbers were rounded, but for the weights.

    poles: what their codes take, where they are rounded; allotted: the precision of each weight, where a budget chose
    it; fixed: signals rounded by fixed scales, and of how many; states: as the product keeps them
    """
    budget = None
    if config.weights_budget is not None:
        weights = [WeightPrecision(**vars(each)) for each in allotted]
        budget = RoundingBudget(requested=config.weights_budget, weights=weights)
    return {
        "poles_coded": None if poles is None else WeightsReport(**vars(poles)),
        "pole_bits": config.quantize.poles,
        "rounding": budget,
        "fixed_signals": fixed if config.quantize.activations == "static" else None,
        "state": config.quantize.state,
        "state_bytes": summary.state_bytes(tuple(states)),
    }


def _block(path: str) -> str:
    """The part of a module path up to its first number: one layer of the model."""
    match = re.match(r".*?\b\d+\b", path)
    return match.group(0) if match else path


def _version(module: str) -> str:
    """As the module says it, for onnxruntime comes in distributions of several names; else as its distribution does."""
    return str(getattr(import_module(module), "__version__", None) or version(module))
