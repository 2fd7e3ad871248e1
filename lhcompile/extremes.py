"""Whether all numbers of a tensor are finite, found without another tensor of its size."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["extremes"]


def extremes(x: Tensor) -> Tensor:
    """The least and the largest entry, [2]; both NaN where an entry is NaN, zeros of an empty tensor.

    Of complex numbers: of their real and imaginary parts.
    """
    if x.is_complex():
        x = torch.view_as_real(x)
    return torch.stack(torch.aminmax(x)) if x.numel() else torch.zeros(2, dtype=x.dtype)
