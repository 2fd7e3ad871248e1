"""What a reduction gives: modal systems with their errors and certificates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lhcompile.ssm import ModalSSM

__all__ = ["Reduction", "select", "spread"]


@dataclass(frozen=True)
class Reduction:
    """Filters of `length` taps as modal systems.

    system: ModalSSM, poles [filters, order rounded up to even]
    head:   float64 [filters, k − 1], what is added to taps 1 … k − 1 of the system for an exact head of k taps
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
    head: Tensor
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
            head=self.head[filters],
            error=self.error[filters],
            bound=self.bound[filters],
            hankel_singular_values=self.hankel_singular_values[filters],
        )

    def cpu(self) -> Reduction:
        """The same in the memory of the CPU."""
        whole = self.system
        system = ModalSSM(whole.poles.cpu(), whole.residues.cpu(), whole.direct.cpu())
        return replace(
            self,
            system=system,
            head=self.head.cpu(),
            error=self.error.cpu(),
            bound=self.bound.cpu(),
            hankel_singular_values=self.hankel_singular_values.cpu(),
        )

    def single(self) -> Reduction:
        """The same with poles, residues and heads rounded to single precision, as they are built."""
        whole = self.system
        poles, residues = (x.to(torch.complex64).to(torch.complex128) for x in (whole.poles, whole.residues))
        direct, head = (x.float().double() for x in (whole.direct, self.head))
        return replace(self, system=ModalSSM(poles, residues, direct), head=head)

    def taps(self, length: int) -> Tensor:
        """The taps h_0 … h_{length−1} of systems and heads, float64 [filters, length]."""
        taps = self.system.taps(length)
        count = max(0, min(self.head.shape[1], length - 1))
        taps[:, 1 : 1 + count] += self.head[:, :count]
        return taps


def select(reductions: Sequence[Reduction], choice: Tensor) -> Reduction:
    """One reduction out of several of the same filters: filter f as in reductions[choice[f]].

    choice: int [filters]. Widths are padded to the largest that is chosen.
    """
    used = sorted({int(c) for c in choice.unique()})
    width = max(reductions[c].system.poles.shape[1] for c in used)
    longest = max(reductions[c].head.shape[1] for c in used)
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
        head=pick(lambda r: torch.nn.functional.pad(r.head, (0, longest - r.head.shape[1]))),
        error=pick(lambda r: r.error),
        bound=pick(lambda r: r.bound),
        hankel_singular_values=pick(lambda r: r.hankel_singular_values[:, :count]),
        seconds=sum(reductions[c].seconds for c in used),
        method=" and ".join(dict.fromkeys(reductions[c].method for c in used)),
    )


def spread(result: Reduction, where: Tensor, filters: int) -> Reduction:
    """A reduction of some filters laid out over all of them; the others are zero systems."""

    def lay(x: Tensor) -> Tensor:
        return x.new_zeros(filters, *x.shape[1:]).index_copy(0, where, x)

    system = ModalSSM(lay(result.system.poles), lay(result.system.residues), lay(result.system.direct))
    return replace(
        result,
        system=system,
        head=lay(result.head),
        error=lay(result.error),
        bound=lay(result.bound),
        hankel_singular_values=lay(result.hankel_singular_values),
    )
