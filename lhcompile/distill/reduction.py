"""The interface of distillation: banks of taps in, banks of modal systems with certificates out.

`reduce` answers one question; `factorize` gives a `Reducer`, which answers many orders from one
factorization of the filters' Hankel windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lhcompile.distill.balanced import EXTENDED
from lhcompile.distill.gradient import descend
from lhcompile.distill.hankel import EARLY, EVEN, LEVEL, HankelFactors, Window, factor, order_limit
from lhcompile.distill.modal import dominant
from lhcompile.distill.norm import Norm, tap_norm
from lhcompile.distill.spectrum import fit_residues
from lhcompile.distill.varpro import refine
from lhcompile.errors import DistillError
from lhcompile.ssm import ModalSSM

__all__ = ["METHODS", "Reducer", "Reduction", "checked", "factorize", "reduce", "select"]

DEFAULT_METHOD = "varpro"
METHODS: dict[str, Callable[[Reducer, int], tuple[ModalSSM, Tensor]]] = {}


@dataclass(frozen=True)
class Reduction:
    """Filters of `length` taps as modal systems.

    system: ModalSSM, poles [filters, order rounded up to even]
    error:  float64 [filters], ‖h − ĥ‖ / ‖h‖ over the taps given: l2, or the input-weighted norm of
            `distill.norm` when weights were given; 0 for a filter that is all zeros
    bound:  float64 [filters] ≤ error: no system of this order, however found, has a smaller error in the
            same norm (`distill.hankel`: Eckart–Young on the Hankel window)
    hankel_singular_values: float64 [filters, k], of the window the bound comes from, relative to its
            Frobenius norm, so that their squares add up to at most 1
    seconds: wall time of this reduction, without the factorization when that was shared
    method: name in METHODS
    """

    system: ModalSSM
    error: Tensor
    bound: Tensor
    hankel_singular_values: Tensor
    seconds: float
    method: str

    def __getitem__(self, filters: Tensor) -> Reduction:
        """The reduction of some of the filters, given by index or by mask."""
        whole = self.system
        system = ModalSSM(whole.poles[filters], whole.residues[filters], whole.direct[filters])
        return replace(
            self,
            system=system,
            error=self.error[filters],
            bound=self.bound[filters],
            hankel_singular_values=self.hankel_singular_values[filters],
        )


@dataclass(frozen=True)
class Reducer:
    """Filters ready to be reduced to any order up to `rank`; their windows are factored once, when needed."""

    norm: Norm
    rank: int
    _factors: dict[Window, HankelFactors] = field(default_factory=dict, repr=False)

    def __getitem__(self, filters: Tensor) -> Reducer:
        """Some of the filters, with what is known of them."""
        return Reducer(self.norm[filters], self.rank, {w: f[filters] for w, f in self._factors.items()})

    def factors(self, window: Window = EVEN) -> HankelFactors:
        """The factors of a window, rank `rank`."""
        if window not in self._factors:
            self._factors[window] = factor(self.norm, self.rank, window)
        return self._factors[window]

    def bound(self, order: int) -> Tensor:
        """Lower bound of the relative error of any system of an order, [filters]; see `distill.hankel`."""
        bounds = [self.factors(window).bound(min(order, self.rank)) for window in (LEVEL, EVEN)]
        return torch.maximum(*bounds)

    def reduce(self, order: int, method: str = DEFAULT_METHOD) -> Reduction:
        """The systems of one order (real state dimensions, odd or even); the order is cut to the rank.

        The width of the result is that of the order asked for, also where length or rank cut it.
        """
        if order < 0:
            raise DistillError(f"order {order} is negative")
        if method not in METHODS:
            raise DistillError(f"no distillation method {method!r}; there are {', '.join(METHODS)}")
        started = time.perf_counter()
        system, error = METHODS[method](self, min(order, self.rank))
        missing = order + order % 2 - system.poles.shape[1]
        poles = torch.nn.functional.pad(system.poles, (0, missing))
        residues = torch.nn.functional.pad(system.residues, (0, missing))
        level = self.factors(LEVEL)
        return Reduction(
            system=ModalSSM(poles, residues, system.direct),
            error=error,
            bound=self.bound(order),
            hankel_singular_values=level.values / level.energy.sqrt().unsqueeze(-1).clamp_min(1e-300),
            seconds=time.perf_counter() - started,
            method=method,
        )


def _hankel(reducer: Reducer, order: int) -> tuple[ModalSSM, Tensor]:
    """Poles of Kung's realization, residues and direct term refitted."""
    return fit_residues(reducer.factors().poles(order), reducer.norm)


