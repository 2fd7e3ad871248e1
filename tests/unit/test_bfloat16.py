"""Bits of bfloat16 as torch has them."""

from __future__ import annotations

import numpy as np
import torch
from lhruntime.bfloat16 import from_bits, to_bits


def test_all_numbers_come_back() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = from_bits(bits)
    truth = torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(numbers, truth)
    same = to_bits(numbers) == bits
    assert same[~np.isnan(numbers)].all()
    assert np.isnan(from_bits(to_bits(numbers)))[np.isnan(numbers)].all()


def test_others_are_rounded_to_nearest_even() -> None:
    draw = np.random.default_rng(0)
    numbers = draw.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    middles = (draw.integers(0, 1 << 16, 1000, dtype=np.uint32) << 16 | 0x8000).view(np.float32)
    ends = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45], np.float32)
    numbers = np.concatenate([numbers, middles, ends])
    truth = torch.from_numpy(numbers).bfloat16().float().numpy()
    np.testing.assert_array_equal(from_bits(to_bits(numbers)), truth)
