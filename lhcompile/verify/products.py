"""Quantized graphs whose products are made in float32, against graphs of the rounded weights: then nothing but the
stored codes, scales and zeros is on trial, and one wrong code in one layer shows.

Kernels that round signals are told not to: com.microsoft MatMulNBits by its attribute, DequantizeLinear before MatMul
by leaving the graph as it is written, signals of fixed scales by taking them from before they are rounded, signals of
16 bits and of float8 by casting them to float32 instead. Products of bytes cannot be told; they read the tensors that
the others do.

Rounding is noise, and some models make much of it: residues of a recurrence that cancel leave their rounding behind. So
the graph of the rounded weights is also asked by how much it parts from itself where its embedding differs in the last
bits. What is on trial has no part in that.
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
from lhcompile.verify.budgets import codes_tolerance

__all__ = ["check_products"]

Array = NDArray[Any]
FLOAT32 = 1
"""accuracy_level of MatMulNBits."""
BYTES = "MatMulInteger"
FLOAT = onnx.TensorProto.FLOAT
HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
NARROW = (*HALVES, onnx.TensorProto.FLOAT8E4M3FN)
SEVERE = 3
FACTORS = "factors"
CHANGE = 2.0**-22
"""Of each channel of what enters, up or down: two or four units in the last place."""


def check_products(quantized: Path, rounded: Path, states: tuple[State, ...], tokens: torch.Tensor) -> bool:
    """Raise ParityError unless a graph means what its rounded weights do, from zero states and from what they become.

    quantized, rounded: files of the same graph; tokens: [rows, time], as many as the graphs take a call
    Returns whether the graph could be tried so: False where it has products of bytes.
    """
    model, meant = (onnx.load(path, load_external_data=False) for path in (quantized, rounded))
    if BYTES in {node.op_type for node in _nodes(model.graph)}:
        return False
    for part in (model.graph, *model.functions):
        for node in _nodes(part):
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = FLOAT32
    _unround(model.graph)
    _round_biases(meant.graph, model.graph)
    _widen(model)
    width = _take_factors(meant.graph)
    copies = [path.with_name(f"{path.stem}.exact.onnx") for path in (quantized, rounded)]
    try:
        for graph, copy in zip((model, meant), copies, strict=True):
            onnx.save(graph, copy)
        _compare(copies[0], copies[1], states, tokens, _terms(meant.graph), width)
    finally:
        for copy in copies:
            copy.unlink(missing_ok=True)
    return True


def _compare(
    mine: Path, meant: Path, states: tuple[State, ...], tokens: torch.Tensor, terms: int, width: int | None
) -> None:
    """One graph after the other, as each may hold all weights: the second call of both is from what `meant` became."""
    graph = _opened(meant, optimized=True)
    names, outputs = ([value.name for value in part] for part in (graph.get_inputs(), graph.get_outputs()))
    names = [name for name in names if name != FACTORS]
    fixed = graph.get_inputs()[0].shape[1]
    if isinstance(fixed, int):  # once more from the beginning where there are too few
        tokens = torch.cat([tokens] * -(-fixed // tokens.shape[1]), dim=1)[:, :fixed]
    memory, calls = [state.zeros(len(tokens)).numpy() for state in states], []
    for _ in range(2):
        feeds = dict(zip(names, [tokens.numpy(), *memory], strict=True))
        expected, *moved = (graph.run(None, feeds | factors) for factors in _factors(width))
        noise = [max((_share(one[i], expected[i]) for one in moved), default=0.0) for i in range(len(expected))]
        memory = [np.asarray(value) for value in expected[1:]]
        calls.append((feeds, expected, noise))
    del graph  # before another takes its memory
    graph = _opened(mine, optimized=False)
    for call, (feeds, expected, noise) in zip(("the first", "the second"), calls, strict=True):
        for name, one, other, least in zip(outputs, graph.run(None, feeds), expected, noise, strict=True):
            value, reference = torch.from_numpy(one), torch.from_numpy(other)
            assert_close(value, reference, codes_tolerance(terms, least), f"{name} of {call} call")


def _factors(width: int | None) -> list[dict[str, Array]]:
    """Feeds: ones, and twice what changes each channel a little up or down; none where nothing can be changed."""
    if width is None:
        return [{}]
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (2, width))
    return [{FACTORS: 1 + np.float32(CHANGE) * each} for each in (np.zeros(width, np.float32), *signs)]


def _share(value: Array, reference: Array) -> float:
    """The largest difference, as a share of the root mean square or of the number itself, whichever is larger."""
    if not np.issubdtype(reference.dtype, np.floating) or not reference.size:
        return 0.0
    sizes = np.abs(reference.astype(np.float64))
    sizes = np.maximum(sizes, np.sqrt(np.mean(sizes**2)))
    share = float(np.max(np.abs(value.astype(np.float64) - reference) / np.maximum(sizes, np.finfo(np.float64).tiny)))
    return share if np.isfinite(share) else 0.0


def _opened(path: Path, optimized: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = SEVERE
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> list[onnx.NodeProto]:
    found = list(graph.node)
    for node in graph.node:
        for attribute in node.attribute:
            found += _nodes(attribute.g) if attribute.HasField("g") else []
    return found


def _terms(graph: onnx.GraphProto) -> int:
    """Terms of a sum in each product with a weight, added up over the graph: at most what a logit has behind it."""
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    read = [(node, shapes.get(node.input[1])) for node in _nodes(graph) if node.op_type in ("MatMul", "Gemm", "Linear")]
    return sum(shape[_summed(node, len(shape))] for node, shape in read if shape)


def _summed(node: onnx.NodeProto, rank: int) -> int:
    """The axis of a product's weight that is summed over."""
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return -1 if node.op_type == "Linear" or transposed or rank == 1 else -2


