"""Gradients of the operators against finite differences."""

from __future__ import annotations

import pytest
import torch
from models import random_modal
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


@pytest.mark.parametrize("inner", [1, 2])
def test_modal_ssm_has_the_gradient_of_its_input(inner: int) -> None:
    real = random_modal(3, 2, torch.Generator().manual_seed(0)).real()
    tables = (real.own, real.other, real.readout, real.direct)
    u = random(2, 6, 2 * 3 * inner).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: lhc.modal_ssm(u, *tables, None, None, inner)[0], [u])
    with pytest.raises(NotImplementedError, match="no gradients with respect to its poles and residues"):
        lhc.modal_ssm(u, real.own.requires_grad_(), *tables[1:], None, None, inner)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention(groups: int) -> None:
    arguments = random(2, 5, 4, 3), random(2, 5, groups, 3) / 2, random(2, 5, groups, 2)
    assert torch.autograd.gradcheck(
        lambda q, k, v: lhc.attention(q, k, v, None, None, None, 0.7)[0], [x.requires_grad_() for x in arguments]
    )


def test_caches_have_no_gradient() -> None:
    q, cache, start = random(1, 2, 1, 3).requires_grad_(), random(1, 1, 4, 3), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="whole sequences"):
        lhc.attention(q, q, q, cache, cache, start, 1.0)
