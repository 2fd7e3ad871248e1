"""Blocks of codes: never worse than their bound, the same in slices, and what no scale can hold."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from lhcompile.quantize import rounding
from lhcompile.quantize.rounding import Codes, nibbles, round_rows

FORMS = [(4, 16), (4, 32), (4, 50), (4, None), (8, 32), (8, None)]
FLOAT32 = 1e-6
"""Rounding of the sums that choose scales, relative to the bound."""


def weights(kind: str, rows: int = 40, columns: int = 50) -> np.ndarray:
    generator = np.random.default_rng(0)
    w = generator.standard_normal((rows, columns))
    if kind == "outliers":
        w = w**5
    if kind == "of any size":
        w *= 10.0 ** generator.uniform(-20, 20, (rows, 1))
    if kind == "one number a row":
        w = w * (np.arange(columns) == np.arange(rows)[:, None])
    if kind == "constant":
        w = np.ones_like(w) * generator.standard_normal((rows, 1))
    return w.astype(np.float32)


def square_errors(w: np.ndarray, codes: Codes) -> tuple[np.ndarray, np.ndarray]:
    """|w − ŵ|² of each block, and its bound."""
    columns = w.shape[1]
    ends = range(0, columns, codes.block)
    error = (w.astype(np.float64) - codes.values()) ** 2
    blocks = [(error[:, i : i + codes.block].sum(1), np.abs(w[:, i : i + codes.block]).max(1)) for i in ends]
    sums, largest = (np.stack(part, 1).astype(np.float64) for part in zip(*blocks, strict=True))
    return sums, codes.block * (largest / (2**codes.bits - 2)) ** 2


@pytest.mark.parametrize(("bits", "block"), FORMS)
@pytest.mark.parametrize("kind", ["normal", "outliers", "of any size", "one number a row", "constant"])
def test_errors_stay_within_the_bound(kind: str, bits: int, block: int | None) -> None:
    w = weights(kind)
    codes = round_rows(w, bits, block)
    assert codes.codes.shape == w.shape
    assert codes.codes.min() >= -(2 ** (bits - 1))
    assert codes.codes.max() < 2 ** (bits - 1)
    error, bound = square_errors(w, codes)
    assert codes.scales.shape == error.shape
    assert bool((error <= bound * (1 + FLOAT32)).all())
    if kind in ("one number a row", "constant"):
        assert bool((error <= bound * FLOAT32).all())


@pytest.mark.parametrize("kind", ["normal", "outliers", "one number a row", "constant"])
def test_scales_of_float16(kind: str) -> None:
    """Codes are the best there are for the scales as they are stored, and the error grows by what these are off."""
    w = weights(kind, 40, 64)
    codes = round_rows(w, 4, 32, np.float16)
    assert codes.scales.dtype == np.float16
    steps = w.reshape(40, 2, 32) / codes.scales.astype(np.float32)[..., None]
    assert np.array_equal(codes.codes.reshape(40, 2, 32), np.clip(np.rint(steps), -8, 7))
    error, bound = (np.sqrt(each) for each in square_errors(w, codes))
    off = np.sqrt(32) * 8 * 2.0**-11 * np.abs(codes.scales.astype(np.float64))
    assert bool((error <= bound * (1 + FLOAT32) + off).all())
    plain = np.sqrt(square_errors(w, round_rows(w, 4, 32))[0])
    assert bool((np.abs(error - plain) <= off).all())


def test_scales_below_float16() -> None:
    """No scale becomes zero: what is smaller than a step of the least is zero."""
    w = np.array([[1e-9], [-3e-8], [2e-7], [0]], np.float32) * np.linspace(-1, 1, 32, dtype=np.float32)
    codes = round_rows(w, 4, 32, np.float16)
    assert bool((codes.scales != 0).all())
    assert bool((np.abs(codes.values() - w) <= 2.0**-24).all())
    assert not codes.codes[[0, 3]].any()


@pytest.mark.parametrize(("bits", "gain"), [(4, 0.85), (8, 0.99)])
def test_better_than_scaling_by_the_largest(bits: int, gain: float) -> None:
    """The error of normal weights, against scale = max|w| / (2^(bits−1) − 1)."""
    w = weights("normal", 200, 320)
    scale = np.abs(w.reshape(200, 10, 32)).max(-1, keepdims=True) / (2 ** (bits - 1) - 1)
    plain = (np.rint(w.reshape(200, 10, 32) / scale) * scale).reshape(w.shape)
    mine = round_rows(w, bits, 32).values()
    assert np.linalg.norm(w - mine) <= gain * np.linalg.norm(w - plain)


def test_mutants_leave_the_bound() -> None:
    w = weights("normal")
    codes = round_rows(w, 4, 16)
    for changed in (
        Codes(codes.codes, codes.scales * np.float32(1.1), 16, 4),
        Codes(codes.codes + np.int8(1), codes.scales, 16, 4),
        Codes(codes.codes, np.roll(codes.scales, 1, 1), 16, 4),
        Codes(-codes.codes, codes.scales, 16, 4),
        Codes(np.maximum(codes.codes, -4), codes.scales, 16, 4),
    ):
        error, bound = square_errors(w, changed)
        assert bool((error > bound).any())


def test_slices_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights("outliers")
    whole = round_rows(w, 4, 16)
    monkeypatch.setattr(rounding, "SLICE", 130)
    slices = round_rows(w, 4, 16)
    assert np.array_equal(whole.codes, slices.codes)
    assert np.array_equal(whole.scales, slices.scales)


def test_zeros_and_numbers_too_small_for_a_scale() -> None:
    w = np.zeros((3, 40), np.float32)
    w[1, :] = 1e-40
    w[2, 5] = 1.5
    for bits in (4, 8):
        codes = round_rows(w, bits, 16)
        assert bool(np.isfinite(codes.scales).all())
        assert not codes.codes[:2].any()
        assert np.allclose(codes.values()[2], w[2], rtol=1e-6)


def test_the_layout_of_a_weight_does_not_matter() -> None:
    w = weights("normal")
    turned = round_rows(np.asfortranarray(w), 4, 16)
    assert np.array_equal(turned.codes, round_rows(w, 4, 16).codes)


def test_nibbles_are_offset_by_eight_the_first_below() -> None:
    every = np.arange(-8, 8)
    assert nibbles(np.array([-8, 7, 0]), np.array([7, -8, 1])).tolist() == [0xF0, 0x0F, 0x98]
    packed = nibbles(every, every[::-1])
    assert np.array_equal((packed & 15).astype(int) - 8, every)
    assert np.array_equal(every.astype(ml_dtypes.int4).astype(int), every)
