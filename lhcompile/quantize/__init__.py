"""Stage: ONNX graphs in, the same graphs with smaller weights out, and states kept in fewer bits.

Quantized are the matrices that signals are multiplied with, and the embedding of tokens. Residues, norms, biases and
short convolutions stay in float32. Each target has its form for each precision; a weight is rounded once for both
graphs, which therefore hold the same bytes. Poles are rounded in the program, before it is lowered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from torch import Tensor

from lhcompile.artifacts import Allotted, Lowered, Part, Quantized
from lhcompile.config import QuantizeConfig
from lhcompile.errors import LowerError
from lhcompile.quantize.blocks import fixed_signals, fused_weight, integer_products, integer_table, linear_weight
from lhcompile.quantize.fp8 import JoinMlp, fp8_products
from lhcompile.quantize.halves import half_products, half_table, half_weight
from lhcompile.quantize.int4 import int4_products, int4_table, whole_blocks
from lhcompile.quantize.program import quantize_poles
from lhcompile.quantize.sensitivity import LADDER, Candidate, Measure, Rung, allot
from lhcompile.quantize.signals import FUSED, HalfSignals
from lhcompile.quantize.states import half_pasts, keep_states, kept_in, state_ranges
from lhcompile.quantize.stored import Form, Stored
from lhcompile.quantize.trials import Range, Trials, signal_ranges
from lhcompile.quantize.weights import DOMAIN, LINEAR, SpellGemm, Use, matrices, tables
from lhcompile.quantize.writer import Writer

__all__ = [
    "Plan",
    "half_pasts",
    "keep_states",
    "kept_in",
    "plan_weights",
    "quantize",
    "quantize_poles",
    "state_ranges",
]

OPSET, IR_VERSION = 21, 10
"""The first with blocks in DequantizeLinear and with 4-bit tensors."""
_KINDS: dict[str, Callable[[ir.Graph], Iterator[Use]]] = {"matrices": matrices, "embedding": tables}
READ: Mapping[str, frozenset[str]] = {"cuda": frozenset(FUSED), "cpu": frozenset({"int4"})}
"""Precisions of weights that fused projections read as they are stored."""
APART = f"{LINEAR}.apart"
"""What a fused projection is called that is to be inlined."""
HELD = 0.02
"""Largest rounding error of a signal by a fixed scale, as a share of its root mean square; where tails are heavier the
scale is taken from each token."""
Key = tuple[Any, ...]
"""A weight, whichever way it lies: whether it is looked up, the sha256 of its rows, and their shape."""


@dataclass(frozen=True)
class Plan:
    """What calibration says of each weight.

    precisions: where it differs from the one asked for; allotted: how that was found, in the order of the graph
    signals: the smallest and largest number that it is multiplied with, where its product rounds by fixed scales;
        listened: the number of signals that were listened to for that
    """

    precisions: Mapping[Key, str] = field(default_factory=dict)
    signals: Mapping[Key, tuple[float, float]] = field(default_factory=dict)
    allotted: tuple[Allotted, ...] = ()
    listened: int = 0

    @property
    def fixed(self) -> int:
        """The number of signals that are rounded by fixed scales: of those whose weights stay in int8."""
        return sum(self.precisions.get(key, "int8") == "int8" for key in self.signals)


def quantize(lowered: Lowered, config: QuantizeConfig, plan: Plan | None = None) -> Quantized:
    """Both graphs with weights of `config.quantize`, or as `plan` has it; those that came in are left as they are.

    Raises LowerError for a weight that the precision cannot hold.
    """
    if config.quantize == "none":
        return Quantized(lowered, lowered)
    plan = plan or Plan()
    cabinets = {kind: _Cabinet(partial(_form, lowered.target, kind, config, plan)) for kind in _KINDS}

    def quantized(model: ir.Model, prefill: bool) -> ir.Model:
        for kind, find in _KINDS.items():
            _Quantize(find, cabinets[kind], prefill)(model)
        model.opset_imports[""] = max(OPSET, model.opset_imports[""])
        model.ir_version = max(IR_VERSION, model.ir_version)
        if lowered.target == "cuda" and config.quantize in FUSED:
            JoinMlp()(model)
            HalfSignals(config.quantize)(model)
        return _tidy(model)

    def rounded(model: ir.Model, prefill: bool) -> ir.Model:
        for kind, find in _KINDS.items():
            _Round(find, cabinets[kind])(model)
        return _tidy(model)

    return Quantized(
        lowered=replace(_both(lowered, config, plan, quantized), precision=config.quantize),
        rounded=_both(lowered, config, plan, rounded),
        parts=tuple(part for kind, cabinet in cabinets.items() if (part := cabinet.part(kind)).tensors),
        inner_step=quantized(_spelled(lowered, lowered.step, config, plan), True) if lowered.target == "cpu" else None,
    )


def _form(target: str, kind: str, config: QuantizeConfig, plan: Plan, key: Key) -> Form:
    """How a weight is stored and read.

    onnxruntime on a CPU multiplies bytes faster than it dequantizes once there are many tokens; on a GPU fused kernels
    are named, for it is not known to recognize the standard form there. 4 bits are those of a fused projection on both.
    """
    precision = plan.precisions.get(key, config.quantize)
    if precision == "fp8":
        return half_table("fp16") if kind == "embedding" else fp8_products()
    if precision in ("fp16", "bf16"):
        if kind == "embedding":
            return half_table(precision)
        return half_products(precision) if target == "cuda" else half_weight(precision)
    bits = 8 if precision == "int8" else 4
    if bits == 4 and target in ("cuda", "cpu"):
        return int4_table(halves=target == "cuda") if kind == "embedding" else int4_products()
    if kind == "embedding":
        return integer_table(bits)
    if key in plan.signals:
        return fixed_signals(*plan.signals[key])
    if target == "cuda":
        return fused_weight(bits)
    return integer_products() if target == "cpu" else linear_weight(bits)


def plan_weights(
    lowered: Lowered,
    config: QuantizeConfig,
    budget: float | None,
    rows: Tensor,
    sampled: bool,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """What calibration sequences [rows, time, …] say of the weights of `lowered`, which those of other targets share.

    budget: the relative rise of the loss that rounding may cost; None gives every weight the precision asked for
    sampled: the model drew the tokens itself. Raises BudgetError where the budget cannot be kept.
    """
    signals: Mapping[Key, tuple[float, float]] = {}
    listened = 0
    if config.activations == "static":
        say("listening to the signals")
        signals, listened = _signals(lowered, config, rows)
    if budget is None or config.quantize == "none":
        return Plan(signals=signals, listened=listened)
    model, candidates = _spelled(lowered, lowered.prefill, config, Plan()), []
    keys: dict[str, Key] = {}
    ladder = LADDER[LADDER.index(config.quantize) :] if config.quantize in LADDER else (config.quantize,)
    for kind, find in _KINDS.items():
        for use in find(model.graph):
            name, key = str(use.value.name), _key(use)
            if name not in keys and key not in keys.values():
                keys[name] = key
                plans = {rung: Plan({key: rung}, signals) for rung in ladder}
                forms = {rung: _form(lowered.target, kind, config, plan, key) for rung, plan in plans.items()}
                candidates.append(Candidate(name, list(_rungs(use, forms))))
    trials = Trials(lowered, model, list(keys))
    measure = Measure(lambda weights: partial(trials, weights=weights), rows, sampled)
    allotted = allot(candidates, measure, budget, say)
    return Plan({keys[each.name]: each.precision for each in allotted}, signals, allotted, listened)


def _rungs(use: Use, forms: dict[str, Form]) -> Iterator[Rung]:
    """The rungs of a weight's ladder, up to the first that cannot hold it; the lowest has to.

    Raises LowerError.
    """
    for index, (precision, form) in enumerate(forms.items()):
        try:
            yield _rung(use, precision, form)
        except LowerError:
            if index == 0:
                raise
            return


def _rung(use: Use, precision: str, form: Form) -> Rung:
    rows, stored = use.rows(), form.store(use)
    error = float(np.square(rows - stored.values(), dtype=np.float64).sum())
    return Rung(precision, stored.bytes, error, lambda: np.ascontiguousarray(use.laid_out(stored.values())))


def _signals(
    lowered: Lowered, config: QuantizeConfig, rows: Tensor
) -> tuple[dict[Key, tuple[float, float]], int]:
    """The ends of each matrix's signal where a fixed scale holds it well, and the number of matrices."""
    model = _spelled(lowered, lowered.prefill, config, Plan())
    uses = {str(index): use for index, use in enumerate(matrices(model.graph))}
    ranges = signal_ranges(lowered, model, {name: use.signal for name, use in uses.items()}, rows)
    found: dict[Key, Range] = {}
    for name, use in uses.items():
        key = _key(use)
        found[key] = ranges[name] if key not in found else found[key].with_other(ranges[name])
    return {key: (each.low, each.high) for key, each in found.items() if each.error <= HELD}, len(found)


