"""The frozen values that pass from one stage to the next."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx import node as fx_node

from lhcompile.ssm import ModalSSM

__all__ = [
    "LARGEST_HALF",
    "MASK",
    "Allotted",
    "Distilled",
    "DistilledLayer",
    "LoadedModel",
    "Lowered",
    "Part",
    "Past",
    "Program",
    "Quantized",
    "Sequences",
    "Signal",
    "State",
    "Trial",
    "map_leaves",
    "map_nodes",
    "module_path",
    "source_line",
]

LARGEST_HALF = 65504.0
"""The largest number of float16."""
MASK = "attention_mask"
"""Name of the input that stops rows, int64 [batch, total], where graphs have one."""

map_nodes: Callable[..., Any] = fx_node.map_arg
"""map_nodes(arguments, f): nested arguments with each Node replaced by f(node)."""

map_leaves: Callable[..., Any] = fx_node.map_aggregate
"""map_leaves(arguments, f): nested arguments with every leaf replaced by f(leaf)."""


@dataclass(frozen=True)
class Signal:
    """What runs through a model: token ids, or the features of a continuous signal.

    features: channels of the input float32 [batch, seq, features], which becomes values float32 [batch, seq, channels];
        None for token ids int64 [batch, seq], which become logits float32 [batch, seq, vocab]
    """

    features: int | None = None

    @classmethod
    def read_by(cls, placeholder: Node) -> Signal:
        """The signal that the first input of a program takes, by its meta["sizes"]."""
        sizes = placeholder.meta["sizes"]
        return cls(int(sizes[2].offset)) if len(sizes) == 3 else cls()

    @property
    def dtype(self) -> torch.dtype:
        return torch.int64 if self.features is None else torch.float32

    @property
    def input(self) -> str:
        """Name of the graphs' data input."""
        return "input_ids" if self.features is None else "inputs"

    @property
    def output(self) -> str:
        """Name of the graphs' data output."""
        return "logits" if self.features is None else "outputs"

    def __str__(self) -> str:
        return "token ids" if self.features is None else f"{self.features} features"

    @property
    def width(self) -> str:
        """What the last axis of the output counts."""
        return "vocabulary" if self.features is None else "channels"

    def constant(self, batch: int, time: int) -> Tensor:
        """Sequences of the first token, or of ones: [batch, time] or [batch, time, features]."""
        if self.features is None:
            return torch.zeros(batch, time, dtype=torch.int64)
        return torch.ones(batch, time, self.features)

    def random(self, batch: int, time: int, tokens: int, seed: int = 0) -> Tensor:
        """Sequences of random ids below `tokens`, or of white noise of size 1; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        if self.features is None:
            return torch.randint(0, tokens, (batch, time), generator=generator)
        return torch.randn(batch, time, self.features, generator=generator)


@dataclass(frozen=True)
class LoadedModel:
    """What `load` hands to capture.

    module: eval mode, float32, on the CPU; forward maps what `signal` says: token ids int64 [batch, seq] to logits
        float [batch, seq, vocab], or features float32 [batch, seq, features] to values [batch, seq, channels]
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
    signal: Signal = Signal()


