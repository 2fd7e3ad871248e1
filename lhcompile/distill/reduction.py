"""The interface of distillation: banks of taps in, banks of modal systems with certificates out.

`reduce` answers one question; `factorize` gives a `Reducer`, which answers many orders from one
factorization of the filters' Hankel windows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lhcompile.distill.aaa import interpolate
from lhcompile.distill.balanced import EXTENDED
from lhcompile.distill.chain import Chain, chain, rungs_below
from lhcompile.distill.gradient import descend
from lhcompile.distill.hankel import EVEN, LEVEL, HankelFactors, Window, factor, order_limit
from lhcompile.distill.modal import dominant
from lhcompile.distill.norm import Norm, tap_norm
from lhcompile.distill.parts import in_parts
from lhcompile.distill.result import Reduction, select, spread
from lhcompile.distill.spectrum import fit_residues
from lhcompile.distill.varpro import beyond
from lhcompile.errors import DistillError
from lhcompile.ssm import ModalSSM

__all__ = ["METHODS", "Reducer", "Reduction", "checked", "factorize", "reduce", "select"]

DEFAULT_METHOD = "varpro"
_RANKS = (8, 16, 32, 64, 128, 256, 512)  # of Hankel factors: a small rank costs little
METHODS: dict[str, Callable[[Reducer, int], tuple[ModalSSM, Tensor]]] = {}


@dataclass(frozen=True)
class Reducer:
    """Filters ready to be reduced to any order up to `rank`; what one order makes is kept for the next."""

    norm: Norm
    rank: int
    _factors: dict[tuple[Window, int], HankelFactors] = field(default_factory=dict, repr=False)
    _chains: list[Chain] = field(default_factory=list, repr=False)

    def __getitem__(self, filters: Tensor) -> Reducer:
        """Some of the filters, with what is known of them."""
        factors = {window: known[filters] for window, known in self._factors.items()}
        return Reducer(self.norm[filters], self.rank, factors, [known[filters] for known in self._chains])

    def factors(self, window: Window = EVEN, order: int | None = None) -> HankelFactors:
        """The factors of a window for an order up to `rank`, whose choice does not depend on the rank."""
        rank = self.rank if order is None else next(rank for rank in (*_RANKS, order) if rank >= order)
        if (window, rank) not in self._factors:
            self._factors[window, rank] = factor(self.norm, rank, window)
        return self._factors[window, rank]

    def chain(self) -> Chain:
        """The refined systems of every order, as far as they have been asked for."""
        if not self._chains:
            self._chains.append(chain(self.norm))
        return self._chains[0]

    def bound(self, order: int) -> Tensor:
        """Lower bound of the relative error of any system of an order, [filters]; see `distill.hankel`."""
        return self.factors(LEVEL, max(order, 1)).bound(min(order, self.rank))

    def reduce(self, order: int, method: str = DEFAULT_METHOD, unit: float = 0.0) -> Reduction:
        """The systems of one order (real state dimensions, odd or even); the order is cut to the rank.

        unit: relative rounding of the states the systems will run with, 2⁻²⁴ for float32; residues are then fitted
        for the error that is left with it (`fit_residues`).
        The width of the result is that of the order asked for, also where length or rank cut it.
        """
        if order < 0:
            raise DistillError(f"order {order} is negative")
        if method not in METHODS:
            raise DistillError(f"no distillation method {method!r}; there are {', '.join(METHODS)}")
        started = time.perf_counter()
        system, error = METHODS[method](self, min(order, self.rank))
        if unit:
            system, error = _steadied(self.norm, system, error, unit)
        free, error = _free(self.norm, system, error)
        missing = order + order % 2 - system.poles.shape[1]
        poles = torch.nn.functional.pad(system.poles, (0, missing))
        residues = torch.nn.functional.pad(system.residues, (0, missing))
        level = self.factors(LEVEL, max(min(order, self.rank), 1))
        return Reduction(
            system=ModalSSM(poles, residues, free[:, 0]),
            head=free[:, 1:],
            error=error,
            bound=self.bound(order),
            hankel_singular_values=level.values / level.energy.sqrt().unsqueeze(-1).clamp_min(1e-300),
            seconds=time.perf_counter() - started,
            method=method,
        )


def _steadied(norm: Norm, system: ModalSSM, error: Tensor, unit: float) -> tuple[ModalSSM, Tensor]:
    """The systems, with other residues where rounding noise is not far below the error."""
    rough = system.noise(unit) > error * norm.size(norm.taps) / 4
    if not bool(rough.any()):
        return system, error
    again, found = fit_residues(system.poles[rough], norm[rough], unit)
    fields = [getattr(system, name).clone() for name in ("poles", "residues", "direct")]
    for old, new in zip(fields, (again.poles, again.residues, again.direct), strict=True):
        old[rough] = new
    return ModalSSM(*fields), error.index_put((rough,), found)


def _free(norm: Norm, system: ModalSSM, error: Tensor) -> tuple[Tensor, Tensor]:
    """What the head adds to the first taps of the modes, [filters, head], and the relative error with it."""
    if norm.head == 1:
        return system.direct.unsqueeze(-1), error

    def free(part: slice) -> tuple[Tensor, Tensor]:
        modes = ModalSSM(system.poles[part], system.residues[part], torch.zeros_like(system.direct[part]))
        left = norm.taps[part] - modes.taps(norm.length)
        head = norm[part].free(left)
        left[:, : norm.head] -= head
        return head, norm[part].relative(left)

    size = 16 * 4 * norm.length * (system.poles.shape[1] + 1)
    heads, errors = zip(*in_parts(free, norm.taps, size), strict=True)
    return torch.cat(heads), torch.cat(errors)


def _hankel(reducer: Reducer, order: int) -> tuple[ModalSSM, Tensor]:
    """Poles of Kung's realization, residues and direct term refitted."""
    return fit_residues(reducer.factors(EVEN, max(order, 1)).poles(order), reducer.norm)


