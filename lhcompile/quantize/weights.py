"""Which weights of a graph are quantized: matrices that signals are multiplied with, and the tokens' embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["DOMAIN", "LINEAR", "SpellGemm", "Use", "matrices", "tables"]

Array = NDArray[Any]
DOMAIN, LINEAR = "lhcompile", "Linear"
_MOVES = {"Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze"}


@dataclass(frozen=True)
class Use:
    """An operator that reads a quantized weight, which is its input `index`: [inputs, outputs] of a MatMul, [outputs,
    inputs] of a fused Linear, [entries, width] of a Gather."""

    node: ir.Node
    index: int

    @property
    def value(self) -> ir.Value:
        value = self.node.inputs[self.index]
        assert value is not None
        return value

    @property
    def signal(self) -> ir.Value:
        """The other input."""
        value = self.node.inputs[1 - self.index]
        assert value is not None
        return value

    @property
    def looked_up(self) -> bool:
        return self.node.op_type == "Gather"

    @property
    def fused(self) -> bool:
        return self.node.op_type == LINEAR

    @property
    def by_rows(self) -> bool:
        """Whether the weight's own layout is that of `rows`."""
        return self.looked_up or self.fused

    def rows(self) -> Array:
        """The weight as [rows, columns], float32: a row is summed over by one output, or is one entry."""
        return self.laid_out(_array(self.value))

    def laid_out(self, array: Array) -> Array:
        """Between the weight's own layout and `rows`, either way, and no copy."""
        return array if self.by_rows else array.T


def matrices(graph: ir.Graph) -> Iterator[Use]:
    """MatMul and fused Linear with a constant matrix. Short convolutions whose channels mix are none: their taps are a
    matrix in the step graph alone, where it meets the window of a state."""
    for node in list(graph):
        if node.op_type == LINEAR and node.domain == DOMAIN and _is_matrix(node.inputs[1]):
            yield Use(node, 1)
        if node.op_type == "MatMul" and not node.domain and _is_matrix(node.inputs[1]) and not _window(node.inputs[0]):
            yield Use(node, 1)


def tables(graph: ir.Graph) -> Iterator[Use]:
    """Gather of rows by the graph's tokens [batch, time]; tables by place or by time stay as they are."""
    for node in list(graph):
        if node.op_type != "Gather" or node.domain or not _is_matrix(node.inputs[0]):
            continue
        index = node.inputs[1]
        ids = index is not None and index.shape is not None and len(index.shape) == 2
        if ids and node.attributes.get_int("axis", 0) == 0 and _moved(index) is graph.inputs[0]:
            yield Use(node, 0)


class SpellGemm(ir.passes.InPlacePass):
    """Gemm with a constant matrix as MatMul and Add, which is all that later passes know.

    Before: Gemm(x, W [outputs, inputs], b, transB=1). After: Add(MatMul(x, Wᵀ), b)
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        changed = False
        for node in list(model.graph):
            if _is_plain_gemm(node):
                _spell(model.graph, node)
                changed = True
        return ir.passes.PassResult(model, changed)


def _is_plain_gemm(node: ir.Node) -> bool:
    if node.op_type != "Gemm" or not _is_matrix(node.inputs[1]):
        return False
    unscaled = node.attributes.get_float("alpha", 1.0) == node.attributes.get_float("beta", 1.0) == 1.0
    return unscaled and not node.attributes.get_int("transA", 0)


def _spell(graph: ir.Graph, node: ir.Node) -> None:
    weight, bias = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    assert weight is not None
    if node.attributes.get_int("transB", 0):
        name = f"{weight.name}.transposed"
        if name not in graph.initializers:
            array = np.ascontiguousarray(_array(weight).T)
            graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(array, name=name)))
        weight = graph.initializers[name]
    product = ir.node("MatMul", [node.inputs[0], weight])
    last = product if bias is None else ir.node("Add", [product.outputs[0], bias])
    graph.insert_before(node, [product] if bias is None else [product, last])
    take_place(graph, node, last.outputs[0])


def take_place(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """`value` stands for the only output of `node`, which goes, under its name."""
    (old,) = node.outputs
    name, value.shape, value.type = old.name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    value.name = name


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()


def _is_matrix(value: ir.Value | None) -> bool:
    """A float32 initializer of two axes that the graph's user cannot set."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return False
    return value.const_value.dtype == ir.DataType.FLOAT and len(value.const_value.shape) == 2


def _moved(value: ir.Value | None) -> ir.Value | None:
    """Where numbers come from that were only moved."""
    while value is not None and (node := value.producer()) is not None and node.op_type in _MOVES:
        value = node.inputs[0]
    return value


def _window(value: ir.Value | None) -> bool:
    """Whether a signal is a state joined with new tokens."""
    source = _moved(value)
    node = None if source is None else source.producer()
    if node is None or node.op_type != "Concat":
        return False
    return any(part is not None and part.is_graph_input() for part in node.inputs)
