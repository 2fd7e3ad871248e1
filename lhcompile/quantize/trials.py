"""A lowered model on calibration sequences, with other numbers in place of some weights, or with its signals listened
to. Weights that may be exchanged are inputs of the graph that have defaults, so one session serves every trial."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor

from lhcompile.artifacts import Lowered, State

__all__ = ["Range", "Trials", "signal_ranges"]

Array = NDArray[Any]
INLINE = 1_500_000_000
"""Bytes of weights up to which a graph is opened from memory."""
SEVERE = 3


class Trials:
    """The prefill graph of a lowered model as a function of sequences, from zero states.

    model: that graph, or a copy of it; exchanged: names of initializers that a trial may give other numbers
    """

    def __init__(self, lowered: Lowered, model: ir.Model, exchanged: Sequence[str] = ()) -> None:
        model.graph.inputs.extend(model.graph.initializers[name] for name in exchanged)
        self._states, self._rows = lowered.states, lowered.batch
        tokens = model.graph.inputs[0]
        self._tokens, self._logits = str(tokens.name), str(model.graph.outputs[0].name)
        assert tokens.shape is not None
        self._piece = tokens.shape[1] if isinstance(tokens.shape[1], int) else None
        self._after = [state.output for state in lowered.states]
        self._session = _opened(model)

    def __call__(self, rows: Tensor, weights: Mapping[str, Array] | None = None) -> Tensor:
        """Logits or values of sequences [rows, time, …]; weights: by name, in place of the graph's own"""
        return torch.from_numpy(self.outputs([self._logits], rows, weights)[0])

    def outputs(self, names: Sequence[str], rows: Tensor, weights: Mapping[str, Array] | None = None) -> list[Array]:
        """Those outputs, each of all rows and pieces one after another along its first and second axis."""
        found = [self._fed(names, some.numpy(), weights or {}) for some in rows.split(self._rows or len(rows))]
        return [np.concatenate(parts, axis=0) for parts in zip(*found, strict=True)]

    def _fed(self, names: Sequence[str], tokens: Array, weights: Mapping[str, Array]) -> list[Array]:
        states = [state.zeros(len(tokens)).numpy() for state in self._states]
        parts, length = [], self._piece or tokens.shape[1]
        for start in range(0, tokens.shape[1], length):
            piece = tokens[:, start : start + length]
            missing = length - piece.shape[1]  # in the last, where their number is fixed: filled up, and cut off again
            feeds = {self._tokens: _filled(piece, missing), **_named(self._states, states), **weights}
            results = self._session.run([*names, *self._after], feeds)
            parts.append([result[:, : piece.shape[1]] for result in results[: len(names)]])
            states = results[len(names) :]
        return [np.concatenate(some, axis=1) for some in zip(*parts, strict=True)]


@dataclass(frozen=True)
class Range:
    """Smallest and largest number of a signal, and its mean square."""

    low: float
    high: float
    square: float

    @property
    def error(self) -> float:
        """Of rounding it to 8 bits between its ends, the root mean square as a share of its own: a step over √12."""
        step = (max(self.high, 0.0) - min(self.low, 0.0)) / 255
        return step / 12**0.5 / max(self.square, 1e-30) ** 0.5

    def with_other(self, other: Range) -> Range:
        """Both signals together, half of each."""
        return Range(min(self.low, other.low), max(self.high, other.high), (self.square + other.square) / 2)


def signal_ranges(
    lowered: Lowered, model: ir.Model, signals: Mapping[str, ir.Value], rows: Tensor
) -> dict[str, Range]:
    """The range of each signal of the graph `model`, a copy of the prefill graph, on sequences [rows, time, …]."""
    names = [name for index, value in enumerate(signals.values()) for name in _told(model.graph, index, value)]
    trials = Trials(lowered, model)
    found = [trials.outputs(names, row[None]) for row in rows]
    each = [np.concatenate([outputs[i].ravel() for outputs in found]) for i in range(len(names))]
    return {
        name: Range(float(low.min()), float(high.max()), float(square.mean()))
        for name, low, high, square in zip(signals, each[0::3], each[1::3], each[2::3], strict=True)
    }


def _told(graph: ir.Graph, index: int, value: ir.Value) -> list[str]:
    """New outputs [1, 1] of a graph: the smallest, the largest number of a signal, and its mean square."""
    shape = "signals.shape"
    if shape not in graph.initializers:
        tensor = ir.tensor(np.array([1, 1]), name=shape)
        graph.register_initializer(ir.Value(name=shape, const_value=tensor))
    squared = ir.node("Mul", [value, value])
    squared.outputs[0].name = f"signals.{index}.squared"
    graph.append(squared)
    names = []
    for reduce, of in (("ReduceMin", value), ("ReduceMax", value), ("ReduceMean", squared.outputs[0])):
        number = ir.node(reduce, [of], {"keepdims": 0})
        wide = ir.node("Reshape", [number.outputs[0], graph.initializers[shape]])
        output = wide.outputs[0]
        output.name, number.outputs[0].name = f"signals.{index}.{reduce}", f"signals.{index}.{reduce}.number"
        output.type, output.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, 1])
        graph.extend([number, wide])
        graph.outputs.append(output)
        names.append(output.name)
    return names


def _filled(piece: Array, missing: int) -> Array:
    """So many tokens or features like the last behind it."""
    return np.concatenate([piece, np.repeat(piece[:, -1:], missing, axis=1)], axis=1)


def _named(states: Sequence[State], values: Sequence[Array]) -> dict[str, Array]:
    return dict(zip((state.name for state in states), values, strict=True))


def _opened(model: ir.Model) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = SEVERE
    options.intra_op_num_threads = torch.get_num_threads()
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size <= INLINE:
        content: Any = ir.to_proto(model).SerializeToString()
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "trial.onnx"
        ir.save(model, path, external_data="weights.bin")
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
