"""Quantized graphs whose products are made in float32, against graphs of the rounded weights: then nothing but the
stored codes, scales and zeros is on trial, and one wrong code in one layer shows.

Kernels that round signals are told not to: com.microsoft MatMulNBits by its attribute, DequantizeLinear before MatMul
by leaving the graph as it is written, signals of fixed scales by taking them from before they are rounded, signals of
16 bits and of float8 by casting them to float32 instead. Products of bytes cannot be told; they read the tensors that
the others do.

Fused mixers have no codes on trial, and their rounding is the larger the more residues cancel the direct term: both
graphs make theirs in double precision.
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
from lhcompile.verify.budgets import Tolerance, codes_tolerance

__all__ = ["check_products"]

Array = NDArray[Any]
FLOAT32 = 1
"""accuracy_level of MatMulNBits."""
BYTES = "MatMulInteger"
MIXERS, INDEX = ("HyenaMixer", "HyenaStep"), "index"
FLOAT, DOUBLE = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
NARROW = (*HALVES, onnx.TensorProto.FLOAT8E4M3FN)
SEVERE = 3


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
    for function in (*model.functions, *meant.functions):
        if function.name in MIXERS:
            _in_double(function)
    copies = [path.with_name(f"{path.stem}.exact.onnx") for path in (quantized, rounded)]
    try:
        for graph, copy in zip((model, meant), copies, strict=True):
            onnx.save(graph, copy)
        tolerance = codes_tolerance(_terms(meant.graph))
        _compare(copies[0], copies[1], states, tokens, tolerance)
    finally:
        for copy in copies:
            copy.unlink(missing_ok=True)
    return True


def _compare(mine: Path, meant: Path, states: tuple[State, ...], tokens: torch.Tensor, tolerance: Tolerance) -> None:
    """One graph after the other, as each may hold all weights: the second call of both is from what `meant` became."""
    graph = _opened(meant, optimized=True)
    names, outputs = ([value.name for value in part] for part in (graph.get_inputs(), graph.get_outputs()))
    fixed = graph.get_inputs()[0].shape[1]
    if isinstance(fixed, int):  # once more from the beginning where there are too few
        tokens = torch.cat([tokens] * -(-fixed // tokens.shape[1]), dim=1)[:, :fixed]
    memory, calls = [state.zeros(len(tokens)).numpy() for state in states], []
    for _ in range(2):
        feeds = dict(zip(names, [tokens.numpy(), *memory], strict=True))
        expected = graph.run(None, feeds)
        memory = [np.asarray(value) for value in expected[1:]]
        calls.append((feeds, expected))
    del graph  # before another takes its memory
    graph = _opened(mine, optimized=False)
    for call, (feeds, expected) in zip(("the first", "the second"), calls, strict=True):
        for name, one, other in zip(outputs, graph.run(None, feeds), expected, strict=True):
            assert_close(torch.from_numpy(one), torch.from_numpy(other), tolerance, f"{name} of {call} call")


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


def _in_double(function: onnx.FunctionProto) -> None:
    """What a function computes in float32 in double precision; what it returns is float32, int64 and int32 stay."""
    nodes = _nodes(function)
    for node in nodes:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == FLOAT:
                attribute.i = DOUBLE
            if attribute.HasField("t") and attribute.t.data_type == FLOAT:
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(attribute.t).astype("f8")))
            for value in (*attribute.g.input, *attribute.g.output):
                if value.type.tensor_type.elem_type == FLOAT:
                    value.type.tensor_type.elem_type = DOUBLE
    read = {name for node in nodes for name in node.input} - {INDEX}
    wide = {name: f"{name}.wide" for name in function.input if name in read}
    narrow = {name: f"{name}.wide" for name in function.output}
    for node in nodes:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                names[place] = wide.get(name, narrow.get(name, name))
    body = list(function.node)
    del function.node[:]
    cast = onnx.helper.make_node
    function.node.extend(cast("Cast", [name], [into], to=DOUBLE) for name, into in wide.items())
    function.node.extend(body)
    function.node.extend(cast("Cast", [into], [name], to=FLOAT) for name, into in narrow.items())


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