def _take_factors(graph: onnx.GraphProto) -> int | None:
    """Makes factors of the channels that tokens become a further input, and returns how many; None: no such place."""
    ids, tables = graph.input[0].name, {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for place, node in enumerate(graph.node):
        if node.op_type == "Gather" and node.input[1] == ids and len(tables.get(node.input[0], ())) == 2:
            width, whole = tables[node.input[0]][1], node.output[0]
            node.output[0] = f"{whole}.whole"
            graph.node.insert(place + 1, onnx.helper.make_node("Mul", [node.output[0], FACTORS], [whole]))
            graph.input.append(onnx.helper.make_tensor_value_info(FACTORS, FLOAT, [width]))
            return width
    return None


def _unround(graph: onnx.GraphProto) -> None:
    """DequantizeLinear(QuantizeLinear(x, …), …) → Identity(x)"""
    rounded = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in rounded:
            whole = onnx.helper.make_node("Identity", [rounded[node.input[0]]], [node.output[0]], name=node.name)
            node.CopyFrom(whole)


def _widen(model: onnx.ModelProto) -> None:
    """Casts to fewer bits are casts to float32, in functions too, and tensors of 16 bits are cast where they are read.

    Codes in float8 and in 4 bits are cast by the function that reads them, which then rounds neither the signal nor the
    weight that it multiplies.
    """
    for part in (model.graph, *model.functions):
        del part.value_info[:]
        for node in _nodes(part):
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i in NARROW:
                    attribute.i = FLOAT
    halves = [tensor.name for tensor in model.graph.initializer if tensor.data_type in HALVES]
    _read_through(model.graph, dict.fromkeys(halves, (FLOAT,)))


def _round_biases(meant: onnx.GraphProto, quantized: onnx.GraphProto) -> None:
    """Fused operators read a bias of 16 bits under its name and that of its type; it means what it was rounded to."""
    own = {tensor.name for tensor in meant.initializer}
    kinds = {f".{onnx.TensorProto.DataType.Name(kind).lower()}": kind for kind in HALVES}
    through: dict[str, tuple[int, ...]] = {}
    for tensor in quantized.initializer:
        for suffix, kind in kinds.items():
            if tensor.name.endswith(suffix) and (name := tensor.name.removesuffix(suffix)) in own:
                through[name] = (kind, FLOAT)
    _read_through(meant, through)


def _read_through(graph: onnx.GraphProto, kinds: dict[str, tuple[int, ...]]) -> None:
    """Tensors, by name, are read as what they are after casts to these types."""
    casts, last = [], {}
    for name, chain in kinds.items():
        last[name] = name
        for kind in chain:
            after = f"{last[name]}.as.{kind}"
            casts.append(onnx.helper.make_node("Cast", [last[name]], [after], to=kind))
            last[name] = after
    for node in _nodes(graph):
        for place, name in enumerate(node.input):
            node.input[place] = last.get(name, name)
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
