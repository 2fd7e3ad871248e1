"""The lowering for onnxruntime on a CPU: today the portable one, operator for operator.

onnxruntime's fused com.microsoft operators were measured and are slower here (docs/decisions/002); the target exists
so that a faster lowering changes one file and no user's command.
"""

from __future__ import annotations

from lhcompile.lower.portable import Prefill, Step

__all__ = ["BATCH", "Prefill", "Step"]

BATCH: int | None = None
