"""The body of a function: its nodes, in the order they are made, and the constants they read."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lhcompile.artifacts import LARGEST_HALF

__all__ = ["DOMAIN", "FLOAT", "OPSET", "SHORT", "VERSION", "Body", "Type", "flags"]

DOMAIN, VERSION = "lhcompile", 1
OPSET = 20
Type = ir.DataType
FLOAT = Type.FLOAT
SHORT = {Type.FLOAT: "f32", Type.FLOAT16: "f16", Type.BFLOAT16: "bf16"}
"""Types in the names of forms."""


def flags(**flags: bool) -> str:
    """Those that are set, in the name of a form."""
    return "".join(f"_{name}" for name, there in flags.items() if there)


class Body:
    """prefix: what the names of its values begin with"""

    def __init__(self, prefix: str = "v") -> None:
        self.nodes: list[ir.Node] = []
        self._prefix, self._count = prefix, 0

    def ops(
        self, kind: str, count: int, *inputs: ir.Value, **attributes: int | float | str | Sequence[int] | ir.Graph
    ) -> Sequence[ir.Value]:
        """kind: behind a domain and "::" where it is not ONNX's own"""
        domain, _, kind = kind.rpartition("::")
        return self._append(ir.node(kind, inputs, attributes, domain=domain, num_outputs=count))

    def op(self, kind: str, *inputs: ir.Value, **attributes: int | float | str | Sequence[int]) -> ir.Value:
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def split(self, value: ir.Value, count: int, axis: int) -> list[ir.Value]:
        return list(self.ops("Split", count, value, axis=axis, num_outputs=count))

    def cast(self, value: ir.Value, given: Type) -> ir.Value:
        """To float32, from what it is."""
        return value if given == FLOAT else self.op("Cast", value, to=FLOAT)

    def back(self, value: ir.Value, wanted: Type) -> ir.Value:
        """From float32."""
        value = value if wanted == FLOAT else self.op("Cast", value, to=wanted)
        value.type = ir.TensorType(wanted)
        return value

    def kept(self, value: ir.Value, wanted: Type) -> ir.Value:
        """A state from float32, no larger than fits."""
        return self.back(self._clipped(value) if wanted == Type.FLOAT16 else value, wanted)

    def stopped(self, value: ir.Value, given: Type) -> ir.Value:
        """To float32, no larger than a state of its type."""
        value = self.cast(value, given)
        return self._clipped(value) if given == Type.FLOAT16 else value

    def _clipped(self, value: ir.Value) -> ir.Value:
        return self.op("Clip", value, *(self.scalar(x, FLOAT) for x in (-LARGEST_HALF, LARGEST_HALF)))

    def ints(self, *values: int) -> ir.Value:
        return self._constant(ir.tensor(values, Type.INT64))

    def scalar(self, value: float, kind: Type = Type.INT64) -> ir.Value:
        return self._constant(ir.tensor(value, kind))

    def _constant(self, tensor: ir.TensorProtocol) -> ir.Value:
        return self._append(ir.node("Constant", [], {"value": tensor}))[0]

    def _append(self, node: ir.Node) -> Sequence[ir.Value]:
        for value in node.outputs:
            self._count += 1
            value.name = f"{self._prefix}{self._count}"
        self.nodes.append(node)
        return node.outputs

    def graph(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str) -> ir.Graph:
        opsets = {"": OPSET} | {node.domain: 1 for node in self.nodes if node.domain}
        return ir.Graph(inputs, outputs, nodes=self.nodes, opset_imports=opsets, name=name)

    def function(
        self,
        name: str,
        overload: str,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        **attributes: int | float | str,
    ) -> ir.Function:
        """The function; the attributes have the values that its body was made for."""
        return ir.Function(
            DOMAIN,
            name,
            overload,
            graph=self.graph(inputs, outputs, name),
            attributes=ir.convenience.convert_attributes(attributes),
        )
