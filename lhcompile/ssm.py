"""Modal state-space mathematics: systems given by their poles and residues.

A modal system of order d maps a signal u to

    x_t = λ x_{t-1} + u_t   (one state per pole, update before read)
    y_t = Σ_k R_k x_{k,t} + D u_t          so that   h_0 = D + Σ_k R_k,   h_t = Σ_k R_k λ_k^t

The spectrum is closed under conjugation and stored in *slots* of two poles: either a conjugate pair
(λ, λ̄) with residues (R, R̄), or two real poles. Hence h is real without taking real parts, and the order
counts real state dimensions: 1 for a real pole, 2 for a conjugate pair.

The recurrence runs in real numbers, on `order` real states a filter. Rows n and n + ⌊order/2⌋ are a slot, the last
row of an odd order is a real pole by itself:

    s_t = own ∘ s_{t-1} + other ∘ swap(s_{t-1}) + u_t,    y_t = Σ_rows readout ∘ s_t + D u_t

where swap exchanges the two rows of every slot. Two real poles have own = (λ₁, λ₂), other = 0, readout = (R₁, R₂).
For a pair λ = a + ib the complex state z = (1 + i) x is driven by (1 + i) u, so both rows hear u alike:
own = (a, a), other = (−b, b), and because y = 2 Re(Q z) with Q = R/(1+i), readout = (2 Re Q, −2 Im Q).
Every operation is elementwise along the filters, which lie innermost in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ModalSSM", "RealModal", "partners", "real_powers", "swap"]


@dataclass(frozen=True)
class RealModal:
    """A bank of modal systems in real form.

    own, other, readout: [order, filters]; direct: [filters]

    Filters may differ in order: what one of smaller order does not use is zero in all three tables.
    """

    own: Tensor
    other: Tensor
    readout: Tensor
    direct: Tensor

    @property
    def kept(self) -> Tensor:
        """The entries of the flattened tables that are states, int64 [states], ascending: where a table is not zero.

        The two rows of a conjugate pair stay together, for both have the other's part of the pole. A bank without any
        state keeps its first entry, which nobody hears: a state is never empty.
        """
        entries = ((self.own != 0) | (self.other != 0) | (self.readout != 0)).flatten().nonzero().squeeze(1)
        return entries if len(entries) else torch.zeros(1, dtype=torch.int64, device=entries.device)

    @property
    def moduli(self) -> Tensor:
        """|λ| of the pole each state belongs to, [order, filters]; of a system in slots."""
        return self.own.hypot(self.other)

    @property
    def in_slots(self) -> bool:
        """Whether every slot holds a conjugate pair or two real poles, so that `modal` is its inverse."""
        half = len(self.own) // 2
        own, other = self._by_slot(self.own), self._by_slot(self.other)
        pair = (other != 0).any(1, keepdim=True)
        conjugate = (own == own.flip(1)) & (other == -other.flip(1))
        return bool((conjugate | ~pair).all()) and not bool(self.other[2 * half :].any())

    def modal(self) -> ModalSSM:
        """The system by its poles and residues, in double precision: the inverse of `ModalSSM.real`.

        Raises ValueError for a pole that does not decay.
        """
        own, other, readout = (self._by_slot(x.double()) for x in (self.own, self.other, self.readout))
        pair = (other != 0).any(1, keepdim=True)
        turned = torch.complex(readout[:, :1], -readout[:, 1:]) * (1 + 1j) / 2
        poles = torch.complex(own, -other)  # row 0 has −b
        residues = torch.where(pair, torch.cat([turned, turned.conj()], 1), readout.to(poles.dtype))
        poles, residues = (x.flatten(0, 1).T.contiguous() for x in (poles, residues))
        return ModalSSM(poles, residues, self.direct.double())

    def _by_slot(self, table: Tensor) -> Tensor:
        """[order, filters] → [slots, 2, filters]; the second of a row that stands alone is zero"""
        half = len(table) // 2
        table = torch.cat([table[:half], table[2 * half :], table[half : 2 * half]])
        table = torch.nn.functional.pad(table, (0, 0, 0, len(table) % 2))
        return table.unflatten(0, (2, -1)).transpose(0, 1)


@dataclass(frozen=True)
class ModalSSM:
    """A bank of modal systems of one order.

    poles:    complex [filters, order]; order is even; entries 2i and 2i+1 form a slot
    residues: complex [filters, order]
    direct:   real    [filters]

    Unused entries have pole 0 and residue 0. Every |pole| < 1 strictly.
    """

    poles: Tensor
    residues: Tensor
    direct: Tensor

    def __post_init__(self) -> None:
        if self.poles.shape != self.residues.shape or self.poles.shape[-1] % 2:
            raise ValueError(
                f"poles {tuple(self.poles.shape)} and residues {tuple(self.residues.shape)} "
                "must agree and have an even order"
            )
        if not bool((self.poles.abs() < 1).all()):
            raise ValueError(f"a pole has modulus {float(self.poles.abs().max())}, not below 1")

    @property
    def filters(self) -> int:
        return self.poles.shape[0]

    @property
    def orders(self) -> Tensor:
        """Real state dimensions each filter uses, int [filters]: its poles with a non-zero residue."""
        return (self.residues != 0).sum(-1)

    def taps(self, length: int) -> Tensor:
        """Impulse response h_0 … h_{length-1}, float64 [filters, length], by Vandermonde sum."""
        powers = _vandermonde(self.poles.to(torch.complex128), length)
        taps = (self.residues.to(torch.complex128).unsqueeze(1) @ powers).squeeze(1).real
        taps[:, 0] += self.direct
        return taps

    def noise(self, unit: float) -> Tensor:
        """Rounding noise of the output when states are kept with a relative error of `unit`, for white input of size 1.

        A state of size (1 − |λ|²)^{−1/2} is rounded once a step, the errors live on as it does and are read with |R|:
        unit · |R| / (1 − |λ|²), added in squares. It is large where residues cancel. float64 [filters]
        """
        read = self.residues.abs() / (1 - self.poles.abs().square())
        return unit * read.norm(dim=-1).to(torch.float64)

    def real(self) -> RealModal:
        """The real form, float64; see the module's text."""
        poles = self.poles.to(torch.complex128).T.unflatten(0, (-1, 2))  # [slots, 2, filters]
        residues = self.residues.to(torch.complex128).T.unflatten(0, (-1, 2))
        (first, second), (one, two) = poles.unbind(1), residues.unbind(1)
        pair = first.imag != 0
        turned = one / (1 + 1j)
        alone = len(first) > 0 and not bool(pair[-1].any() | (two[-1] != 0).any())

        def rows(upper: Tensor, lower: Tensor) -> Tensor:
            """The rows of all slots; a last slot that holds one real pole everywhere has one row."""
            return torch.cat([upper[:-1], lower[:-1], upper[-1:]] if alone else [upper, lower])

        return RealModal(
            own=rows(first.real, torch.where(pair, first.real, second.real)),
            other=rows(torch.where(pair, -first.imag, 0.0), torch.where(pair, first.imag, 0.0)),
            readout=rows(
                torch.where(pair, 2 * turned.real, one.real), torch.where(pair, -2 * turned.imag, two.real)
            ),
            direct=self.direct.to(torch.float64),
        )