def _both(
    lowered: Lowered, config: QuantizeConfig, plan: Plan, change: Callable[[ir.Model, bool], ir.Model]
) -> Lowered:
    """The graphs changed in copies, which share the tensors that stay."""
    step = prefill = change(_spelled(lowered, lowered.step, config, plan), False)
    if lowered.prefill is not lowered.step:
        prefill = change(_spelled(lowered, lowered.prefill, config, plan), True)
    return replace(lowered, step=step, prefill=prefill)


def _spelled(lowered: Lowered, model: ir.Model, config: QuantizeConfig, plan: Plan) -> ir.Model:
    """A copy of one of its graphs with products as later passes know them: fused ones stay where they read the
    precision as it is."""
    model = model.clone()
    for node in model.graph:
        fused = node.op_type == LINEAR and node.domain == DOMAIN
        if fused and not _is_read(lowered.target, Use(node, 1), config, plan):
            _name_apart(model, node)
    common.InlinePass(lambda function: function.name == APART)(model)
    SpellGemm()(model)
    return model


def _is_read(target: str, use: Use, config: QuantizeConfig, plan: Plan) -> bool:
    """Whether a fused projection reads its weight as it is stored."""
    read = READ.get(target, frozenset())
    if config.quantize not in read:
        return False
    precision = plan.precisions.get(_key(use), config.quantize) if plan.precisions else config.quantize
    return precision in read and (precision != "int4" or whole_blocks(use))


