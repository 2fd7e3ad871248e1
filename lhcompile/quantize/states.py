"""States kept in fewer bits between calls: graphs read them into float32, and round what they leave behind.

    float16   s = Cast(q),            q' = Cast(Clip(s', ±65504))
    int8      s = Cast(q) ∘ scales,   q' = QuantizeLinear(s' ∘ 1/scales, 1, 0), which saturates

The last tokens of a signal that is float16 in the graphs of all targets are kept in float16 where float32 is asked
for, which loses nothing. Those that the loops of all targets have in a type of their own stay as they are.

Inside of a call states are float32 in every graph, so a prompt that is fed whole rounds them once. A fused operator
reads and leaves float16 itself, and does the same. The scales of int8 are fixed: what a number reached on calibration
tokens, with some room, is 127. Numbers that only move from place to place, as in a short convolution or a cache, share
the scale of their channel, so moving them rounds nothing again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from lhcompile.artifacts import LARGEST_HALF, Lowered, Program, State
from lhcompile.config import StateType
from lhcompile.parallel import one_thread
from lhcompile.quantize.weights import DOMAIN

__all__ = ["half_pasts", "keep_states", "kept_in", "state_ranges"]

ROOM = 1.1
"""Largest number that int8 holds, as a multiple of the largest on calibration tokens."""
LEVELS = 127
_MOVED = {"fir": -2, "long_conv": -2, "key": -2, "value": -2}
"""Kinds of states whose numbers move along an axis."""
_STATES = (1, 2)
"""Places of a HyenaMixer's states, among its inputs and its outputs."""
_TYPES = {"float16": ir.DataType.FLOAT16, "int8": ir.DataType.INT8}


@one_thread()
@torch.no_grad()
def state_ranges(program: Program, sequences: Tensor) -> dict[str, Tensor]:
    """The largest |number| in every entry of every state of a streamed program on sequences [rows, time, …], [*shape]
    by name; looked at after every token, for modal states peak between any two looks."""
    states = program.start(len(sequences))
    found = [torch.zeros(state.shape[1:], dtype=state.dtype) for state in states]
    for token in sequences.split(1, dim=1):
        _, *states = program.graph(token, *states)
        found = [torch.maximum(old, state.abs().amax(0)) for old, state in zip(found, states, strict=True)]
    return dict(zip((state.name for state in program.states), found, strict=True))


def half_pasts(lowered: Lowered) -> set[str]:
    """Names of the states that hold the last tokens of a float16 signal in both graphs: float16 keeps all of them."""
    return _half_pasts(lowered.step.graph) & _half_pasts(lowered.prefill.graph)


def _half_pasts(graph: ir.Graph) -> set[str]:
    found = set()
    for node in graph:
        if not _is_mixer(node):
            continue
        signal, past = node.inputs[0], node.inputs[_STATES[0]]
        assert signal is not None
        assert past is not None
        if signal.dtype == ir.DataType.FLOAT16 and _is_kept_by_its_operator(past, node.outputs[_STATES[0]]):
            found.add(str(past.name))
    return found


def kept_in(
    states: Sequence[State],
    dtype: StateType,
    ranges: dict[str, Tensor] | None,
    halves: Collection[str] = (),
    apart: Collection[str] = (),
) -> tuple[State, ...]:
    """The states with those of float32 in `dtype`.

    ranges: of `state_ranges`, for int8
    halves: names of those that float16 keeps exactly (`half_pasts`), and which are kept so where `dtype` is float32
    apart: names of those that stay float32 where it is float16: the loop that needs few bytes has them in another type
    """

    def kept(state: State) -> State:
        if state.dtype != "float32" or (dtype == "float16" and state.name in apart):
            return state
        return _kept_in(state, "float16" if dtype == "float32" and state.name in halves else dtype, ranges)

    return tuple(map(kept, states))


def _kept_in(state: State, dtype: StateType, ranges: dict[str, Tensor] | None) -> State:
    if dtype != "int8":
        return replace(state, dtype=dtype)
    assert ranges is not None
    largest = ranges[state.name]
    if state.kind in _MOVED:
        largest = largest.amax(_MOVED[state.kind], keepdim=True)
    largest = torch.where(largest > 0, largest, 1.0)
    return replace(state, dtype=dtype, scales=(largest * (ROOM / LEVELS)).float())


