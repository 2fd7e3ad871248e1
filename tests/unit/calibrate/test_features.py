"""Sequences of a continuous signal: halves of a file, pieces of the halves, white noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from factories import Continuous
from torch import Tensor

from lhcompile.artifacts import LoadedModel, Program, Sequences, Signal
from lhcompile.calibrate import calibrate
from lhcompile.calibrate.features import read_features
from lhcompile.capture import capture
from lhcompile.config import CalibrationConfig
from lhcompile.recognize import recognize


@pytest.fixture(scope="module")
def program() -> Program:
    module = Continuous(length=16).eval().requires_grad_(False)
    return recognize(capture(LoadedModel(module, "module", 16, 0, "", signal=Signal(3))))


def counted(*shape: int) -> np.ndarray:
    """0, 1, 2, … in every channel, along time."""
    time = np.arange(np.prod(shape)).reshape(*shape, 1)
    return np.broadcast_to(time, (*shape, 3)).astype(np.float64)


def sequences(program: Program, path: Path | None, count: int | None = None, seed: int = 0) -> Sequences:
    def never() -> Program:
        raise AssertionError("features are not sampled from the model")

    config = CalibrationConfig(calibration=path, sequences=count, seed=seed)
    return calibrate(config, program, 1000, never)


def starts(rows: Tensor) -> list[int]:
    return [int(row[0, 0]) for row in rows]


def test_one_recording_is_halved_in_time(program: Program, tmp_path: Path) -> None:
    for array in (counted(101), counted(1, 101)):
        np.save(tmp_path / "a.npy", array)
        found = sequences(program, tmp_path / "a.npy")
        assert found.calibration.shape == found.heldout.shape == (3, 16, 3)
        assert found.calibration.dtype == torch.float32
        assert (starts(found.calibration), starts(found.heldout)) == ([0, 16, 32], [51, 67, 83])
        assert found.source == str(tmp_path / "a.npy")
        assert not found.sampled


def test_several_recordings_are_divided_among_the_halves(program: Program, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", counted(5, 40).astype(np.int16))
    found = sequences(program, tmp_path / "a.npy")
    assert (starts(found.calibration), starts(found.heldout)) == ([0, 16, 40, 56], [120, 136, 160, 176])
    few = sequences(program, tmp_path / "a.npy", 2)
    assert (starts(few.calibration), starts(few.heldout)) == ([0, 56], [120, 176])


def test_short_recordings_are_taken_whole(program: Program, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", counted(4, 9))
    assert sequences(program, tmp_path / "a.npy").heldout.shape == (2, 9, 3)


def test_without_a_file_white_noise_is_drawn(program: Program) -> None:
    found = sequences(program, None, 40, seed=5)
    assert found.source == "white noise of size 1, seed 5"
    assert found.calibration.shape == found.heldout.shape == (40, 16, 3)
    assert float(found.calibration.std()) == pytest.approx(1, abs=0.05)
    assert not torch.equal(found.calibration, found.heldout)
    assert torch.equal(found.heldout, sequences(program, None, 40, seed=5).heldout)
    assert not torch.equal(found.heldout, sequences(program, None, 40, seed=6).heldout)


def test_halves_of_a_file(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", counted(7))
    first, last = read_features(tmp_path / "a.npy", 3)
    assert (first[0, :, 0].tolist(), last[0, :, 0].tolist()) == ([0, 1, 2], [4, 5, 6])
