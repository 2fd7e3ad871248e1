"""Modal truncation: of a system of higher order, the modes that carry most.

A mode with pole λ and residue R has the energy |R|² / (1 − |λ|²) (a pair counts with both its poles). The modes of
the system are sorted by it, the first `order` poles kept, pairs whole. Cheap, stable, no bound: modes that cancel
each other are kept together or lost together by luck. Source: Davison 1966; Varga 1995 for the ranking.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lhcompile.distill.spectrum import pack
from lhcompile.ssm import ModalSSM

__all__ = ["dominant"]


def dominant(system: ModalSSM, order: int) -> Tensor:
    """The dominant poles of a system, complex [filters, order rounded up to even], in slots.

    Where the last place would split a pair it stays empty.
    """
    energy = system.residues.abs().square() / (1 - system.poles.abs().square())
    partner = energy.unflatten(-1, (-1, 2)).sum(-1, keepdim=True).expand(-1, -1, 2).flatten(1)
    energy = torch.where(system.poles.imag != 0, partner, energy)
    chosen = torch.sort(energy, dim=-1, descending=True, stable=True).indices[:, :order]
    poles = system.poles.gather(-1, chosen)
    split = poles.imag.sign().sum(-1) != 0
    poles[:, -1:] = torch.where(split.unsqueeze(-1), 0, poles[:, -1:])
    return pack(poles, order + order % 2)
