"""Stage: streamed program in, ONNX step and prefill graphs out.

PyTorch's exporter translates every ordinary operator; the lhc operators are translated by the lowering of the
target, one file each: `Step` and `Prefill` (None where one token at a time is all there is), and `BATCH`, the number of
rows where it is fixed. Both graphs have the inputs `input_ids` and the states by layer, the outputs `logits` and the
new states in the same order. Only batch is dynamic, and seq in prefill.
"""

from __future__ import annotations

from types import ModuleType

from lhcompile.artifacts import Lowered, Program
from lhcompile.config import Target
from lhcompile.lower import cpu, cuda, mcu, portable, web
from lhcompile.lower.export import export_onnx
from lhcompile.lower.external import WEIGHTS_NAME, weight_places, write_graphs
from lhcompile.lower.masked import masked

__all__ = ["WEIGHTS_NAME", "lower", "masked", "weight_places", "write_graphs"]

_TARGETS: dict[Target, ModuleType] = {"portable": portable, "cpu": cpu, "cuda": cuda, "web": web, "mcu": mcu}


def lower(program: Program, target: Target) -> Lowered:
    """Both graphs of a streamed program for one target; the step graph is also prefill where the target has no other.

    Raises LowerError when an operator has no ONNX form.
    """
    chosen = _TARGETS[target]
    step = export_onnx(program, chosen.Step, one_token=True, batch=chosen.BATCH)
    prefill = step
    if chosen.Prefill is not None:
        prefill = export_onnx(program, chosen.Prefill, one_token=False, batch=chosen.BATCH)
    return Lowered(step=step, prefill=prefill, target=target, states=program.states, batch=chosen.BATCH)
