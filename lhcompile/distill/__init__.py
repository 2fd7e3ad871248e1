"""Distillation: the taps of long convolutions become low-order modal state-space systems.

This package is a function too: `lhcompile.distill(taps, order=…)` or `(taps, tol=…)` takes arrays and checks them.
Its parts take tensors: `reduce` for one answer, `factorize(taps, rank)` for a `Reducer` that answers many orders from
one factorization, `select` to give every filter its own order. `distill.distill` is the compiler's stage.
"""

import sys
from types import ModuleType
from typing import Any

from lhcompile.distill.filters import distill_filters
from lhcompile.distill.program import distill
from lhcompile.distill.reduction import METHODS, Reducer, Reduction, factorize, reduce, select

__all__ = ["METHODS", "Reducer", "Reduction", "distill", "factorize", "reduce", "select"]


class _Distill(ModuleType):
    """The type of this package, for the sake of its `__call__`."""

    def __call__(
        self,
        taps: Any,
        order: int | None = None,
        tol: float | None = None,
        weights: Any = None,
        method: str = "varpro",
        head: int = 1,
    ) -> Reduction:
        return distill_filters(taps, order, tol, weights, method, head)

    __call__.__doc__ = distill_filters.__doc__


sys.modules[__name__].__class__ = _Distill
