from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def trained_like() -> Tensor:
    """Taps as training leaves them, [24, 256]: smooth functions under decaying windows, and a rough rest."""
    generator = torch.Generator().manual_seed(7)
    filters, length = 24, 256
    time = torch.arange(length, dtype=torch.float64)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decay = torch.logspace(math.log10(0.01), math.log10(0.5), filters, dtype=torch.float64).unsqueeze(-1)
    taps = torch.zeros(filters, length, dtype=torch.float64)
    for _ in range(8):
        taps += draw(filters, 1) * torch.sin(0.4 * draw(filters, 1) * time + draw(filters, 1))
    return taps * torch.exp(-decay * time) + 0.2 * draw(filters, length) * torch.exp(-decay / 3 * time)
