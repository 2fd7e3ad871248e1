"""Signals in 16 bits: between fused operators nothing is float32 any longer.

    before                                       after
    y = Linear(x, W₁₆, b, r)     all float32     y = Linear(x, W₁₆, b, r)     all of 16 bits
    z = Cast(Gather(W₁₆, ids))                   z = Gather(W₁₆, ids)
    p = Mul(y, z)                                p = Mul(y, z)                of fp16, where fused ones alone hear p

Sums, norms and modal systems are computed in float32 inside of the operators, their tables stay in float32, and so do
the outputs of the graph and every operator that is neither fused nor elementwise. Of states see `quantize.states`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lhcompile.quantize.weights import DOMAIN

__all__ = ["FUSED", "HalfSignals"]

_FLOAT16 = ir.DataType.FLOAT16
FUSED = {"fp16": _FLOAT16, "bf16": ir.DataType.BFLOAT16, "fp8": _FLOAT16, "int4": _FLOAT16}
"""Precisions that fused operators read as they are, and the type of signals with each."""
_HEARD = {"HyenaMixer": (0,), "Linear": (0, 3), "LinearFp8": (0, 3), "LinearInt4": (0, 3), "MlpFp8": (0, 5)}
"""Inputs of fused operators that are signals; the first output is one."""
_BIASES = {"Linear": (2,), "LinearFp8": (2,), "LinearInt4": (2,), "MlpFp8": (2, 4)}
"""Their biases, which become of the same type."""
_ELEMENTWISE = {"Add", "Mul", "Sub", "Sigmoid", "Tanh", "Relu", "Gelu"}
_NUMPY = {ir.DataType.FLOAT16: np.float16, ir.DataType.BFLOAT16: ml_dtypes.bfloat16}


class HalfSignals(ir.passes.InPlacePass):
    """Signals of a graph with fused projections in `precision`, one of FUSED; nothing happens to one without."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self._dtype = FUSED[precision]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        casts = _Casts(graph, self._dtype)
        fused = [node for node in graph if node.domain == DOMAIN and node.op_type in _HEARD]
        if not any(node.op_type != "HyenaMixer" for node in fused):
            return ir.passes.PassResult(model, False)
        for node in fused:
            casts.enclose(node, _HEARD[node.op_type])
            for place in _BIASES.get(node.op_type, ()):
                if (bias := _input(node, place)) is not None:
                    node.replace_input_with(place, self._rounded(graph, bias))
        casts.cancel()
        if self._dtype == ir.DataType.FLOAT16:  # few runtimes have elementwise operators of the other type
            for node in _elementwise(graph, self._dtype):
                casts.enclose(node, range(len(node.inputs)))
            casts.cancel()
        return ir.passes.PassResult(model, True)

    def _rounded(self, graph: ir.Graph, bias: ir.Value) -> ir.Value:
        assert bias.const_value is not None
        name = f"{bias.name}.{self._dtype.name.lower()}"
        if name not in graph.initializers:
            tensor = ir.tensor(bias.const_value.numpy().astype(_NUMPY[self._dtype]), name=name)
            graph.register_initializer(_initializer(name, tensor))
        return graph.initializers[name]


class _Casts:
    """Casts between float32 and `dtype` in a graph."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self._graph, self._dtype = graph, dtype
        self._count = 0

    def enclose(self, node: ir.Node, places: Iterable[int]) -> None:
        """The node hears its inputs at `places` in `dtype` and gives its first output so; others hear float32."""
        for place in places:
            value = _input(node, place)
            if value is not None and value.dtype == ir.DataType.FLOAT:
                cast = self._cast(value, self._dtype)
                self._graph.insert_before(node, cast)
                node.replace_input_with(place, cast.outputs[0])
        self._widen(node)

    def _widen(self, node: ir.Node) -> None:
        value = node.outputs[0]
        name, kind = value.name, value.type
        value.type = ir.TensorType(self._dtype)
        cast = self._cast(value, ir.DataType.FLOAT)
        wide = cast.outputs[0]
        self._graph.insert_after(node, cast)
        ir.convenience.replace_all_uses_with(value, wide, replace_graph_outputs=True)
        cast.replace_input_with(0, value)
        value.name, wide.name, wide.type = f"{name}.half", name, kind

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Node:
        node = ir.node("Cast", [value], {"to": to.value})
        result = node.outputs[0]
        result.name, result.shape, result.type = f"signal.{self._count}", value.shape, ir.TensorType(to)
        self._count += 1
        return node

    def cancel(self) -> None:
        """What is cast to float32 and back is what it was; a value is cast once."""
        for node in list(self._graph):
            if not _is_cast(node, self._dtype) or (source := _narrow(node.inputs[0], self._dtype)) is None:
                continue
            ir.convenience.replace_all_uses_with(node.outputs[0], source)
            self._graph.remove(node, safe=True)
        for node in list(self._graph):
            unheard = not node.outputs[0].uses() and not node.outputs[0].is_graph_output()
            if node.op_type == "Cast" and not node.domain and unheard:
                self._graph.remove(node, safe=True)


def _elementwise(graph: ir.Graph, dtype: ir.DataType) -> list[ir.Node]:
    """Elementwise operators that hear nothing but what was in `dtype` and their own kind, and are heard likewise."""
    chosen = {node for node in graph if node.op_type in _ELEMENTWISE and not node.domain}
    while True:
        kept = {node for node in chosen if _stays(node, chosen, dtype)}
        if kept == chosen:
            return [node for node in graph if node in chosen]
        chosen = kept


def _stays(node: ir.Node, chosen: set[ir.Node], dtype: ir.DataType) -> bool:
    if node.outputs[0].is_graph_output():
        return False
    heard = all(
        value is not None and (value.producer() in chosen or _narrow(value, dtype) is not None) for value in node.inputs
    )
    return heard and all(user in chosen or _is_cast(user, dtype) for user in _users(node))


def _users(node: ir.Node) -> Iterator[ir.Node]:
    return (use.node for use in node.outputs[0].uses())


def _input(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _is_cast(node: ir.Node, to: ir.DataType) -> bool:
    return node.op_type == "Cast" and not node.domain and node.attributes["to"].as_int() == to.value


def _narrow(value: ir.Value | None, dtype: ir.DataType) -> ir.Value | None:
    """What a float32 value was in `dtype` before it was cast; None where it was not."""
    node = None if value is None else value.producer()
    if node is None or not _is_cast(node, ir.DataType.FLOAT):
        return None
    source = node.inputs[0]
    return source if source is not None and source.dtype == dtype else None


def _initializer(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=shape)
