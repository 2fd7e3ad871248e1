"""Constants that a lowering derives from a modal system, in float64 before they are rounded once.

Axes: F filters, d the order, Q the chunk length. A is the transition in the form (own, other), c the readout, D the
direct term (`lhcompile.ssm`); b = (1, …, 1)ᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lhcompile.ssm import RealModal, partners, real_powers, swap

__all__ = ["ChunkTables", "Packing", "chunk_tables", "packing", "rounded"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class ChunkTables:
    """One chunk of Q tokens as matrix products.

    taps:    [F, Q + 1]      0, h_0 … h_{Q-1}: entry i - j + 1 is what output i hears of input j
    lags:    int [Q, Q]      [j, i] → i - j + 1 for i ≥ j, else 0: gathers `taps` into a Toeplitz matrix
    inject:  [F, Q, d]       A^{Q-1-j} b: what input j leaves in the state at the chunk's end
    observe: [F, d, Q]       c A^{i+1}: what output i hears of the state before the chunk
    powers:  [Q + 1, 2, d, F]  A^k as (own, other)
    """

    taps: Array
    lags: NDArray[np.int64]
    inject: Array
    observe: Array
    powers: Array


def chunk_tables(system: RealModal, chunk: int) -> ChunkTables:
    """Tables for chunks of `chunk` tokens."""
    own, other = real_powers(system.own.double(), system.other.double(), chunk)  # [Q + 1, d, F]
    readout = system.readout.double()
    driven = own + other  # A^k b
    taps = (driven[:-1] * readout).sum(1).T
    taps[:, 0] += system.direct
    observe = readout * own[1:] + swap(readout * other[1:], 1)
    index = torch.arange(chunk)
    return ChunkTables(
        taps=rounded(torch.nn.functional.pad(taps, (1, 0))),
        lags=(index[None, :] - index[:, None] + 1).clamp(min=0).numpy(),
        inject=rounded(driven[:-1].flip(0).permute(2, 0, 1)),
        observe=rounded(observe.permute(2, 1, 0)),
        powers=rounded(torch.stack([own, other], 1)),
    )


@dataclass(frozen=True)
class Packing:
    """Where the states of filters that differ in order stand; all int32, S the states, entries = d · F.

    kept:      [S]        entry of each state
    sources:   [S]        filter of each state
    partners:  [S]        state that shares a slot with each; itself where it is the only one
    positions: [entries]  state of each entry; any state, the first, where the entry is none
    """

    kept: NDArray[np.int32]
    sources: NDArray[np.int32]
    partners: NDArray[np.int32]
    positions: NDArray[np.int32]


def packing(kept: NDArray[np.int64], order: int, filters: int) -> Packing:
    """The places of the states `kept` (`RealModal.kept`) of tables [order, filters]."""
    rows, sources = np.divmod(kept, filters)
    places = np.arange(len(kept))
    positions = np.full(order * filters, -1)
    positions[kept] = places
    beside = positions[np.array(partners(order))[rows] * filters + sources]
    arrays = kept, sources, np.where(beside < 0, places, beside), positions.clip(min=0)
    return Packing(*(array.astype(np.int32) for array in arrays))


def rounded(value: torch.Tensor) -> Array:
    """Contiguous float32."""
    return np.ascontiguousarray(value.to(torch.float32).numpy())