def _varpro(reducer: Reducer, order: int) -> tuple[ModalSSM, Tensor]:
    """The best of several Hankel starts after a few steps of variable projection, refined to the end."""
    starts = [reducer.factors(window).poles(order) for window in (EVEN, LEVEL, *EARLY)]
    best = fit_residues(starts[0], reducer.norm)
    for start in starts:
        best = _better(best, fit_residues(refine(start, reducer.norm, order, steps=8), reducer.norm))
    return _better(best, fit_residues(refine(best[0].poles, reducer.norm, order), reducer.norm))


def _better(one: tuple[ModalSSM, Tensor], other: tuple[ModalSSM, Tensor]) -> tuple[ModalSSM, Tensor]:
    """Filter by filter the system with the smaller error."""
    lower = other[1] < one[1]
    poles, residues = (
        torch.where(lower.unsqueeze(-1), getattr(other[0], name), getattr(one[0], name))
        for name in ("poles", "residues")
    )
    system = ModalSSM(poles, residues, torch.where(lower, other[0].direct, one[0].direct))
    return system, torch.where(lower, other[1], one[1])


def _balanced(reducer: Reducer, order: int) -> tuple[ModalSSM, Tensor]:
    """Poles of the balanced truncation, residues and direct term refitted."""
    return fit_residues(reducer.factors(EXTENDED).poles(order), reducer.norm)


def _modal(reducer: Reducer, order: int) -> tuple[ModalSSM, Tensor]:
    """The dominant poles of a Hankel reduction to 4 times the order, residues and direct term refitted."""
    high = min(4 * order, order_limit(reducer.norm.length))
    system, _ = fit_residues(factor(reducer.norm, high).poles(min(high, 4 * order)), reducer.norm)
    return fit_residues(dominant(system, order), reducer.norm)


def _gradient(reducer: Reducer, order: int) -> tuple[ModalSSM, Tensor]:
    """Everything by gradient descent, as the paper does."""
    return descend(reducer.norm, order)


METHODS.update(hankel=_hankel, varpro=_varpro, balanced=_balanced, modal=_modal, gradient=_gradient)


def factorize(taps: Tensor, rank: int, weights: Tensor | None = None) -> Reducer:
    """Check taps and factor their Hankel windows for all orders up to min(rank, (length − 1) // 2).

    taps: real [filters, length], h_0 first; weights: power spectrum of the filters' input [filters, bins]
    (or [1, bins] for all), bins from frequency 0 to π inclusive, any scale; None weighs all alike.
    Runs on the taps' device in float64. Raises DistillError for NaN, Inf and growing taps.
    """
    norm = tap_norm(checked(taps), weights)
    return Reducer(norm, min(max(rank, 1), max(order_limit(norm.length), 1)))


def reduce(
    taps: Tensor,
    order: int | None = None,
    tol: float | None = None,
    weights: Tensor | None = None,
    method: str = DEFAULT_METHOD,
) -> Reduction:
    """Reduce filters [filters, length] to modal systems of an order, or within a tolerance.

    order: real state dimensions of every filter; more than (length − 1) // 2 gains nothing and is cut.
    tol: each filter gets the smallest order of 1, 2, 3, 4, 6, 8, 12, 16, … whose error is ≤ tol, at most
    `order` if that is given too. Raises DistillError, naming the best error, where no order does.
    weights: as in `factorize`.
    """
    started = time.perf_counter()
    if order is None and tol is None:
        raise DistillError("give an order or a tolerance")
    if tol is None:
        assert order is not None
        result = factorize(taps, order, weights).reduce(order, method)
    else:
        result = _within(taps, order, tol, weights, method)
    return replace(result, seconds=time.perf_counter() - started)


