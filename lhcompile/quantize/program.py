"""Poles of a program in codes (`quantize.poles`), before it is lowered: graphs hold what the codes mean, in float32.

    y, s = lhc.modal_ssm(u, own, other, readout, …)      the same with the tables of the rounded poles

Residues, which stay in float32, are fitted anew to the taps that the system had, up to the context. Everything that a
lowering derives from poles follows the rounded ones.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from lhcompile.artifacts import Part, Program
from lhcompile.errors import LowerError
from lhcompile.quantize.poles import round_poles
from lhcompile.ssm import ModalSSM, RealModal

__all__ = ["quantize_poles"]

_RANK = 1e-9
"""Singular values below this share of the largest are taken for poles that coincide."""
_TABLES = ("own", "other", "readout", "direct")


def quantize_poles(program: Program, bits: int) -> tuple[Program, Part]:
    """A program with every pole rounded to codes of `bits`, and what they take: a decay and an angle each, where a pair
    counts once. The program that came in stays as it is.

    Raises LowerError, naming the table, for a pole that would not decay; none of `round_poles` does.
    """
    module = copy.copy(program.graph)
    module.__dict__["_buffers"] = dict(program.graph._buffers)
    nodes = [node for node in module.graph.nodes if node.target == torch.ops.lhc.modal_ssm.default]
    done: set[str] = set()
    before = after = 0.0
    for node in nodes:
        names = [str(table.target) for table in node.args[1:5]]
        if names[0] in done:
            continue
        done.add(names[0])
        real = RealModal(*(cast(Tensor, getattr(module, name)) for name in names))
        rounded = _rounded(real, bits, program.context)
        if not bool((rounded.own.double().hypot(rounded.other.double()) < 1).all()):
            raise LowerError(f"{names[0]}: a pole of {bits} bits does not decay")
        for name, table in zip(names, _TABLES, strict=True):
            module._buffers[name] = getattr(rounded, table)
        used = _codes(real)
        before += used * 8
        after += used * 2 * bits / 8
    return replace(program, graph=module), Part("poles", len(done), round(before), round(after))


def _rounded(real: RealModal, bits: int, length: int) -> RealModal:
    """The tables of the system with rounded poles, in their own shapes and types."""
    before = real.modal()
    system = _refitted(before, round_poles(before, bits), length).real()
    missing = len(real.own) - len(system.own)
    rows = [torch.nn.functional.pad(getattr(system, name), (0, 0, 0, missing)) for name in _TABLES[:3]]
    return RealModal(*(table.to(real.own.dtype) for table in (*rows, system.direct)))


def _refitted(before: ModalSSM, rounded: ModalSSM, length: int) -> ModalSSM:
    """The system of the rounded poles μ whose taps are nearest to those of `before`, λ and R, at times 1 … L − 1:

        G R̂ = C R,   G_jk = Σ (μ̄_j μ_k)^t,   C_jk = Σ (μ̄_j λ_k)^t,   Σ p^t = p (1 − p^{L−1}) / (1 − p)

    Tap 0 stays by the direct term. Poles that fall on one another share what they carry (the least norm).
    """
    mu, poles = rounded.poles.to(torch.complex128), before.poles.to(torch.complex128)
    residues = before.residues.to(torch.complex128)
    gram, cross = (_products(mu, other, length) for other in (mu, poles))
    size = gram.diagonal(dim1=-2, dim2=-1).real.sqrt()
    size = torch.where(size > 0, size, 1.0)
    inverse = torch.linalg.pinv(gram / (size[:, :, None] * size[:, None, :]), hermitian=True, rtol=_RANK)
    fitted = (inverse @ ((cross @ residues.unsqueeze(-1)).squeeze(-1) / size).unsqueeze(-1)).squeeze(-1) / size
    first, second = fitted[:, 0::2], fitted[:, 1::2]
    pair = mu[:, 0::2].imag != 0
    mean = (first + second.conj()) / 2
    fitted = torch.stack([torch.where(pair, mean, first.real), torch.where(pair, mean.conj(), second.real)], -1)
    fitted = fitted.flatten(1)
    direct = before.direct.double() + (residues - fitted).sum(-1).real
    return ModalSSM(mu, fitted, direct)


def _products(one: Tensor, other: Tensor, length: int) -> Tensor:
    """Σ_{1≤t<length} (conj(one_j) other_k)^t, [filters, order, order]"""
    product = one.conj().unsqueeze(-1) * other.unsqueeze(-2)
    return product * (1 - product ** (length - 1)) / (1 - product)


def _codes(real: RealModal) -> float:
    """Poles that have codes of their own: real ones, and one of every pair."""
    paired = real.other != 0
    real_ones = ((real.own != 0) & ~paired).sum()
    return float(real_ones) + float(paired.sum()) / 2
