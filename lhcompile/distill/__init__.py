"""Distillation: the taps of long convolutions become low-order modal state-space systems.

`reduce(taps, order=…)` or `reduce(taps, tol=…)` for one answer; `factorize(taps, rank)` for a `Reducer` that
answers many orders from one factorization; `select` to give every filter its own order.
"""

from lhcompile.distill.program import distill
from lhcompile.distill.reduction import METHODS, Reducer, Reduction, factorize, reduce, select

__all__ = ["METHODS", "Reducer", "Reduction", "distill", "factorize", "reduce", "select"]