def _varpro(reducer: Reducer, order: int) -> tuple[ModalSSM, Tensor]:
    """The refined system, never worse than Kung's realization nor than the refined system of the rung below.

    Where the closed form of `distill.chain` leaves a doubt, Kung's and that of one order less are fitted too and the
    smallest error of the taps decides: where Kung's poles are no start for it, errors come near its rounding, the last
    rung gained nothing, or the fit avoids residues of the size it takes.
    """
    norm = reducer.norm
    if order == 0 or norm.length - norm.head < 2:
        return _hankel(reducer, order)
    poles, cost = reducer.chain().poles(order, lambda d: [reducer.factors(w, d).poles(d) for w in (EVEN, LEVEL)])
    best = fit_residues(poles, norm)
    _, below = reducer.chain().found[rungs_below(order)[-1]]
    whole = norm.size(norm.taps).square()
    reached = best[1].square() * whole
    hidden = beyond(reducer.factors(EVEN, order).poles(order), norm.length - norm.head)
    unsure = hidden | (reached > 0.999 * below) | (reached > 1.01 * cost) | (cost < 1e-7 * whole)
    if bool(unsure.any()):
        for method, other in ((_hankel, order), (_varpro, order - 1)):
            best = _better(best, _laid_out(*method(reducer[unsure], other), unsure, poles.shape[1]))
    return best


def _laid_out(system: ModalSSM, error: Tensor, where: Tensor, width: int) -> tuple[ModalSSM, Tensor]:
    """Systems of the filters in a mask laid out over all of them, the others infinitely bad."""

    def lay(x: Tensor, rest: float = 0.0) -> Tensor:
        return x.new_full((len(where), *x.shape[1:]), rest).index_put((where,), x)

    missing = (0, width - system.poles.shape[1])
    poles, residues = (lay(torch.nn.functional.pad(x, missing)) for x in (system.poles, system.residues))
    return ModalSSM(poles, residues, lay(system.direct)), lay(error, float("inf"))


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
    return fit_residues(reducer.factors(EXTENDED, max(order, 1)).poles(order), reducer.norm)


def _modal(reducer: Reducer, order: int) -> tuple[ModalSSM, Tensor]:
    """The dominant poles of a Hankel reduction to 4 times the order, residues and direct term refitted."""
    high = min(4 * order, order_limit(reducer.norm.length))
    system, _ = fit_residues(factor(reducer.norm, high).poles(min(high, 4 * order)), reducer.norm)
    return fit_residues(dominant(system, order), reducer.norm)


def _aaa(reducer: Reducer, order: int) -> tuple[ModalSSM, Tensor]:
    """Poles of the rational interpolant of the frequency response, residues and direct term refitted."""
    return fit_residues(interpolate(reducer.norm, order), reducer.norm)


