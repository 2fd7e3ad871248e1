"""A hand-made pair of graphs with every kind of constant, and how the tests run one."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from lhcompile.artifacts import Lowered, State

__all__ = ["INSIDE", "KEPT", "QUANTIZED", "VOCAB", "WIDTH", "inputs", "run", "session", "toy"]

Array = NDArray[Any]
VOCAB, WIDTH, INSIDE = 22, 80, 33
"""Widths that smaller blocks divide, and that none does: an odd number of codes, the last block of one."""
QUANTIZED = ("embedding", "projection", "head")
KEPT = ("places", "taps", "norm", "bias", "poles", "observe")
_FLOAT, _INT = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT64)


def toy(target: str) -> Lowered:
    """x = embedding[ids] + places[position]; its mixed short convolution with two taps; norm; projection and bias;
    poles; a product of three axes; head. The tensors of both graphs are equal, not the same; both read `projection`
    twice."""
    states = (
        State("past.position", "present.position", (1,), "position", "toy", dtype="int64"),
        State("past.fir", "present.fir", (1, WIDTH), "fir", "toy"),
    )
    return Lowered(step=_graph("step"), prefill=_graph("prefill"), target=target, states=states)


def session(model: ir.Model, optimized: bool = True, **options: str) -> onnxruntime.InferenceSession:
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    if not optimized:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, value in options.items():
        settings.add_session_config_entry(f"session.{name}", value)
    return onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )


def run(opened: onnxruntime.InferenceSession, lowered: Lowered, time: int, rows: int = 2) -> list[Array]:
    """Outputs for `inputs`."""
    return [np.asarray(output) for output in opened.run(None, inputs(lowered, time, rows))]


def inputs(lowered: Lowered, time: int, rows: int = 2) -> dict[str, Array]:
    """Random tokens [rows, time] and random states, the same every time."""
    generator = np.random.default_rng(time)
    feeds: dict[str, Array] = {"input_ids": generator.integers(0, 20, (rows, time))}
    for state in lowered.states:
        ints = state.dtype == "int64"
        feeds[state.name] = np.ones((rows, *state.shape), np.int64)
        if not ints:
            feeds[state.name] = generator.standard_normal((rows, *state.shape)).astype(np.float32)
    return feeds


class _Toy:
    """Operators and weights as they are added."""

    def __init__(self, name: str) -> None:
        self.random = np.random.default_rng(0)
        self.nodes: list[ir.Node] = []
        self.weights: dict[str, ir.Value] = {}
        self.step = name == "step"

    def weight(self, name: str, *shape: int) -> ir.Value:
        if name not in self.weights:
            array = self.random.standard_normal(shape).astype(np.float32) / np.float32(shape[0] ** 0.5)
            self.weights[name] = self.constant(name, array)
        return self.weights[name]

    def constant(self, name: str, array: Array) -> ir.Value:
        tensor = ir.tensor(array, name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
        return self.weights.setdefault(name, value)

    def ints(self, *values: int) -> ir.Value:
        return self.constant(f"ints{values}", np.array(values, np.int64))

    def op(self, name: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        self.nodes.append(ir.node(name, inputs, attributes))
        return self.nodes[-1].outputs[0]

    def convolved(self, x: ir.Value, state: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Two taps that mix all channels: of one token a product with a matrix, as the lowering writes it."""
        taps = self.random.standard_normal((2, WIDTH, WIDTH)).astype(np.float32) / np.float32(WIDTH)
        window = self.op("Concat", state, x, axis=1)
        after = self.op("Slice", window, self.ints(-1), self.ints(2**62), self.ints(1))
        if self.step:
            flat = self.op("Reshape", window, self.ints(0, 1, 2 * WIDTH))
            return self.op("MatMul", flat, self.constant("taps", taps.reshape(-1, WIDTH))), after
        channels = self.op("Transpose", window, perm=[0, 2, 1])
        kernel = self.constant("taps", np.ascontiguousarray(taps.transpose(2, 1, 0)))
        return self.op("Transpose", self.op("Conv", channels, kernel), perm=[0, 2, 1]), after


def _graph(name: str) -> ir.Model:
    toy = _Toy(name)
    seq = 1 if name == "step" else "seq"
    ids = ir.Value(name="input_ids", type=_INT, shape=ir.Shape(["batch", seq]))
    place = ir.Value(name="past.position", type=_INT, shape=ir.Shape(["batch", 1]))
    state = ir.Value(name="past.fir", type=_FLOAT, shape=ir.Shape(["batch", 1, WIDTH]))
    x = toy.op("Gather", toy.weight("embedding", VOCAB, WIDTH), ids, axis=0)
    x = toy.op("Add", x, toy.op("Gather", toy.weight("places", 8, WIDTH), place, axis=0))
    y, after = toy.convolved(x, state)
    x = toy.op("LayerNormalization", toy.op("Add", x, y), toy.weight("norm", WIDTH), axis=-1)
    projection = toy.weight("projection", WIDTH, INSIDE)
    y = toy.op("Mul", toy.op("MatMul", x, projection), toy.weight("poles", 1, INSIDE))
    y = toy.op("Add", y, toy.op("Add", toy.op("MatMul", x, projection), toy.weight("bias", INSIDE)))
    y = toy.op("MatMul", y, toy.weight("observe", 1, INSIDE, INSIDE))
    logits = toy.op("MatMul", y, toy.weight("head", INSIDE, VOCAB))
    moved = toy.op("Add", place, toy.ints(1))
    outputs = (("logits", logits, _FLOAT, ["batch", seq, VOCAB]), ("present.position", moved, _INT, ["batch", 1]))
    for title, value, kind, shape in (*outputs, ("present.fir", after, _FLOAT, ["batch", 1, WIDTH])):
        value.name, value.type, value.shape = title, kind, ir.Shape(shape)
    graph = ir.Graph(
        [ids, place, state],
        [logits, moved, after],
        nodes=toy.nodes,
        initializers=tuple(toy.weights.values()),
        opset_imports={"": 20},
        name=name,
    )
    return ir.Model(graph, ir_version=10)
