"""Kernels called with tensors that tests make, without onnxruntime, and how far from double precision they may be."""

from __future__ import annotations

import onnx_ir as ir
import torch
from operators import Call, Linear
from torch import Tensor

from bench.kernels import Kernels

FLOAT, HALF, BRAIN = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16
BUDGET = {FLOAT: 1e-5, HALF: 5e-4, BRAIN: 4e-3}  # as in tests/parity/test_ops.py


def placed(call: Call) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.cuda() for x in call.inputs)


def computed(outputs: list[Tensor], call: object) -> list[Tensor]:
    assert callable(call)
    call()
    torch.cuda.synchronize()
    return [x.cpu() for x in outputs]


def there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def projected(kernels: Kernels, linear: Linear) -> Tensor:
    return computed(*kernels.linear(placed(linear.call()), linear.norm, linear.activation, linear.epsilon))[0]