def _vandermonde(poles: Tensor, length: int) -> Tensor:
    """λ^t for t = 0 … length-1, complex [filters, order, length]; 0^0 = 1."""
    time = torch.arange(length, dtype=torch.float64, device=poles.device)
    magnitude = poles.abs().unsqueeze(-1) ** time
    return torch.polar(magnitude, poles.angle().unsqueeze(-1) * time)


def partners(order: int) -> list[int]:
    """The row that shares a slot with each row; the last of an odd number stands alone."""
    half = order // 2
    return [*range(half, 2 * half), *range(half), *([order - 1] if order % 2 else [])]


def swap(x: Tensor, axis: int = 0) -> Tensor:
    """Exchange the two rows of every slot along the order axis."""
    return x.index_select(axis, torch.tensor(partners(x.shape[axis]), dtype=torch.int64, device=x.device))


def real_powers(own: Tensor, other: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """A^0 … A^count in the form (own, other), each [order, filters] → [count + 1, order, filters], by doubling.

    A s = own ∘ s + other ∘ swap(s), so the product of (p, q) and (p', q') is
    (p ∘ p' + q ∘ swap(q'), p ∘ q' + q ∘ swap(p')).
    """
    owns, others = torch.ones_like(own)[None], torch.zeros_like(other)[None]
    p, q = own, other  # A^len(owns)
    while len(owns) <= count:
        more = p * owns + q * swap(others, 1), p * others + q * swap(owns, 1)
        owns, others = torch.cat([owns, more[0]]), torch.cat([others, more[1]])
        p, q = p * p + q * swap(q), p * q + q * swap(p)
    return owns[: count + 1], others[: count + 1]
