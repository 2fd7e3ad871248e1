"""The lowering for onnxruntime on a GPU: the portable operators, which all have CUDA kernels."""

from __future__ import annotations

from lhcompile.lower.portable import Prefill, Step

__all__ = ["BATCH", "Prefill", "Step"]

BATCH: int | None = None
