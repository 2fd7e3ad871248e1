"""New operators in the place of one that reads a quantized weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lhcompile.quantize.weights import DOMAIN, Use, take_place

__all__ = ["Writer"]

MICROSOFT = "com.microsoft"
_SCALES = 6
"""The input of fused projections for the scales of their weights."""


class Writer:
    """Writes in front of the operator of one use of a weight.

    weight: name of the weight, which those of its tensors begin with
    """

    def __init__(self, model: ir.Model, use: Use) -> None:
        self._model, self._graph, self._use = model, model.graph, use
        self._written = 0
        self.signal = use.signal
        self.weight = use.value.name

    def tensor(self, role: str, tensor: ir.TensorProtocol, apart: bool = False) -> ir.Value:
        """An initializer of the weight's: one however many operators read it, or one for each of them if `apart`.

        Those hold the same tensor, which a file of weights has once.
        """
        name, count = f"{self.weight}.{role}", 2
        while apart and name in self._graph.initializers:
            name, count = f"{self.weight}.{count}.{role}", count + 1
        return self._initializer(name, tensor)

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """An initializer that all weights share."""
        name = f"quantize.{array.dtype.name}.{'_'.join(f'{x:.9g}' for x in array.ravel().tolist())}.{array.ndim}"
        return self._initializer(name, ir.tensor(array, name=name))

    def number(self, value: float) -> ir.Value:
        return self.constant(np.array(value, np.float32))

    def ints(self, *values: int) -> ir.Value:
        return self.constant(np.array(values, np.int64))

    def op(self, name: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """The only output of a new operator, under a name that no graph inside a node has either."""
        if domain:
            self._model.opset_imports.setdefault(domain, 1)
        node = ir.node(name, inputs, attributes, domain=domain)
        node.outputs[0].name = f"{self._use.node.outputs[0].name}.{name}.{self._written}"
        self._written += 1
        self._graph.insert_before(self._use.node, node)
        return node.outputs[0]

    def fused(self, name: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """An operator of onnxruntime's own."""
        return self.op(name, *inputs, domain=MICROSOFT, **attributes)

    def project(self, name: str, stored: Mapping[str, ir.TensorProtocol]) -> None:
        """A fused Linear goes, and stands as `name` with the same neighbours; behind those it has scales.

        stored: codes and scales, by their roles
        """
        codes, scales = (self.tensor(*item) for item in stored.items())
        node = self._use.node
        signal, _, *others = node.inputs
        others += [None] * (_SCALES - 2 - len(others))
        attributes = {each: attribute.value for each, attribute in node.attributes.items()}
        self.become(self.op(name, signal, codes, *others, scales, domain=DOMAIN, **attributes))

    def read(self, weight: ir.Value) -> None:
        """The operator stays and reads `weight`."""
        self._use.node.replace_input_with(self._use.index, weight)

    def become(self, value: ir.Value) -> None:
        """The operator goes, `value` stands for its output."""
        take_place(self._graph, self._use.node, value)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._graph.initializers:
            value = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy())
            )
            self._graph.register_initializer(value)
        return self._graph.initializers[name]