def _gradient(reducer: Reducer, order: int) -> tuple[ModalSSM, Tensor]:
    """Everything by gradient descent on the l2 error, as the paper does."""
    return descend(reducer.norm, order)


def _gradient_h2(reducer: Reducer, order: int) -> tuple[ModalSSM, Tensor]:
    """Everything by gradient descent on the H2 error, as the paper does."""
    return descend(reducer.norm, order, tail=True)


METHODS.update(hankel=_hankel, varpro=_varpro, balanced=_balanced, modal=_modal, aaa=_aaa)
METHODS.update({"gradient": _gradient, "gradient-h2": _gradient_h2})


def factorize(taps: Tensor, rank: int, weights: Tensor | None = None, head: int = 1) -> Reducer:
    """Check taps and get ready for all orders up to min(rank, (length − head) // 2).

    taps: real [filters, length], h_0 first; weights: power spectrum of the filters' input [filters, bins]
    (or [1, bins] for all), bins from frequency 0 to π inclusive, any scale; None weighs all alike.
    head: how many of the first taps are exact, as a short filter beside the system; 1 is its direct term.
    Runs on the taps' device in float64. Raises DistillError for NaN, Inf and growing taps.
    """
    norm = tap_norm(checked(taps), weights, head)
    return Reducer(norm, min(max(rank, 1), max(order_limit(norm.length - norm.head + 1), 1)))


def reduce(
    taps: Tensor,
    order: int | None = None,
    tol: float | None = None,
    weights: Tensor | None = None,
    method: str = DEFAULT_METHOD,
    head: int = 1,
) -> Reduction:
    """Reduce filters [filters, length] to modal systems of an order, or within a tolerance.

    order: real state dimensions of every filter; more than (length − head) // 2 gains nothing and is cut.
    tol: each filter gets the smallest order of 1, 2, 3, 4, 6, 8, 12, 16, … whose error is ≤ tol, at most
    `order` if that is given too. Raises DistillError, naming the best error, where no order does.
    weights, head: as in `factorize`.
    """
    started = time.perf_counter()
    if order is None and tol is None:
        raise DistillError("give an order or a tolerance")
    if tol is None:
        assert order is not None
        result = factorize(taps, order, weights, head).reduce(order, method)
    else:
        result = _within(taps, order, tol, weights, method, head)
    return replace(result, seconds=time.perf_counter() - started)


def _within(taps: Tensor, order: int | None, tol: float, weights: Tensor | None, method: str, head: int) -> Reduction:
    """The smallest order of the ladder for each filter; ranks grow only for the filters that need them."""
    filters, length = checked(taps).shape
    limit = order_limit(max(length - head + 1, 1))
    largest = limit if order is None else min(order, limit)
    ladder = [*rungs_below(largest)[1:], largest]
    own = None if weights is None else weights.expand(filters, -1)
    open_ = torch.arange(filters, device=taps.device)
    choice = torch.full((filters,), -1, device=taps.device)
    found: list[Reduction] = []
    reducer: Reducer | None = None
    for step, rung in enumerate(ladder):
        if reducer is None or rung > reducer.rank:
            rank = min(largest, 4 * rung)
            reducer = factorize(taps[open_], rank, None if own is None else own[open_], head)
            inside = open_
        part = torch.isin(inside, open_)
        result = reducer[part].reduce(rung, method)
        found.append(spread(result, open_, filters))
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


def checked(taps: Tensor) -> Tensor:
    """Taps in float64, or DistillError naming the filter that has no stable system."""
    if taps.dim() != 2 or taps.shape[1] == 0 or taps.is_complex():
        raise DistillError(f"taps {tuple(taps.shape)} {taps.dtype} are not real [filters, length ≥ 1]")
    taps = taps.detach().to(torch.float64)
    broken = ~torch.isfinite(taps).all(-1)
    if bool(broken.any()):
        raise DistillError(f"filter {int(broken.nonzero()[0])} has taps that are NaN or infinite")
    peak = taps.abs().amax(-1)
    extreme = (peak > 0) & ((peak < 1e-100) | (peak > 1e100))
    if bool(extreme.any()):
        index = int(extreme.nonzero()[0])
        raise DistillError(f"filter {index} has taps of size {float(peak[index]):.0e}: scale them to 1e-100 … 1e100")
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
