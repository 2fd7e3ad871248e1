"""Filters on their own, without a model: arrays in, modal systems with certificates out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lhcompile.distill.hankel import order_limit
from lhcompile.distill.reduction import reduce
from lhcompile.distill.result import Reduction
from lhcompile.errors import DistillError
from lhcompile.parallel import one_thread

__all__ = ["as_bank", "distill_filters"]

_SHORT = 1 << 16
"""One filter of so many taps is no work for several threads, which would mostly wait for each other."""


def distill_filters(
    taps: Any,
    order: int | None = None,
    tol: float | None = None,
    weights: Any = None,
    method: str = "varpro",
    head: int = 1,
) -> Reduction:
    """Reduce filters to modal systems of an order, or each to the smallest order whose error is within `tol`.

    taps: numpy array, tensor or nested lists of real numbers, [..., length], h_0 first; one axis is one filter
    order: real state dimensions of every filter; with `tol`, the largest it may use
    tol: allowed error ‖h − ĥ‖ / ‖h‖ of each filter
    weights: power spectra of what the filters hear, [..., bins] from frequency 0 to π, one for all or one for each
        filter: errors then count as loudly as they are heard
    method: a name in `lhcompile.distill.METHODS`
    head: how many of the first taps are kept exactly beside the system; 1 is its direct term

    Returns a Reduction: its `system`, the `error` of each filter and the `bound` no system of that order goes below,
    finite filters as they are (`distill.hankel` says why it holds).
    Raises DistillError, one line, for NaN, growing taps, an order above what the length can show, and a tolerance out
    of reach.
    """
    for name, value in (("order", order), ("head", head)):
        if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise DistillError(f"{name} {value!r} is not a whole number")
    bank = as_bank(taps, "taps")
    spectra = None if weights is None else as_bank(weights, "weights").to(bank.device)
    if spectra is not None and bool((spectra == 0).all(-1).any()):
        raise DistillError(f"row {int((spectra == 0).all(-1).nonzero()[0])} of the weights is all zeros")
    length = bank.shape[1]
    if head > length:
        raise DistillError(f"a head of {head} taps is longer than the filters: {length} taps")
    limit = order_limit(length - max(head, 1) + 1)
    if order is not None and order > limit:
        beyond = "" if head <= 1 else f" beyond a head of {head}"
        raise DistillError(f"order {order} is more than filters of {length} taps can show{beyond}: {limit} at most")
    if tol is not None and not 0 < tol < float("inf"):
        raise DistillError(f"tolerance {tol:g} is not positive and finite")
    alone = bank.shape[0] == 1 and length <= _SHORT
    with one_thread() if alone else nullcontext():
        return reduce(bank, order, tol, spectra, method, head)


def as_bank(values: Any, name: str) -> Tensor:
    """Real numbers [..., n] as float64 [rows, n]; one axis is one row. name: of the values, for DistillError."""
    if not isinstance(values, Tensor):
        try:
            array = np.asarray(values)
        except ValueError:
            raise DistillError(f"{name} are no array: their rows differ in length") from None
        if array.dtype.kind not in "fiu":
            raise DistillError(f"{name} are {array.dtype}, not real numbers")
        values = torch.from_numpy(array.astype(np.float64))
    if values.dtype == torch.bool or values.is_complex():
        raise DistillError(f"{name} are {values.dtype}, not real numbers")
    if values.dim() == 0 or values.numel() == 0:
        raise DistillError(f"{name} of shape {list(values.shape)} hold no numbers along an axis")
    return values.detach().to(torch.float64).reshape(-1, values.shape[-1])
