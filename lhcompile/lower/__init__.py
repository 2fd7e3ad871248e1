"""Stage: streamed program in, ONNX step and prefill graphs out.

PyTorch's exporter translates every ordinary operator; the lhc operators are translated by the lowering of the
target (`portable`, `cpu`). Both graphs have the inputs `input_ids` and the states by layer, the outputs `logits`
and the new states in the same order. Only batch is dynamic, and seq in prefill.
"""

from __future__ import annotations

from lhcompile.artifacts import Lowered, Program
from lhcompile.config import LowerConfig
from lhcompile.lower import cpu, portable
from lhcompile.lower.export import export_onnx
from lhcompile.lower.external import write_graphs

__all__ = ["lower", "write_graphs"]

_TARGETS = {"portable": (portable.Step, portable.Prefill), "cpu": (cpu.Step, cpu.Prefill)}


def lower(program: Program, config: LowerConfig) -> Lowered:
    """Both graphs of a streamed program for one target.

    Raises LowerError when an operator has no ONNX form.
    """
    step, prefill = _TARGETS[config.target]
    return Lowered(
        step=export_onnx(program, step, one_token=True),
        prefill=export_onnx(program, prefill, one_token=False),
        target=config.target,
        states=program.states,
    )
