"""The lowering of fused operators: nodes of the project's own domain, whose functions stand beside them in the graph.

What no fusion took follows the portable lowering.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset

from lhcompile.lower import portable
from lhcompile.lower.body import DOMAIN, VERSION
from lhcompile.lower.fuse import KINDS

__all__ = ["Prefill", "Step"]

Value = Any  # a value of the graph being traced

_SIGNALS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]


def _schema(name: str, inputs: list[tuple[str, str, bool]], outputs: list[tuple[str, str]], attributes: str) -> Op:
    """An operator as the exporter wants it.

    inputs: name, type, and whether it may be missing; attributes: "name:kind" of each
    """
    optional, single = OpSchema.FormalParameterOption.Optional, OpSchema.FormalParameterOption.Single
    kinds = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT, "string": OpSchema.AttrType.STRING}
    schema = OpSchema(
        name,
        DOMAIN,
        VERSION,
        inputs=[
            OpSchema.FormalParameter(name, kind, param_option=optional if absent else single)
            for name, kind, absent in inputs
        ],
        outputs=[OpSchema.FormalParameter(name, kind) for name, kind in outputs],
        type_constraints=[(letter, _SIGNALS, "") for letter in "TCS"],
        attributes=[
            OpSchema.Attribute(name, kinds[kind], "", required=True)
            for name, kind in (word.split(":") for word in attributes.split())
        ],
    )
    return Op(Opset(DOMAIN, VERSION), name, schema)


FLOAT = "tensor(float)"
HYENA_MIXER = _schema(
    "HyenaMixer",
    [
        ("projected", "T", False), ("conv_state", "C", False), ("recurrent_state", "S", False),
        ("conv_weight", FLOAT, False), ("conv_bias", FLOAT, True), ("own", FLOAT, False), ("other", FLOAT, True),
        ("readout", FLOAT, False), ("direct", FLOAT, False), ("index", "tensor(int32)", True),
    ],
    [("mixed", "T"), ("next_conv_state", "C"), ("next_recurrent_state", "S")],
    "block:int outer:int",
)  # fmt: skip
LINEAR = _schema(
    "Linear",
    [
        ("x", "T", False), ("weight", "T", False), ("bias", FLOAT, True), ("residual", "T", True),
        ("norm_scale", FLOAT, True), ("norm_bias", FLOAT, True),
    ],
    [("y", "T")],
    "norm:string epsilon:float activation:string",
)  # fmt: skip


class _Fused(portable.Lowering):
    fused = KINDS

    def table(self) -> dict[Any, Callable[..., Any]]:
        lhc = torch.ops.lhc
        return super().table() | {lhc.hyena_mixer.default: _mixer, lhc.linear.default: _linear}


def _mixer(*inputs: Value) -> Any:
    *tensors, outer = inputs
    return HYENA_MIXER(*tensors, block=int(tensors[8].shape[0]), outer=outer)


def _linear(*inputs: Value) -> Value:
    *tensors, norm, epsilon, activation = inputs
    return LINEAR(*tensors, norm=norm, epsilon=epsilon, activation=activation)


class Step(_Fused, portable.Step):
    """One token."""


class Prefill(_Fused, portable.Prefill):
    """Any number of tokens."""
