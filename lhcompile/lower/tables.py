"""Constants that a lowering derives from a modal system, in float64 before they are rounded once.

Axes: F filters, N slots of two real states, Q the chunk length. A is the transition, c the readout, D the direct term
(`lhcompile.ssm`); b = (1, 1)ᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lhcompile.ssm import block_powers

__all__ = ["ChunkTables", "chunk_tables", "columns"]

Array = NDArray[np.float32]


@dataclass(frozen=True)
class ChunkTables:
    """One chunk of Q tokens as matrix products.

    taps:    [F, Q + 1]      0, h_0 … h_{Q-1}: entry i - j + 1 is what output i hears of input j
    lags:    int [Q, Q]      [j, i] → i - j + 1 for i ≥ j, else 0: gathers `taps` into a Toeplitz matrix
    inject:  [F, Q, 2N]      A^{Q-1-j} b: what input j leaves in the state at the chunk's end
    observe: [F, 2N, Q]      c A^{i+1}: what output i hears of the state before the chunk
    powers:  [Q + 1, F, 2, 2, N]  A^k
    """

    taps: Array
    lags: NDArray[np.int64]
    inject: Array
    observe: Array
    powers: Array


def chunk_tables(
    transition: torch.Tensor, readout: torch.Tensor, direct: torch.Tensor, chunk: int
) -> ChunkTables:
    """Tables for chunks of `chunk` tokens; transition [F, 2, 2, N], readout [F, 2, N], direct [F]."""
    powers = block_powers(transition.double(), chunk)
    driven = powers.sum(3)  # A^k b: [Q + 1, F, 2, N]
    taps = torch.einsum("kfin,fin->fk", driven[:-1], readout.double())
    taps[:, 0] += direct
    inject = driven[:-1].flip(0).permute(1, 0, 2, 3).flatten(2)
    observe = torch.einsum("fin,kfijn->fjnk", readout.double(), powers[1:]).flatten(1, 2)
    index = torch.arange(chunk)
    lags = (index[None, :] - index[:, None] + 1).clamp(min=0)
    return ChunkTables(
        taps=_round(torch.nn.functional.pad(taps, (1, 0))),
        lags=lags.numpy(),
        inject=_round(inject),
        observe=_round(observe),
        powers=_round(powers),
    )


def columns(transition: torch.Tensor) -> tuple[Array, Array]:
    """The two columns of each block, [F, 2, N] each: A s = column₀ s₀ + column₁ s₁."""
    return _round(transition[:, :, 0]), _round(transition[:, :, 1])


def _round(value: torch.Tensor) -> Array:
    return np.ascontiguousarray(value.to(torch.float32).numpy())