@dataclass(frozen=True)
class State:
    """One state of a streamed program.

    name:   the graph's input; `output` is the output holding its successor
    shape:  without the leading batch axis
    kind:   "fir" (latest inputs of a short convolution), "modal" (a modal system's states), "long_conv" (latest
            inputs of a convolution kept whole), "key" or "value" (of attention, at every position so far), or
            "position" (how many tokens each row has taken)
    module: path of the module it belongs to
    dtype:  "float32" or "int64"; "float16" or "int8" where it is kept so between calls
    capacity: how many positions it has room for; None where it is the same at any length
    scales: of int8, what a code of 1 means, float32, broadcast against `shape`
    """

    name: str
    output: str
    shape: tuple[int, ...]
    kind: str
    module: str
    dtype: str = "float32"
    capacity: int | None = None
    scales: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def bytes(self) -> int:
        """Size of one row."""
        return math.prod(self.shape) * self._torch.itemsize

    def zeros(self, batch: int) -> Tensor:
        """The state at the beginning of a sequence, [batch, *shape]."""
        return torch.zeros(batch, *self.shape, dtype=self._torch)

    def kept(self, value: Tensor) -> Tensor:
        """The numbers [batch, *shape] as they are kept, in its own dtype: to nearest and no larger than fits."""
        if self.scales is not None:
            codes = (value * (1 / self.scales)).round()
            return codes.clamp(-128, 127).to(torch.int8)
        if self.dtype == "float16":
            return value.clamp(-LARGEST_HALF, LARGEST_HALF).half()
        return value

    def meant(self, kept: Tensor) -> Tensor:
        """What kept numbers mean, float32; the inverse of `kept` but for rounding."""
        if self.scales is not None:
            return kept.float() * self.scales
        return kept.float() if self.dtype == "float16" else kept

    @property
    def _torch(self) -> torch.dtype:
        return {
            "float32": torch.float32, "int64": torch.int64, "float16": torch.float16, "int8": torch.int8
        }[self.dtype]  # fmt: skip


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
    def signal(self) -> Signal:
        """What the program reads."""
        return Signal.read_by(next(node for node in self.graph.graph.nodes if node.op == "placeholder"))

    @property
    def reads_bytes(self) -> bool:
        """Whether token ids are taken to be bytes when no tokenizer is given: exactly 256 of them."""
        return self.signal.features is None and self.vocabulary == 256

    @property
    def vocabulary(self) -> int:
        """Number of logits, or values, at each position."""
        (output,) = [node for node in self.graph.graph.nodes if node.op == "output"]
        logits = output.args[0][0] if isinstance(output.args[0], tuple) else output.args[0]
        return int(logits.meta["sizes"][-1].offset)

    @property
    def capacity(self) -> int | None:
        """How many positions a streamed program's states have room for; None where they take any number."""
        return min((state.capacity for state in self.states if state.capacity is not None), default=None)

    def start(self, batch: int) -> list[Tensor]:
        """The states at the beginning of `batch` sequences."""
        return [state.zeros(batch) for state in self.states]

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [batch, time, vocab] of whole sequences [batch, time], from zero states."""
        result = self.graph(tokens, *self.start(tokens.shape[0]))
        return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True)
class Sequences:
    """Sequences to calibrate on, others that calibration never sees, and their source.

    calibration, judging, heldout: int64 [sequences, time], or float32 [sequences, time, features]; what is chosen by
        the first is held against a budget on the second, and gives figures on the third
    sampled: they were drawn from the model itself
    """

    calibration: Tensor
    judging: Tensor
    heldout: Tensor
    source: str
    sampled: bool = False


@dataclass(frozen=True)
class DistilledLayer:
    """What one long convolution became, or a modal system of the model's own, whose error is zero.

    taps: [filters, length] of the source, [filters, 0] of a modal system; system: what stands for them, None where
        the taps are kept
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
    expected: an upper bound of the relative rise on other text, which is held against the budget
    Of a continuous signal: the relative squared error of the outputs for the loss, its root for the rises.
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
class Past:
    """A state that a decode graph has as one tensor a token: its inputs, the oldest token first; output: the newest.

    dtype: of the tensors, where it is not the state's: "bfloat16" where the state is float32 and holds no other numbers
    """

    inputs: list[str]
    output: str
    dtype: str | None = None


@dataclass(frozen=True)
class Lowered:
    """Both ONNX graphs of a model for one target; inputs and outputs as in the built directory's contract.

    prefill: the step graph itself where one token at a time is all there is; batch: rows, None for any number
    precision: of the weights; "none": float32, as they came
    decode: the step graph with the choice of the next token behind it, where the target has one
    past: of its states, by their input in the step, those that it has as one tensor a token
    """

    step: ir.Model
    prefill: ir.Model
    target: str
    states: tuple[State, ...]
    batch: int | None = None
    precision: str = "none"
    decode: ir.Model | None = None
    past: Mapping[str, Past] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One kind of weight that was quantized: number of distinct tensors, their bytes before and after."""

    name: str
    tensors: int
    before: int
    after: int


@dataclass(frozen=True)
class Allotted:
    """The precision that one weight was given by what rounding it costs; bytes: as stored

    alone: the divergence if it alone is rounded to the fewest bits, nats per token; left: what is expected to be left
    """

    name: str
    precision: str
    bytes: int
    alone: float
    left: float


@dataclass(frozen=True)
class Quantized:
    """Graphs with quantized weights, and what they mean.

    rounded: the graphs that came in, each quantized weight replaced by its value in float32, computed when it is read
    inner_step: the step graph in a form that runs inside of other graphs, where the step graph's own does not
    """

    lowered: Lowered
    rounded: Lowered
    parts: tuple[Part, ...] = ()
    inner_step: ir.Model | None = None


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
