"""Exact heads: the first k taps of a layer's filters as a short convolution, the rest distilled.

A head costs k − 1 states a channel, the latest inputs, and frees the modal system of what begins abruptly. Whether that
is a gain is a matter of price: at the price μ of a state a layer costs

    Σ_filters (min_d cost(f, d; k) + μ s_f d) + μ s_f (k − 1),    s_f the channels that share the filter,

and the k of least cost is taken, layer by layer. In exact arithmetic a head gains nothing, since k − 1 poles at 0 do
the same; but poles cannot coincide in the diagonal form, and near 0 their residues cancel: in float32 a head is
smaller.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lhcompile.distill.bank import Bank

__all__ = ["heads_at_price"]

_ORDERS = (0, 1, 2, 3, 4, 6, 8, 12, 16)
"""Orders that are compared."""


def heads_at_price(
    bank_of: Callable[[int], Bank], layers: list[tuple[int, int]], sensitivity: Tensor, sharing: Tensor, price: float,
    longest: int,
) -> Tensor:  # fmt: skip
    """Taps to keep of each filter, int [filters]: 1, 2, 4, … or `longest`, the same within a layer.

    bank_of: the filters with heads of a length; layers: number of filters and of taps of each layer
    sensitivity: [filters], KL per token for a relative squared error of 1; sharing: [filters], channels of each
    price: KL per token a state is worth
    """
    lengths = sorted({longest, *(1 << k for k in range(longest.bit_length()) if 1 << k <= longest)})
    counts, taps = [count for count, _ in layers], torch.tensor([length for _, length in layers])
    totals = []
    for head in lengths:
        bank = bank_of(head)
        costs = torch.stack([sensitivity * bank.squares(order, "hankel") for order in _ORDERS], 1).cummin(1).values
        paid = price * sharing.to(costs)
        least = (costs + paid.unsqueeze(1) * torch.tensor(_ORDERS)).amin(1) + paid * (head - 1)
        total = torch.stack([layer.sum() for layer in least.split(counts)])
        totals.append(torch.where(taps > head, total, torch.inf) if head > 1 else total)
    chosen = torch.tensor(lengths)[torch.stack(totals).argmin(0)]
    return chosen.repeat_interleave(torch.tensor(counts))
