"""The lowering for onnxruntime on a CPU: fused operators in the step, fused projections in prefill.

The library of runtimes/ops has kernels for them; where it is not registered onnxruntime takes the functions they carry,
which are as fast as the portable lowering (docs/decisions/022). A prompt's mixers stay portable: their chunks are
products of matrices, which onnxruntime makes faster than any function scans.
"""

from __future__ import annotations

from lhcompile.lower import fused

__all__ = ["BATCH", "Prefill", "Step"]

BATCH: int | None = None
Step = fused.Step


class Prefill(fused.Prefill):
    """Any number of tokens."""

    fused = frozenset({"Linear"})