def keep_states(lowered: Lowered, states: tuple[State, ...]) -> Lowered:
    """Both graphs with their states kept as `states` say (`kept_in`); those that came in stay as they are."""
    step = _kept(lowered.step, states)
    prefill = step if lowered.prefill is lowered.step else _kept(lowered.prefill, states)
    return replace(lowered, step=step, prefill=prefill, states=states)


def _kept(model: ir.Model, states: tuple[State, ...]) -> ir.Model:
    model = model.clone()
    _KeepStates(states)(model)
    return model


class _KeepStates(ir.passes.InPlacePass):
    """Before: s float32 → graph → s' float32. After: q → s → graph → s' → q', q and q' under the old names.

    Where a fused operator alone reads s and leaves s', in float16: q → operator → q'.
    """

    def __init__(self, states: Sequence[State]) -> None:
        super().__init__()
        self._states = [state for state in states if state.dtype in _TYPES]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for state in self._states:
            (value,) = [value for value in model.graph.inputs if value.name == state.name]
            (new,) = [value for value in model.graph.outputs if value.name == state.output]
            if state.dtype == "float16" and _is_kept_by_its_operator(value, new):
                value.type = new.type = ir.TensorType(_TYPES[state.dtype])
                continue
            _read(model.graph, value, state)
            _leave(model.graph, new, state)
        return ir.passes.PassResult(model, bool(self._states))


def _is_kept_by_its_operator(value: ir.Value, new: ir.Value) -> bool:
    """Whether a fused operator that takes states of 16 bits, and nothing besides, reads `value` and leaves `new`."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output() or new.uses():
        return False
    node, place = uses[0]
    return _is_mixer(node) and place in _STATES and node.outputs[place] is new


def _is_mixer(node: ir.Node) -> bool:
    return node.domain == DOMAIN and node.op_type == "HyenaMixer"


def _read(graph: ir.Graph, value: ir.Value, state: State) -> None:
    """What the graph reads is float32; its input is kept."""
    nodes = [ir.node("Cast", [value], {"to": ir.DataType.FLOAT.value})]
    if state.scales is not None:
        scales = _constant(graph, f"{state.name}.scales", state.scales.numpy())
        nodes.append(ir.node("Mul", [nodes[0].outputs[0], scales]))
    for index, node in enumerate(nodes):
        _named(node, f"{state.name}.read.{index}", value.shape)
    last = nodes[-1].outputs[0]
    ir.convenience.replace_all_uses_with(value, last)
    nodes[0].replace_input_with(0, value)
    first = next(iter(graph))
    graph.insert_before(first, nodes)
    value.type = ir.TensorType(_TYPES[state.dtype])


def _leave(graph: ir.Graph, value: ir.Value, state: State) -> None:
    """The graph's output is what is kept of the float32 one."""
    place = graph.outputs.index(value)
    value.name = f"{state.output}.float32"
    dtype = _TYPES[state.dtype]
    if state.scales is not None:
        inverse = _constant(graph, f"{state.name}.inverse", (1 / state.scales).numpy())
        first = ir.node("Mul", [value, inverse])
        one = _constant(graph, "states.one", np.array(1, np.float32))
        zero = _constant(graph, "states.zero", np.array(0, np.int8))
        last = ir.node("QuantizeLinear", [first.outputs[0], one, zero])
    else:
        ends = [_constant(graph, f"states.{name}", np.array(x, np.float32)) for name, x in _ENDS.items()]
        first = ir.node("Clip", [value, *ends])
        last = ir.node("Cast", [first.outputs[0]], {"to": dtype.value})
    for index, node in enumerate((first, last)):
        _named(node, f"{state.output}.left.{index}", value.shape)
    graph.extend([first, last])
    kept = last.outputs[0]
    kept.name, kept.shape, kept.type = state.output, value.shape, ir.TensorType(dtype)
    graph.outputs[place] = kept


_ENDS = {"least": -LARGEST_HALF, "largest": LARGEST_HALF}


def _named(node: ir.Node, name: str, shape: ir.Shape | None) -> None:
    """Names a node and its float32 output, as whoever reads types and shapes needs them."""
    node.name = name
    (value,) = node.outputs
    value.name, value.shape, value.type = name, shape, ir.TensorType(ir.DataType.FLOAT)


def _constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
        value = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape)
        )
        graph.register_initializer(value)
    return graph.initializers[name]
