"""Feeding sequences to streamed programs, in torch and in onnxruntime, and the gate that compares two of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from lhcompile.artifacts import Lowered, Program, State
from lhcompile.package import package
from lhcompile.package.manifest import Graph, Graphs, Inputs, Manifest, ModelInfo, Outputs, Past
from lhcompile.package.manifest import State as StateEntry
from lhcompile.streamify import streamify

__all__ = [
    "PARITY",
    "Built",
    "Stream",
    "assert_parity",
    "assert_same_model",
    "feed",
    "onnx_stream",
    "serialized",
    "torch_stream",
    "write_directory",
    "zero_states",
]

Stream = Callable[[Tensor, list[Tensor]], tuple[Tensor, list[Tensor]]]
"""tokens [batch, time], states → logits [batch, time, vocabulary], new states"""

PARITY = 1e-5
"""Largest difference, as a share of the largest value. Float32 rounding through these few layers was measured at 5e-7
at most; the mildest mutant of tests/gates lies at 1e-3."""


@dataclass(frozen=True)
class Built:
    """A tiny model after two stages; tests must not change it."""

    program: Program
    lowered: Lowered


def torch_stream(program: Program) -> Stream:
    """A streamed program as it is."""

    def run(tokens: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        with torch.no_grad():
            logits, *after = program.graph(tokens, *states)
        return logits, after

    return run


def serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


def onnx_stream(lowered: Lowered) -> Stream:
    """Both graphs in onnxruntime: the step graph for single tokens, the prefill graph for more."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    step, prefill = (
        onnxruntime.InferenceSession(serialized(model), options, providers=["CPUExecutionProvider"])
        for model in (lowered.step, lowered.prefill)
    )

    def call(tokens: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        session = step if tokens.shape[1] == 1 else prefill
        names = [value.name for value in session.get_inputs()]
        arrays = [value.numpy() for value in (tokens, *states)]
        logits, *after = session.run(None, dict(zip(names, arrays, strict=True)))
        return torch.from_numpy(np.asarray(logits)), [torch.from_numpy(np.asarray(state)) for state in after]

    piece = prefill.get_inputs()[0].shape[1]
    if not isinstance(piece, int):
        return call

    def run(tokens: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Calls of the prefill graph for as many tokens as it takes, and of the step graph for what is left."""
        return feed(call, tokens, states, [piece] * (tokens.shape[1] // piece) + [1] * (tokens.shape[1] % piece))

    return run


def write_directory(program: Program, lowered: Lowered, destination: Path) -> Path:
    """The graphs as a built directory."""
    manifest = Manifest(
        lhcompile_version="0",
        target="portable",
        model=ModelInfo(family="module", vocab_size=program.vocabulary, context_length=program.context, parameters=0),
        graphs=Graphs(
            step=Graph(file="step.onnx"),
            prefill=Graph(file="prefill.onnx"),
            decode=Graph(file="decode.onnx") if lowered.decode is not None else None,
            past={name: Past(**asdict(each)) for name, each in lowered.past.items()} or None,
        ),
        inputs=Inputs(tokens="input_ids"),
        outputs=Outputs(logits="logits"),
        states=[
            StateEntry(
                input=state.name,
                output=state.output,
                shape=["batch", *state.shape],
                dtype=state.dtype,  # type: ignore[arg-type]
                kind=state.kind,
                module=state.module,
                capacity=state.capacity,
            )
            for state in program.states
        ],
    )
    graphs = {"step": lowered.step, "prefill": lowered.prefill, "decode": lowered.decode}
    files = {f"{name}.onnx": serialized(graph) for name, graph in graphs.items() if graph is not None}
    return package(destination, files, manifest, force=False)


def zero_states(states: Sequence[State], batch: int) -> list[Tensor]:
    return [state.zeros(batch) for state in states]


def feed(stream: Stream, tokens: Tensor, states: list[Tensor], cuts: Iterable[int]) -> tuple[Tensor, list[Tensor]]:
    """tokens in pieces of the lengths `cuts`, and what is left in one more piece."""
    ends = [0]
    for cut in cuts:
        ends.append(min(ends[-1] + cut, tokens.shape[1]))
    ends.append(tokens.shape[1])
    logits = []
    for start, end in pairwise(ends):
        if end > start:
            part, states = stream(tokens[:, start:end], states)
            logits.append(part)
    return torch.cat(logits, dim=1), states


def assert_parity(
    stream: Stream, reference: Stream, states: Sequence[State], tokens: Tensor, cuts: Sequence[int] = ()
) -> None:
    """`stream` fed in cuts gives the logits and the final states of `reference` fed whole, both from zero states.

    Raises AssertionError naming the first output that differs.
    """
    expected, expected_states = feed(reference, tokens, zero_states(states, tokens.shape[0]), [])
    logits, after = feed(stream, tokens, zero_states(states, tokens.shape[0]), cuts)
    names = ["logits", *(state.output for state in states)]
    for name, mine, theirs in zip(names, [logits, *after], [expected, *expected_states], strict=True):
        assert_close(mine, theirs, f"{name} at cuts {list(cuts)}")


def assert_same_model(program: Program, module: nn.Module) -> None:
    """A recognized program gives the module's logits, whole and streamed in cuts, at the context length and below."""
    streamed = streamify(program)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, program.vocabulary, (3, program.context), generator=generator)
    for length in (program.context, program.context // 2 + 1, 1):
        with torch.no_grad():
            expected, whole = module(tokens[:, :length]), program.graph(tokens[:, :length])
        assert_close(whole, expected, f"the recognized program at length {length}")
        stream, states = torch_stream(streamed), zero_states(streamed.states, 3)
        logits, _ = feed(stream, tokens[:, :length], states, [3, 5, 1, 1])
        assert_close(logits, expected, f"the streamed program at length {length}")


def assert_close(mine: Tensor, theirs: Tensor, what: str) -> None:
    assert mine.shape == theirs.shape, f"{what} has shape {tuple(mine.shape)}, not {tuple(theirs.shape)}"
    assert bool(torch.isfinite(mine).all()), f"{what}: not finite"
    difference, scale = float((mine - theirs).abs().max()), float(theirs.abs().max())
    assert difference <= PARITY * scale, f"{what}: differs by {difference:.2e} where values reach {scale:.2e}"
