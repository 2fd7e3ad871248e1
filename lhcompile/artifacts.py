"""The frozen values that pass from one stage to the next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

__all__ = ["LoadedModel", "Lowered", "Program", "State", "module_path", "source_line"]


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
    """file:line and text of the code a node was traced from."""
    trace = str(node.meta.get("stack_trace") or "").strip().splitlines()
    places = [i for i, line in enumerate(trace) if line.strip().startswith("File ")]
    if not places:
        return "source unknown"
    at = trace[places[-1]].strip()
    parts = at.split('"')
    number = at.split("line ")[-1].split(",")[0]
    text = trace[places[-1] + 1].strip() if len(trace) > places[-1] + 1 else ""
    return f"{parts[1]}:{number}: {text}"
