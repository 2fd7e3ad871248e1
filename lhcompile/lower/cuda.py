"""The lowering for onnxruntime on a GPU: fused operators where groups of them match, the portable ones elsewhere.

Graphs that name fused operators run anywhere: the library in runtimes/ops has kernels for them, and where it is not
registered onnxruntime takes the functions they carry.
"""

from __future__ import annotations

from lhcompile.lower.fused import Prefill, Step

__all__ = ["BATCH", "Prefill", "Step"]

BATCH: int | None = None