def _name_apart(model: ir.Model, node: ir.Node) -> None:
    """The node calls its function under another name, so that it can be inlined where others stay."""
    function = model.functions[node.op_identifier()]
    node.op_type = APART
    if node.op_identifier() not in model.functions:
        apart = function.clone()
        apart.name = APART
        model.functions[apart.identifier()] = apart


def _tidy(model: ir.Model) -> ir.Model:
    common.RemoveUnusedNodesPass()(model)  # and the weights nobody reads any longer
    return model


def _key(use: Use) -> Key:
    rows = use.rows()
    return (use.looked_up, hashlib.sha256(np.ascontiguousarray(rows).data).digest(), *rows.shape)


@dataclass
class _Cabinet:
    """Weights of one kind as stored, each distinct one once."""

    choose: Callable[[Key], Form]
    _kept: dict[tuple[Key, bool], _Kept] = field(default_factory=dict)
    _known: dict[tuple[int, bool], tuple[ir.TensorProtocol, _Kept]] = field(default_factory=dict)

    def entry(self, use: Use) -> _Kept:
        tensor = use.value.const_value
        assert tensor is not None
        seen = id(tensor), use.by_rows  # a tensor that graphs share is hashed once; it lives as long as its id is kept
        if seen not in self._known:
            key = _key(use)
            if (key, use.by_rows) not in self._kept:
                form = self.choose(key)
                stored = form.store(use)
                self._kept[key, use.by_rows] = _Kept(form, stored, tensor.nbytes, _value(use, stored))
            self._known[seen] = tensor, self._kept[key, use.by_rows]
        return self._known[seen][1]

    def part(self, name: str) -> Part:
        kept = self._kept.values()
        return Part(name, len(kept), sum(each.before for each in kept), sum(each.stored.bytes for each in kept))


@dataclass(frozen=True)
class _Kept:
    """A weight as stored; before: its bytes; value: what is stored, in float32, computed each time it is read"""

    form: Form
    stored: Stored
    before: int
    value: ir.LazyTensor


class _Quantize(ir.passes.InPlacePass):
    """The operators that `find` yields read what is stored of their weights."""

    def __init__(self, find: Callable[[ir.Graph], Iterator[Use]], cabinet: _Cabinet, prefill: bool) -> None:
        super().__init__()
        self._find, self._cabinet, self._prefill = find, cabinet, prefill

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        uses = list(self._find(model.graph))
        for use in uses:
            kept = self._cabinet.entry(use)
            write = kept.form.prefill if self._prefill else kept.form.step
            write(Writer(model, use), use, kept.stored)
        return ir.passes.PassResult(model, bool(uses))


class _Round(ir.passes.InPlacePass):
    """The operators that `find` yields read the value of what is stored of their weights."""

    def __init__(self, find: Callable[[ir.Graph], Iterator[Use]], cabinet: _Cabinet) -> None:
        super().__init__()
        self._find, self._cabinet = find, cabinet

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        uses = list(self._find(model.graph))
        for use in uses:
            writer = Writer(model, use)
            role = "table" if use.looked_up else "rows" if use.by_rows else "rounded"
            writer.read(writer.tensor(role, self._cabinet.entry(use).value))
        return ir.passes.PassResult(model, bool(uses))


def _value(use: Use, stored: Stored) -> ir.LazyTensor:
    """In the weight's own layout."""
    tensor, by_rows = use.value.const_value, use.by_rows
    assert tensor is not None

    def value() -> ir.TensorProtocol:
        rows = stored.values()
        return ir.tensor(np.ascontiguousarray(rows if by_rows else rows.T))

    return ir.LazyTensor(value, ir.DataType.FLOAT, ir.Shape(tensor.shape.numpy()))
