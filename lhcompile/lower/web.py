"""The lowering for browsers: one row, so that every shape of the step graph is static."""

from __future__ import annotations

from lhcompile.lower.portable import Prefill, Step

__all__ = ["BATCH", "Prefill", "Step"]

BATCH: int | None = 1
