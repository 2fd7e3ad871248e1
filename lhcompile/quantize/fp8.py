"""Weights in float8 e4m3, a scale an output, for the fused projections that multiply them with signals in 8 bits."""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lhcompile.quantize.halves import half_products
from lhcompile.quantize.stored import Form, Stored
from lhcompile.quantize.weights import DOMAIN, Use, take_place
from lhcompile.quantize.writer import Writer

__all__ = ["JoinMlp", "fp8_products"]

Array = NDArray[Any]
LARGEST = 448.0
"""The largest number of float8 e4m3."""
_TINIEST = 1e-30
"""Rows below it are zero."""
_GROWN = 1.07
"""The most that the norm of a row grows by as its numbers are rounded to three bits behind the point."""
_MULTIPLE = 16
"""Of inputs and of outputs: cuBLASLt multiplies no other matrices in 8 bits."""


def fp8_products() -> Form:
    """LinearFp8 in the place of a fused Linear; products that are not fused, or of other sizes than multiples of 16
    (many a vocabulary), run in fp16."""
    other = half_products("fp16")

    def store(use: Use) -> Stored:
        return _store(use) if _takes(use) else other.store(use)

    def write(writer: Writer, use: Use, stored: Stored) -> None:
        if _takes(use):
            writer.project("LinearFp8", stored.tensors)
        else:
            other.step(writer, use, stored)

    return Form(store, write, write)


def _takes(use: Use) -> bool:
    return use.fused and all(size % _MULTIPLE == 0 for size in use.rows().shape)


def _store(use: Use) -> Stored:
    """fp8: FLOAT8E4M3FN [outputs, inputs]; fp8_scales: float32 [outputs], a row's largest number / 448"""
    rows = use.rows()
    scales = (np.maximum(np.abs(rows).max(1), _TINIEST) / LARGEST).astype(np.float32)
    codes = (rows / scales[:, None]).astype(ml_dtypes.float8_e4m3fn)
    tensors: dict[str, ir.TensorProtocol] = {"fp8": ir.tensor(codes), "fp8_scales": ir.tensor(scales)}
    return Stored(tensors, partial(_values, codes, scales))


def _values(codes: Array, scales: Array) -> Array:
    return codes.astype(np.float32) * scales[:, None]


class JoinMlp(ir.passes.InPlacePass):
    """Two projections in 8 bits of which the second alone hears the first become one operator.

    Before: h = LinearFp8(x, W₁, b₁; norm, activation), y = LinearFp8(h, W₂, b₂, residual).
    After: y = MlpFp8(x, W₁, b₁, W₂, b₂, residual; norm, activation), for which `lower.projections.mlp_function` needs
    the reach of the first.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        changed = False
        for down in list(model.graph):  # of three in a row the first two are joined: the third then hears no projection
            up = _heard_alone(down)
            if up is not None:
                _join(model.graph, up, down)
                changed = True
        return ir.passes.PassResult(model, changed)


def _heard_alone(down: ir.Node) -> ir.Node | None:
    """The projection whose output a projection reads as it is, and nobody else does."""
    hidden = down.inputs[0] if _is_projection(down) else None
    if hidden is None or (up := hidden.producer()) is None or not _is_projection(up) or _input(up, 3) is not None:
        return None
    plain = down.attributes["norm"].as_string() == down.attributes["activation"].as_string() == "none"
    alone = len(hidden.uses()) == 1 and not hidden.is_graph_output()
    return up if plain and alone else None


def _is_projection(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, "LinearFp8")


def _input(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _join(graph: ir.Graph, up: ir.Node, down: ir.Node) -> None:
    x, up_weight, up_bias, _, norm_scale, norm_bias, up_scale = up.inputs
    _, down_weight, down_bias, residual, _, _, down_scale = down.inputs
    assert up_weight is not None
    assert up_scale is not None
    reach = _reach(graph, up_weight, up_scale, up_bias)
    inputs = [x, up_weight, up_bias, down_weight, down_bias, residual, norm_scale, norm_bias, up_scale, down_scale]
    mlp = ir.node("MlpFp8", [*inputs, reach], up.attributes, domain=DOMAIN)
    graph.insert_before(down, mlp)
    take_place(graph, down, mlp.outputs[0])
    graph.remove(up, safe=True)


def _reach(graph: ir.Graph, weight: ir.Value, scale: ir.Value, bias: ir.Value | None) -> ir.Value:
    """float32 [2]: the largest norm of a row of the weight, for a signal that is rounded, and the largest bias."""
    name = f"{weight.name}_reach" if bias is None else f"{weight.name}_reach.{bias.name}"
    if name not in graph.initializers:
        lengths = np.sqrt(np.square(_number(weight).astype(np.float32)).sum(1)) * _number(scale)
        least = 0.0 if bias is None else np.abs(_number(bias)).max()
        tensor = ir.tensor(np.array([_GROWN * lengths.max(), least], np.float32), name=name)
        value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([2]))
        graph.register_initializer(value)
    return graph.initializers[name]


def _number(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()
