"""Quantized graphs whose products are made in float32, against graphs of the rounded weights: then nothing but the
stored codes, scales and zeros is on trial, and one wrong code in one layer shows.

Kernels that round signals are told not to: com.microsoft MatMulNBits by its attribute, DequantizeLinear before MatMul
by leaving the graph as it is written, signals of fixed scales by taking them from before they are rounded. Products of
bytes cannot be told; they read the tensors that the others do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from lhcompile.artifacts import State
from lhcompile.verify import assert_close
from lhcompile.verify.budgets import CODES

__all__ = ["check_products"]

Array = NDArray[Any]
FLOAT32 = 1
"""accuracy_level of MatMulNBits."""
BYTES = {"MatMulInteger", "LinearFp8"}
PRODUCTS = {"MatMul", "Linear"}
SEVERE = 3


def check_products(quantized: Path, rounded: Path, states: tuple[State, ...], tokens: torch.Tensor) -> bool:
    """Raise ParityError unless a graph means what its rounded weights do, from zero states and from what they become.

    quantized, rounded: files of the same graph; tokens: [rows, time], as many as the graphs take a call
    Returns whether the graph could be tried so.
    """
    model = onnx.load(quantized, load_external_data=False)
    if any(node.op_type in BYTES for node in _nodes(model.graph)) or _multiplies_halves(model):
        return False
    beside = quantized.with_name(f"{quantized.stem}.exact.onnx")
    for node in _nodes(model.graph):
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = FLOAT32
    _unround(model.graph)
    onnx.save(model, beside)
    try:
        _compare(_opened(beside, False), _opened(rounded, True), states, tokens)
    finally:
        beside.unlink()
    return True


def _compare(
    mine: onnxruntime.InferenceSession,
    meant: onnxruntime.InferenceSession,
    states: tuple[State, ...],
    tokens: torch.Tensor,
) -> None:
    names = [value.name for value in mine.get_inputs()]
    outputs = [value.name for value in mine.get_outputs()]
    fixed = mine.get_inputs()[0].shape[1]
    if isinstance(fixed, int):  # once more from the beginning where there are too few
        tokens = torch.cat([tokens] * -(-fixed // tokens.shape[1]), dim=1)[:, :fixed]
    memory = [state.zeros(len(tokens)).numpy() for state in states]
    for call in ("the first", "the second"):
        feeds = dict(zip(names, [tokens.numpy(), *memory], strict=True))
        found, expected = mine.run(None, feeds), meant.run(None, feeds)
        for name, one, other in zip(outputs, found, expected, strict=True):
            assert_close(torch.from_numpy(one), torch.from_numpy(other), CODES, f"{name} of {call} call")
        memory = [np.asarray(value) for value in expected[1:]]


def _opened(path: Path, optimized: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = SEVERE
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    found = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            found += _nodes(attribute.g) if attribute.HasField("g") else []
    return found


def _unround(graph: onnx.GraphProto) -> None:
    """DequantizeLinear(QuantizeLinear(x, …), …) → Identity(x)"""
    rounded = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded:
            whole = onnx.helper.make_node("Identity", [rounded[node.input[0]]], [node.output[0]], name=node.name)
            node.CopyFrom(whole)


def _multiplies_halves(model: onnx.ModelProto) -> bool:
    """Whether a product reads numbers of 16 bits."""
    halves = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    names = {tensor.name for tensor in model.graph.initializer if tensor.data_type in halves}
    return any(names & set(node.input) for node in model.graph.node if node.op_type in PRODUCTS)
