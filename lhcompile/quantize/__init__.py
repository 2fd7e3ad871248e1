"""Stage: ONNX graphs in, the same graphs with smaller weights out.

Quantized are the matrices that signals are multiplied with, and the embedding of tokens. Poles, residues, norms,
biases, short convolutions and states stay in float32. Each target has its form for each precision; a weight is rounded
once for both graphs, which therefore hold the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from lhcompile.artifacts import Lowered, Part, Quantized
from lhcompile.config import QuantizeConfig
from lhcompile.quantize.blocks import fused_weight, integer_products, integer_table, linear_weight
from lhcompile.quantize.halves import half_products, half_table, half_weight
from lhcompile.quantize.stored import Form, Store, Stored, Write
from lhcompile.quantize.weights import SpellGemm, Use, matrices, tables
from lhcompile.quantize.writer import Writer

__all__ = ["quantize"]

OPSET, IR_VERSION = 21, 10
"""The first with blocks in DequantizeLinear and with 4-bit tensors."""
Find = Callable[[ir.Graph], Iterator[Use]]


def quantize(lowered: Lowered, config: QuantizeConfig) -> Quantized:
    """Both graphs with weights of `config.quantize`; those that came in are left as they are.

    Raises LowerError for a weight that the precision cannot hold.
    """
    if config.quantize == "none":
        return Quantized(lowered, lowered)
    forms = _forms(lowered.target, config.quantize)
    cabinets = {name: _Cabinet(form.store) for name, (_, form) in forms.items()}

    def quantized(model: ir.Model, prefill: bool) -> ir.Model:
        for name, (find, form) in forms.items():
            _Quantize(find, cabinets[name], form.prefill if prefill else form.step)(model)
        model.opset_imports[""] = max(OPSET, model.opset_imports[""])
        model.ir_version = max(IR_VERSION, model.ir_version)
        return _tidy(model)

    def rounded(model: ir.Model, prefill: bool) -> ir.Model:
        for name, (find, _) in forms.items():
            _Round(find, cabinets[name])(model)
        return _tidy(model)

    return Quantized(
        lowered=replace(_both(lowered, quantized), precision=config.quantize),
        rounded=_both(lowered, rounded),
        parts=tuple(part for name, cabinet in cabinets.items() if (part := cabinet.part(name)).tensors),
    )


def _forms(target: str, precision: str) -> dict[str, tuple[Find, Form]]:
    """Kind of weight → where it is found, and its form.

    onnxruntime on a CPU multiplies bytes faster than it dequantizes once there are many tokens; on a GPU its fused
    kernel is named, for it is not known to recognize the standard form there.
    """
    if precision in ("fp16", "bf16"):
        weight = half_products(precision) if target == "cuda" else half_weight(precision)
        table = half_table(precision)
    else:
        bits = 8 if precision == "int8" else 4
        weight, table = linear_weight(bits), integer_table(bits)
        if target == "cuda" or (target == "cpu" and bits == 4):
            weight = fused_weight(bits)
        elif target == "cpu":
            weight = integer_products()
    return {"matrices": (matrices, weight), "embedding": (tables, table)}


def _both(lowered: Lowered, change: Callable[[ir.Model, bool], ir.Model]) -> Lowered:
    """The graphs changed in copies, which share the tensors that stay."""
    step = change(_spelled(lowered.step), False)
    alone = lowered.prefill is lowered.step
    return replace(lowered, step=step, prefill=step if alone else change(_spelled(lowered.prefill), True))


def _spelled(model: ir.Model) -> ir.Model:
    model = model.clone()
    SpellGemm()(model)
    return model


def _tidy(model: ir.Model) -> ir.Model:
    common.RemoveUnusedNodesPass()(model)  # and the weights nobody reads any longer
    return model


@dataclass
class _Cabinet:
    """Weights of one kind as stored, each distinct one once."""

    store: Store
    _kept: dict[tuple[Any, ...], tuple[Stored, int]] = field(default_factory=dict)

    def stored(self, use: Use) -> Stored:
        tensor = use.value.const_value
        assert tensor is not None
        key = (hashlib.sha256(tensor.tobytes()).digest(), *tensor.shape.numpy())
        if key not in self._kept:
            self._kept[key] = self.store(use), tensor.nbytes
        return self._kept[key][0]

    def part(self, name: str) -> Part:
        kept = self._kept.values()
        return Part(name, len(kept), sum(before for _, before in kept), sum(stored.bytes for stored, _ in kept))


class _Quantize(ir.passes.InPlacePass):
    """The operators that `find` yields read what is stored of their weights."""

    def __init__(self, find: Find, cabinet: _Cabinet, write: Write) -> None:
        super().__init__()
        self._find, self._cabinet, self._write = find, cabinet, write

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        uses = list(self._find(model.graph))
        for use in uses:
            self._write(Writer(model, use), use, self._cabinet.stored(use))
        return ir.passes.PassResult(model, bool(uses))


class _Round(ir.passes.InPlacePass):
    """The operators that `find` yields read the value of what is stored of their weights."""

    def __init__(self, find: Find, cabinet: _Cabinet) -> None:
        super().__init__()
        self._find, self._cabinet = find, cabinet

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        uses = list(self._find(model.graph))
        for use in uses:
            writer, stored = Writer(model, use), self._cabinet.stored(use)
            writer.read(writer.tensor("table" if use.looked_up else "rounded", _value(use, stored)))
        return ir.passes.PassResult(model, bool(uses))


def _value(use: Use, stored: Stored) -> ir.LazyTensor:
    """float32 in the weight's own layout, computed each time it is read."""
    tensor, looked_up = use.value.const_value, use.looked_up
    assert tensor is not None

    def value() -> ir.TensorProtocol:
        rows = stored.values()
        return ir.tensor(np.ascontiguousarray(rows if looked_up else rows.T))

    return ir.LazyTensor(value, ir.DataType.FLOAT, ir.Shape(tensor.shape.numpy()))
