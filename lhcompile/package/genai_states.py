"""States as onnxruntime-genai keeps them: names, and graphs that pack any states into one pair.

Axes: n the numbers of all states together, a row. Whatever is not float32 is cast to it and back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from lhcompile.package.manifest import State

__all__ = ["OWN", "PACKED", "Names", "are_own", "numbers", "pack", "unpack"]

OPSET, IR_VERSION = 20, 10
FLOAT = ir.TensorType(ir.DataType.FLOAT)


class Names(NamedTuple):
    """What the two tensors of layer %d are called, conv_state before recurrent_state, and their successors."""

    past: tuple[str, str]
    present: tuple[str, str]


OWN = Names(
    ("past_key_values.%d.conv_state", "past_key_values.%d.recurrent_state"),
    ("present.%d.conv_state", "present.%d.recurrent_state"),
)
PACKED = Names(
    ("genai_past.%d.conv_state", "genai_past.%d.recurrent_state"),
    ("genai_present.%d.conv_state", "genai_present.%d.recurrent_state"),
)


def numbers(state: State) -> int:
    """Numbers a row; all axes but batch have sizes."""
    return math.prod(_sizes(state))


def are_own(states: list[State]) -> bool:
    """Whether genai keeps the states themselves: a pair a layer by its names, of one shape and dtype in all layers."""
    wanted = {name % layer for layer in range(len(states) // 2) for name in OWN.past}
    if not states or {state.input for state in states} != wanted:
        return False
    conv, recurrent = ([s for s in states if s.input.endswith(kind)] for kind in (".conv_state", ".recurrent_state"))
    equal = all((s.shape, s.dtype) == (kind[0].shape, kind[0].dtype) for kind in (conv, recurrent) for s in kind)
    floats = all(state.dtype.startswith("float") for state in states)
    return equal and floats and len(conv[0].shape) <= 3 and len(recurrent[0].shape) <= 4


def unpack(states: list[State]) -> bytes:
    """ONNX: [batch, 1, n − 1], [batch, 1, 1] → every state"""
    halves = [_value(name % 0, size) for name, size in zip(PACKED.past, _halves(states), strict=True)]
    graph, tape = _graph("unpack", halves)
    row = tape.op("Concat", halves, {"axis": 2})
    for state, part in zip(states, _split(tape, row, list(map(numbers, states))), strict=True):
        value = tape.op("Reshape", [part, _ints(tape, 0, *_sizes(state))])
        if state.dtype != "float32":
            value = tape.op("Cast", [value], {"to": _type(state).dtype})
        value.name, value.shape, value.type = state.input, ir.Shape(state.shape), _type(state)
        graph.outputs.append(value)
    return _serialized(graph)


def pack(states: list[State]) -> bytes:
    """ONNX: the successor of every state → [batch, 1, n − 1], [batch, 1, 1]"""
    new = [ir.Value(name=state.output, shape=ir.Shape(state.shape), type=_type(state)) for state in states]
    graph, tape = _graph("pack", new)
    floats = [
        value if state.dtype == "float32" else tape.op("Cast", [value], {"to": FLOAT.dtype})
        for state, value in zip(states, new, strict=True)
    ]
    rows = [tape.op("Reshape", [value, _ints(tape, 0, 1, -1)]) for value in floats]
    row = tape.op("Concat", rows, {"axis": 2})
    for half, name, size in zip(_split(tape, row, _halves(states)), PACKED.present, _halves(states), strict=True):
        half.name, half.shape, half.type = name % 0, ir.Shape(["batch", 1, size]), FLOAT
        graph.outputs.append(half)
    return _serialized(graph)


def _halves(states: list[State]) -> list[int]:
    """genai wants two tensors: the last number is the second."""
    return [sum(map(numbers, states)) - 1, 1]


def _sizes(state: State) -> list[int]:
    return [size for size in state.shape if isinstance(size, int)]


def _type(state: State) -> ir.TensorType:
    return ir.TensorType(ir.DataType.from_numpy(np.dtype(state.dtype)))


def _value(name: str, size: int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(["batch", 1, size]), type=FLOAT)


def _graph(name: str, inputs: list[ir.Value]) -> tuple[ir.Graph, Tape]:
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": OPSET}, name=name)
    return graph, Tape(graph)


def _split(tape: Tape, row: ir.Value, sizes: list[int]) -> list[ir.Value]:
    return list(tape.op_multi_out("Split", [row, _ints(tape, *sizes)], {"axis": 2}, num_outputs=len(sizes)))


def _ints(tape: Tape, *values: int) -> ir.Value:
    return tape.op("Constant", [], {"value_ints": list(values)})


def _serialized(graph: ir.Graph) -> bytes:
    return ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, producer_name="lhcompile")).SerializeToString()
