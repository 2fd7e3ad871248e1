"""Stage: program of whole sequences in, program with states in and out.

    before                                            after
    y, _ = lhc.fir(x, w, b, None, groups)             y, s' = lhc.fir(x, w, b, s, groups)      s a graph input
    y, _, _ = lhc.attention(q, k, v, None, …, a)      y, k', v' = lhc.attention(q, k, v, keys, values, at, a)
    places, _ = lhc.position(ids, None)               places, at' = lhc.position(ids, at)
    return logits                                     return logits, s', k', v', …, at'

Everything else in a recognized program treats each position on its own and passes through. The result takes any
number of tokens, so a sequence may be fed whole, in cuts or token by token. Where something depends on the absolute
position, one counter for the whole program says where each row stands; keys, values and tables that are read by
position have room for `capacity` positions.
"""

from __future__ import annotations

import copy
import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from lhcompile import ops  # noqa: F401  (registers lhc::)
from lhcompile.artifacts import Program, State, module_path
from lhcompile.errors import ConfigError
from lhcompile.streamify.names import names_of

__all__ = ["check_capacity", "streamify"]

aten, lhc = torch.ops.aten, torch.ops.lhc
_STATE_ARGUMENTS = {
    lhc.fir.default: {"fir": 3},
    lhc.long_conv.default: {"long_conv": 2},
    lhc.modal_ssm.default: {"modal": 6},
    lhc.attention.default: {"key": 3, "value": 4},
}
"""Operators with memory of their own: the kind of each state and the argument that takes it, in the order in which
its successors follow the result."""
_START = 5
"""Attention's argument that takes the counter."""


def check_capacity(program: Program, capacity: int | None) -> None:
    """Raise ConfigError for a --max-context that a recognized program cannot have."""
    if capacity is None:
        return
    if capacity > program.context:
        raise ConfigError(f"--max-context {capacity} is above the model's context of {program.context} positions")
    if not _growing(program.graph.graph):
        raise ConfigError("--max-context: no state of this model grows with the sequence")


def streamify(program: Program, capacity: int | None = None) -> Program:
    """Give every operator with memory its state as a graph input and its successor as an output.

    capacity: positions that there is room for where something grows with the sequence; None for the context
    """
    module = copy.copy(program.graph)
    module.__dict__["_buffers"] = dict(program.graph._buffers)
    module.graph = copy.deepcopy(program.graph.graph)
    room = program.context if capacity is None else min(capacity, program.context)
    keepers = [node for node in module.graph.nodes if node.target in _STATE_ARGUMENTS]
    layers = [(kind, module_path(node)) for node in keepers for kind in _STATE_ARGUMENTS[node.target]]
    names, inputs = iter(names_of(layers)), _Inputs(module.graph)
    states: list[State] = []
    for node in keepers:
        shapes = _shapes(module, node, room)
        for index, ((kind, place), shape) in enumerate(zip(_STATE_ARGUMENTS[node.target].items(), shapes, strict=True)):
            growing = room if kind in ("key", "value") else None
            states.append(State(*next(names), shape, kind, module_path(node), capacity=growing))
            inputs.give(node, place, states[-1].name, index + 1)
    if _growing(module.graph):
        states.append(State("past.position", "present.position", (1,), "position", "the model", "int64", room))
        _count(module, inputs, room)
    inputs.close()
    module.recompile()
    return Program(graph=module, context=program.context, states=tuple(states))


class _Inputs:
    """The states' placeholders behind the data input, and their successors behind the logits."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.signal = self._last = next(node for node in graph.nodes if node.op == "placeholder")
        (self._output,) = [node for node in graph.nodes if node.op == "output"]
        self._successors: list[Node] = []

    def add(self, name: str) -> Node:
        with self._graph.inserting_after(self._last):
            self._last = self._graph.placeholder(re.sub(r"\W", "_", name))
        return self._last

    def give(self, node: Node, place: int, name: str, result: int) -> None:
        """A state for the argument at `place` of `node`, whose successor is its result of that index."""
        node.update_arg(place, self.add(name))
        with self._graph.inserting_before(self._output):
            self._successors.append(self._graph.call_function(operator.getitem, (node, result)))

    def close(self) -> None:
        self._output.args = ((self._output.args[0], *self._successors),)


def _growing(graph: Graph) -> list[Node]:
    """The operators that depend on the absolute position."""
    return [node for node in graph.nodes if node.target in (lhc.attention.default, lhc.position.default)]


def _count(module: GraphModule, inputs: _Inputs, room: int) -> None:
    """One counter for all that depends on the position, and tables of `room` positions."""
    graph = module.graph
    found = [node for node in graph.nodes if node.target == lhc.position.default]
    if not found:
        with graph.inserting_after(inputs.signal):
            found = [graph.call_function(lhc.position.default, (inputs.signal, None))]
    (position,) = found
    inputs.give(position, 1, "past.position", 1)
    start = position.args[1]
    last = start
    assert isinstance(last, Node)
    last.append(position)  # behind every placeholder
    for node in graph.nodes:
        if node.target == lhc.attention.default:
            node.update_arg(_START, start)
    places = [user for user in position.users if user.args[1] == 0]
    for read in [user for place in places for user in place.users if user.target == aten.embedding.default]:
        name = str(read.args[0].target)
        module.register_buffer(name, _buffer(module, read.args[0])[:room].contiguous())


def _shapes(module: GraphModule, node: Node, room: int) -> Sequence[tuple[int, ...]]:
    """The shapes of an operator's states without batch, from its weights and its input's channels."""
    if node.target == lhc.attention.default:
        return [(size[2].offset, room, size[3].offset) for size in (arg.meta["sizes"] for arg in node.args[1:3])]  # type: ignore[union-attr]
    weight = _buffer(module, node.args[1])
    if node.target == lhc.fir.default:
        groups = node.args[4]
        assert isinstance(groups, int)
        return [(weight.shape[2] - 1, weight.shape[1] * groups)]
    channels = node.args[0].meta["sizes"][2].offset  # type: ignore[union-attr]
    if node.target == lhc.long_conv.default:
        return [(weight.shape[-1] - 1, channels)]
    if node.args[5] is None:
        return [(weight.shape[0], channels)]
    return [(1, channels // weight.shape[1] * len(_buffer(module, node.args[5])))]


def _buffer(module: GraphModule, node: Any) -> Tensor:
    return getattr(module, str(node.target))
