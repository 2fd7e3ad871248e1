"""The figures of a reduction as plain numbers: what `lhcompile distill` prints."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.distill.result import Reduction

__all__ = ["FilterSummary", "Summary", "summarize"]


@dataclass(frozen=True)
class FilterSummary:
    """One filter: its order, its relative error, what no system of that order goes below, and its slowest pole."""

    order: int
    error: float
    bound: float
    radius: float

    @property
    def ratio(self) -> float | None:
        """How far the error is above the bound; None where the bound says nothing."""
        return self.error / self.bound if self.bound > 0 else None

    @property
    def cells(self) -> list[str]:
        """Order, error, bound, ratio and radius as text."""
        ratio = "–" if self.ratio is None else f"{self.ratio:.3g}"
        return [str(self.order), f"{self.error:.3g}", f"{self.bound:.3g}", ratio, f"{self.radius:.7g}"]


@dataclass(frozen=True)
class Summary:
    """All filters of a reduction.

    norm: "l2" of the taps, or "heard" when weights were given; seconds: wall time of the reduction
    head: first taps that are exact, beside the system
    radius: largest modulus of a pole, below 1: every system is stable
    ratio: mean error over mean bound, None where the bound is 0
    """

    filters: int
    length: int
    method: str
    norm: str
    head: int
    order_mean: float
    order_largest: int
    error_mean: float
    error_worst: float
    worst_filter: int
    bound_mean: float
    ratio: float | None
    radius: float
    seconds: float
    each: tuple[FilterSummary, ...]

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Name and text of each figure."""
        norm = "l2 norm of the taps" if self.norm == "l2" else "weighted by what the filters hear"
        ratio = "" if self.ratio is None else f"; the error is {self.ratio:.3g} times that"
        head = "" if self.head == 1 else f", beside a head of {self.head} taps"
        return [
            ("filters", f"{self.filters} of {self.length} taps"),
            ("order", f"mean {self.order_mean:.2f}, largest {self.order_largest}{head}"),
            ("error", f"mean {self.error_mean:.3g}, worst {self.error_worst:.3g} (filter {self.worst_filter}); {norm}"),
            ("bound", f"mean {self.bound_mean:.3g}, which no systems of these orders go below{ratio}"),
            ("poles", f"largest modulus {self.radius:.7g}: stable"),
            ("time", f"{self.seconds:.2f} s, {self.method}"),
        ]


def summarize(reduction: Reduction, length: int, weighted: bool) -> Summary:
    """The figures of a reduction of filters of `length` taps."""
    orders, error, bound = reduction.system.orders, reduction.error, reduction.bound
    radius = _radius(reduction)
    rows = zip(orders.tolist(), error.tolist(), bound.tolist(), radius.tolist(), strict=True)
    return Summary(
        filters=len(error),
        length=length,
        method=reduction.method,
        norm="heard" if weighted else "l2",
        head=reduction.head.shape[1] + 1,
        order_mean=float(orders.double().mean()),
        order_largest=int(orders.max()),
        error_mean=float(error.mean()),
        error_worst=float(error.max()),
        worst_filter=int(error.argmax()),
        bound_mean=float(bound.mean()),
        ratio=float(error.mean() / bound.mean()) if float(bound.mean()) > 0 else None,
        radius=float(radius.max()),
        seconds=reduction.seconds,
        each=tuple(FilterSummary(*row) for row in rows),
    )


def _radius(reduction: Reduction) -> Tensor:
    """Largest modulus of each filter's poles, [filters]; 0 without any."""
    return torch.nn.functional.pad(reduction.system.poles.abs(), (0, 1)).amax(-1)