def select(reductions: Sequence[Reduction], choice: Tensor) -> Reduction:
    """One reduction out of several of the same filters: filter f as in reductions[choice[f]].

    choice: int [filters]. Widths are padded to the largest that is chosen.
    """
    used = sorted({int(c) for c in choice.unique()})
    width = max(reductions[c].system.poles.shape[1] for c in used)
    count = min(reductions[c].hankel_singular_values.shape[1] for c in used)

    def pick(of: Callable[[Reduction], Tensor]) -> Tensor:
        out = of(reductions[used[0]])
        for c in used[1:]:
            chosen = (choice == c).reshape(-1, *[1] * (out.dim() - 1))
            out = torch.where(chosen, of(reductions[c]), out)
        return out

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[1]))

    system = ModalSSM(
        pick(lambda r: padded(r.system.poles)),
        pick(lambda r: padded(r.system.residues)),
        pick(lambda r: r.system.direct),
    )
    return Reduction(
        system=system,
        error=pick(lambda r: r.error),
        bound=pick(lambda r: r.bound),
        hankel_singular_values=pick(lambda r: r.hankel_singular_values[:, :count]),
        seconds=sum(reductions[c].seconds for c in used),
        method=reductions[used[0]].method,
    )


def _ladder(largest: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, 16, 24, … up to the largest, which is the last."""
    steps = sorted({s for k in range(largest.bit_length()) for s in (1 << k, 3 << k)})
    return [s for s in steps if s < largest] + [largest]


def _within(taps: Tensor, order: int | None, tol: float, weights: Tensor | None, method: str) -> Reduction:
    """The smallest order of the ladder for each filter; ranks grow only for the filters that need them."""
    filters, length = checked(taps).shape
    largest = order_limit(length) if order is None else min(order, order_limit(length))
    ladder = _ladder(largest) if largest else [0]
    own = None if weights is None else weights.expand(filters, -1)
    open_ = torch.arange(filters, device=taps.device)
    choice = torch.full((filters,), -1, device=taps.device)
    found: list[Reduction] = []
    reducer: Reducer | None = None
    for step, rung in enumerate(ladder):
        if reducer is None or rung > reducer.rank:
            rank = min(largest, 4 * rung)
            reducer = factorize(taps[open_], rank, None if own is None else own[open_])
            inside = open_
        part = torch.isin(inside, open_)
        result = reducer[part].reduce(rung, method)
        found.append(_spread(result, open_, filters))
        met = result.error <= tol
        choice[open_[met]] = step
        worst = (int(open_[result.error.argmax()]), float(result.error.max()))
        open_ = open_[~met]
        if not len(open_):
            return select(found, choice)
    raise DistillError(
        f"tolerance {tol:g} is out of reach for {len(open_)} of {filters} filters: "
        f"filter {worst[0]} has error {worst[1]:.3g} at order {ladder[-1]}, the largest allowed"
    )


def _spread(result: Reduction, where: Tensor, filters: int) -> Reduction:
    """A reduction of some filters laid out over all of them; the others are zero systems."""

    def lay(x: Tensor) -> Tensor:
        return x.new_zeros(filters, *x.shape[1:]).index_copy(0, where, x)

    system = ModalSSM(lay(result.system.poles), lay(result.system.residues), lay(result.system.direct))
    return replace(
        result,
        system=system,
        error=lay(result.error),
        bound=lay(result.bound),
        hankel_singular_values=lay(result.hankel_singular_values),
    )


def checked(taps: Tensor) -> Tensor:
    """Taps in float64, or DistillError naming the filter that has no stable system."""
    if taps.dim() != 2 or taps.shape[1] == 0 or taps.is_complex():
        raise DistillError(f"taps {tuple(taps.shape)} {taps.dtype} are not real [filters, length ≥ 1]")
    taps = taps.detach().to(torch.float64)
    broken = ~torch.isfinite(taps).all(-1)
    if bool(broken.any()):
        raise DistillError(f"filter {int(broken.nonzero()[0])} has taps that are NaN or infinite")
    quarter = taps.shape[1] // 4
    if quarter >= 8:
        peak = taps.abs().amax(-1, keepdim=True).clamp_min(1e-300)
        energy = (taps / peak)[:, -4 * quarter :].unflatten(-1, (4, quarter)).square().sum(-1)
        grows = ((energy[:, 1:] >= 4 * energy[:, :-1]) & (energy[:, :-1] > 0)).all(-1)
        if bool(grows.any()):
            index = int(grows.nonzero()[0])
            raise DistillError(
                f"filter {index} grows: each quarter of its taps has at least 4 times the energy before it"
            )
    return taps
