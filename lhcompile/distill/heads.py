"""Exact heads: the first k taps of a layer's filters as a short convolution, the rest distilled.

A head costs k − 1 states a channel, the latest inputs, and frees the modal system of what begins abruptly. Whether that
is a gain is a matter of price: at the price μ of a state a layer costs

    Σ_filters (min_d cost(f, d; k) + μ d) + μ (k − 1) · filters,

and the k of least cost is taken, layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lhcompile.distill.bank import Bank

__all__ = ["heads_at_price"]

_ORDERS = (0, 1, 2, 3, 4, 6, 8, 12, 16)


def heads_at_price(
    bank_of: Callable[[int], Bank], counts: list[int], sensitivity: Tensor, price: float, longest: int
) -> Tensor:
    """Taps to keep of each filter, int [filters]: 1, 2, 4, … or `longest`, the same within a layer.

    bank_of: the filters with heads of a length; counts: filters of each layer; sensitivity: [filters], KL per token for
    a relative squared error of 1; price: KL per token a state is worth
    """
    lengths = sorted({longest, *(1 << k for k in range(longest.bit_length()) if 1 << k <= longest)})
    totals = []
    for head in lengths:
        bank = bank_of(head)
        costs = torch.stack([sensitivity * bank.squares(order, "hankel") for order in _ORDERS], 1)
        least = (costs + price * torch.tensor(_ORDERS)).amin(1) + price * (head - 1)
        totals.append(torch.stack([layer.sum() for layer in least.split(counts)]))
    chosen = torch.tensor(lengths)[torch.stack(totals).argmin(0)]
    return chosen.repeat_interleave(torch.tensor(counts))
