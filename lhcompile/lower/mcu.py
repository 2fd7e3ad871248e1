"""The lowering for C on a microcontroller: one row, one token, every shape static."""

from __future__ import annotations

from lhcompile.lower.portable import Step

__all__ = ["BATCH", "Prefill", "Step"]

BATCH: int | None = 1
Prefill = None
