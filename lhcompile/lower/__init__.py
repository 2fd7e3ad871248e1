"""Stage: streamed program in, ONNX step and prefill graphs out.

PyTorch's exporter translates every ordinary operator; the lhc operators are translated by the lowering of the
target, one file each: `Step` and `Prefill` (None where one token at a time is all there is), and `BATCH`, the number of
rows where it is fixed, as `Prefill.time` is that of tokens a call. For some, groups of operators become the project's
own first. Both graphs have the inputs `input_ids` and the states by layer, the outputs `logits` and the new states in
the same order. Only batch is dynamic, and seq in prefill.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import ModuleType

import onnx_ir as ir

from lhcompile.artifacts import Lowered, Program
from lhcompile.config import Target
from lhcompile.lower import cpu, cuda, mcu, portable, web
from lhcompile.lower.decode import decoding
from lhcompile.lower.export import export_onnx
from lhcompile.lower.external import WEIGHTS_NAME, share_tensors, weight_places, write_graphs
from lhcompile.lower.forms import with_functions
from lhcompile.lower.fuse import fuse
from lhcompile.lower.masked import masked

__all__ = ["WEIGHTS_NAME", "apart_in_another_type", "complete", "lower", "masked", "weight_places", "write_graphs"]

_TARGETS: dict[Target, ModuleType] = {"portable": portable, "cpu": cpu, "cuda": cuda, "web": web, "mcu": mcu}
_ON_DEVICE: frozenset[Target] = frozenset(["cuda"])
"""Targets whose loops of tokens never leave the device, for which there is a decode graph."""


def lower(program: Program, target: Target) -> Lowered:
    """Both graphs of a streamed program for one target; the step graph is also prefill where the target has no other.

    Raises LowerError when an operator has no ONNX form.
    """
    chosen = _TARGETS[target]
    step = export_onnx(fuse(program, chosen.Step.fused), chosen.Step, one_token=True, batch=chosen.BATCH)
    prefill = step
    if chosen.Prefill is not None:
        chosen_prefill = chosen.Prefill.within(program)
        fused = fuse(program, chosen_prefill.fused)
        prefill = export_onnx(fused, chosen_prefill, one_token=False, batch=chosen.BATCH, time=chosen_prefill.time)
        share_tensors(step, prefill)
    lowered = Lowered(step=step, prefill=prefill, target=target, states=program.states, batch=chosen.BATCH)
    return complete(lowered)


def complete(lowered: Lowered, decode: bool = False) -> Lowered:
    """The graphs as they are written: with the functions of their fused operators, which follow from the types around
    those.

    decode: with a decode graph, where the target has one
    """
    with_forms = partial(with_functions, target=lowered.target)
    step = with_forms(lowered.step)
    prefill = step if lowered.prefill is lowered.step else with_forms(lowered.prefill)
    lowered = replace(lowered, step=step, prefill=prefill, decode=None, past={})
    if not decode or not _chooses(lowered):
        return lowered
    graph, past = decoding(step, prefill)
    return replace(lowered, decode=with_forms(graph), past=past)


def apart_in_another_type(lowered: Lowered) -> set[str]:
    """Names of the states that the decode graph will have in tensors of a type of their own."""
    past = decoding(lowered.step, lowered.prefill)[1] if _chooses(lowered) else {}
    return {name for name, each in past.items() if each.dtype is not None}


def _chooses(lowered: Lowered) -> bool:
    return lowered.target in _ON_DEVICE and lowered.step.graph.inputs[0].dtype == ir.DataType.INT64
