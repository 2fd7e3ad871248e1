"""Modal kernels of checkpoints against the sums that define them."""

from __future__ import annotations

import torch
from torch import Tensor

from lhcompile.load.modal import complex_modes, real_modes


def convolved(u: Tensor, h: Tensor) -> Tensor:
    """Σ_j h_j u_{t-j}, written out; u [batch, time, channels], h [channels, time]"""
    return torch.stack([(h[:, : t + 1].flip(-1).T * u[:, : t + 1]).sum(1) for t in range(u.shape[1])], 1)


def test_kernels_are_their_sums() -> None:
    draw = torch.Generator().manual_seed(0)
    u = torch.randn(2, 50, 3, generator=draw, dtype=torch.float64)
    p = torch.polar(0.5 + 0.49 * torch.rand(3, 4, generator=draw), 3 * torch.rand(3, 4, generator=draw))
    r, d = torch.randn(3, 4, generator=draw, dtype=torch.complex64), torch.randn(3, generator=draw)
    time = torch.arange(50)
    h = (r.to(torch.complex128)[..., None] * p.to(torch.complex128)[..., None] ** time).sum(1).real
    h[:, 0] += d
    torch.testing.assert_close(complex_modes(u, p, r, d), convolved(u, h), rtol=1e-5, atol=1e-5)
    h = (r.real.double()[..., None] * p.abs().double()[..., None] ** time).sum(1)
    h[:, 0] += d
    torch.testing.assert_close(real_modes(u, p.abs(), r.real, d), convolved(u, h), rtol=1e-5, atol=1e-5)
