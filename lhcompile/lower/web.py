"""The lowering for browsers: one row, and no operator that would leave the GPU.

onnxruntime-web runs what its WebGPU provider has no kernel for on the CPU, and every change of sides costs a copy and a
wait. So the graphs scatter nothing, loop over nothing, find out no size as they run, and compute nothing with 64-bit
integers but what a Gather takes as its index. A prefill takes a fixed number of tokens: one chunk (docs/decisions/020).
"""

from __future__ import annotations

import onnx_ir as ir

from lhcompile.lower import attention, portable

__all__ = ["BATCH", "WEBGPU", "WEBGPU_OF", "Prefill", "Step", "without_kernel"]

BATCH: int | None = 1
WEBGPU_OF = "onnxruntime-web 1.30.0"
WEBGPU = frozenset(
    [
        "Abs", "Acos", "Acosh", "Add", "ArgMax", "ArgMin", "Asin", "Asinh", "Atan", "Atanh", "AveragePool",
        "BatchNormalization", "Cast", "Ceil", "Clip", "Concat", "Conv", "ConvTranspose", "Cos", "Cosh", "CumSum",
        "DepthToSpace", "DequantizeLinear", "Div", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "Flatten",
        "Floor", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool",
        "Greater", "GreaterOrEqual", "GridSample", "HardSigmoid", "HardSwish", "If", "InstanceNormalization",
        "LayerNormalization", "LeakyRelu", "Less", "LessOrEqual", "Log", "MatMul", "MaxPool", "Mul", "Neg", "Not",
        "Pad", "Pow", "Range", "Reciprocal", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax",
        "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare", "Relu", "Reshape", "Resize",
        "ScatterND", "Shape", "Sigmoid", "Sin", "Sinh", "Slice", "Softmax", "Split", "Sqrt", "Squeeze", "Sub", "Tan",
        "Tanh", "ThresholdedRelu", "Tile", "Transpose", "Unsqueeze", "Where",
    ]
)
"""Operators of opset 20 that WebGPU has kernels for in `WEBGPU_OF`, or needs none for (Reshape, Shape)."""


class Step(portable.Step):
    """One token of one row."""

    gathers = True
    position = staticmethod(attention.position_one_narrow)
    attention = staticmethod(attention.attend_one_chosen)


class Prefill(portable.Prefill):
    """So many tokens of one row; what a prompt has beyond a multiple of them is for the step."""

    time = 32
    gathers = True
    position = staticmethod(attention.position_narrow)
    attention = staticmethod(attention.attend_chosen)


def without_kernel(model: ir.Model) -> list[str]:
    """The operators of a graph that the WebGPU provider has no kernel for, sorted."""
    return sorted({node.op_type for node in model.graph.all_nodes() if node.domain or node.op_type not in WEBGPU})
