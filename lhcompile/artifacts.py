"""The frozen values that pass from one stage to the next."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx import node as fx_node

from lhcompile.ssm import ModalSSM

__all__ = [
    "Distilled",
    "DistilledLayer",
    "LoadedModel",
    "Lowered",
    "Program",
    "State",
    "Tokens",
    "Trial",
    "map_leaves",
    "map_nodes",
    "module_path",
    "source_line",
]

map_nodes: Callable[..., Any] = fx_node.map_arg
"""map_nodes(arguments, f): nested arguments with each Node replaced by f(node)."""

map_leaves: Callable[..., Any] = fx_node.map_aggregate
"""map_leaves(arguments, f): nested arguments with every leaf replaced by f(leaf)."""


@dataclass(frozen=True)
class LoadedModel:
    """What `load` hands to capture.

    module: eval mode, float32, on the CPU; forward maps input_ids int64 [batch, seq] to
        logits float [batch, seq, vocab]
    family: "safari-hyena", "module" or "export"
    context_length: the longest sequence the module accepts; None when the source does not say
    parameters: number of trained numbers, tied weights counted once
    source: the file or the `package.module:factory` the module came from
    config: the resolved options, for the report
    notes: what was assumed or skipped, one line each
    """

    module: nn.Module
    family: str
    context_length: int | None
    parameters: int
    source: str
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class State:
    """One state of a streamed program.

    name:   the graph's input; `output` is the output holding its successor
    shape:  without the leading batch axis
    kind:   "fir" (latest inputs of a short convolution), "modal" (a modal system's states) or
            "long_conv" (latest inputs of a convolution kept whole)
    module: path of the module it belongs to
    """

    name: str
    output: str
    shape: tuple[int, ...]
    kind: str
    module: str


@dataclass(frozen=True)
class Program:
    """A model as a torch.fx graph that runs in torch at every stage.

    graph(input_ids [batch, time]) -> logits before streaming, and
    graph(input_ids, *states) -> (logits, *new states) after it; `states` tells which.
    context: the longest sequence the source model is defined on.
    """

    graph: GraphModule
    context: int
    states: tuple[State, ...] = ()

    @property
    def reads_bytes(self) -> bool:
        """Whether token ids are taken to be bytes when no tokenizer is given: exactly 256 of them."""
        return self.vocabulary == 256

    @property
    def vocabulary(self) -> int:
        """Number of logits at each position."""
        (output,) = [node for node in self.graph.graph.nodes if node.op == "output"]
        logits = output.args[0][0] if isinstance(output.args[0], tuple) else output.args[0]
        return int(logits.meta["sizes"][-1].offset)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [batch, time, vocab] of whole sequences [batch, time], from zero states."""
        states = [torch.zeros(tokens.shape[0], *state.shape) for state in self.states]
        result = self.graph(tokens, *states)
        return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True)
class Tokens:
    """Sequences [sequences, time] to calibrate on, others that calibration never sees, and their source.

    sampled: they were drawn from the model itself
    """

    calibration: Tensor
    heldout: Tensor
    source: str
    sampled: bool = False


@dataclass(frozen=True)
class DistilledLayer:
    """What one long convolution became.

    taps: [filters, length] of the source; system: what stands for them, None where the taps are kept
    head: [filters, k − 1], what is added to taps 1 … k − 1 of the system, where the first k are kept exactly
    orders: int [filters], real state dimensions; error: relative l2 error of the taps [filters]; bound: what no system
    of that order can go below, same norm [filters]; heard_error: the error weighted by the input's spectrum [filters]
    hankel_singular_values: [filters, k], relative to the Frobenius norm
    channels: channels that run through these filters
    """

    module: str
    method: str
    channels: int
    taps: Tensor
    system: ModalSSM | None = None
    head: Tensor | None = None
    orders: Tensor | None = None
    error: Tensor | None = None
    bound: Tensor | None = None
    heard_error: Tensor | None = None
    hankel_singular_values: Tensor | None = None

    def fitted(self) -> Tensor:
        """The taps of what stands for the filters, like `taps`; those themselves where they are kept."""
        if self.system is None:
            return self.taps
        taps = self.system.taps(self.taps.shape[1])
        if self.head is not None:
            count = min(self.head.shape[1], taps.shape[1] - 1)
            taps[:, 1 : 1 + count] += self.head[:, :count]
        return taps


@dataclass(frozen=True)
class Trial:
    """One allocation of the search, measured on calibration tokens.

    order: mean over the filters; loss: nats per token; rise: of the loss, relative to the source's
    expected: the relative rise to be expected of other tokens, which the budget is held against
    """

    order: float
    loss: float
    rise: float
    expected: float


@dataclass(frozen=True)
class Distilled:
    """The program with its long convolutions replaced, layer by layer, and how the order was found.

    healed: loss before and after healing, on calibration tokens that it did not train on (for tokens sampled from the
    model, the KL divergence); where it did not fall, the layers are as they were before
    """

    program: Program
    layers: tuple[DistilledLayer, ...]
    trials: tuple[Trial, ...] = ()
    healed: tuple[float, float] | None = None


@dataclass(frozen=True)
class Lowered:
    """Both ONNX graphs of a model for one target; inputs and outputs as in the built directory's contract."""

    step: ir.Model
    prefill: ir.Model
    target: str
    states: tuple[State, ...]


def module_path(node: Node) -> str:
    """Dotted path of the module a node was traced in; "the model" for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values() if entry[0]]
    return (paths[-1].removeprefix("inner.").removeprefix("inner") if paths else "") or "the model"


def source_line(node: Node) -> str:
    """file:line and text of the code a node was traced from: the innermost of the user's own, not torch's."""
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    places = [i for i, line in enumerate(trace) if line.strip().startswith("File ")]
    places = [i for i in places if os.path.dirname(torch.__file__) not in trace[i]] or places
    if not places:
        return "source unknown"
    at = trace[places[-1]].strip()
    parts = at.split('"')
    number = at.split("line ")[-1].split(",")[0]
    text = trace[places[-1] + 1].strip() if len(trace) > places[-1] + 1 else ""
    return f"{parts[1]}:{number}: {text}"
