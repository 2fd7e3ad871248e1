"""Least and largest entries, through which NaN and infinity show."""

from __future__ import annotations

import math

import pytest
import torch

from lhcompile.extremes import extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_ends_of_every_dtype(dtype: torch.dtype) -> None:
    assert extremes(torch.tensor([[1, -3], [2, 0]], dtype=dtype)).tolist() == [-3, 2]
    assert extremes(torch.zeros(0, 3, dtype=dtype)).tolist() == [0, 0]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_one_wrong_entry_shows(wrong: float) -> None:
    values = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert extremes(values).isfinite().all()
    values[3, 2] = wrong
    assert not extremes(values).isfinite().all()
    assert bool(extremes(values).isnan().any()) == math.isnan(wrong)
    assert not extremes(torch.complex(torch.zeros(7, 5), values)).isfinite().all()


def test_truth_values_have_ends() -> None:
    assert extremes(torch.tensor([True, False])).isfinite().all()
