"""Gradients of the operators against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lhcompile.ops  # noqa: F401  (registers the operators)

lhc = torch.ops.lhc


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_fir(groups: int) -> None:
    arguments = random(2, 6, 4), random(8, 4 // groups, 3), random(8)
    assert torch.autograd.gradcheck(
        lambda u, w, b: lhc.fir(u, w, b, None, groups)[0], [x.requires_grad_() for x in arguments]
    )


@pytest.mark.parametrize(("outer", "inner"), [(1, 1), (2, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("length", [4, 6, 9])
def test_long_conv(outer: int, inner: int, length: int) -> None:
    arguments = random(2, 6, outer * 3 * inner), random(3, length)
    assert torch.autograd.gradcheck(
        lambda u, taps: lhc.long_conv(u, taps, None, inner)[0], [x.requires_grad_() for x in arguments]
    )


def test_a_state_has_no_gradient() -> None:
    u = random(1, 4, 3).requires_grad_()
    with pytest.raises(NotImplementedError, match="whole sequences"):
        lhc.long_conv(u, random(3, 5), random(1, 4, 3), 1)
