"""Which sequences of a text weigh filters, which hold the budget, and which give figures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lhcompile.artifacts import LoadedModel, Program, Sequences
from lhcompile.calibrate import HELD, JUDGING, SEQUENCES, WORK, calibrate
from lhcompile.capture import capture
from lhcompile.config import CalibrationConfig
from lhcompile.recognize import recognize
from lhcompile.streamify import streamify

CONTEXT, VOCABULARY = 256, 1 << 20


class Names(nn.Module):
    """Knows no more than the token; of many tokens, so that every position of a text can be told."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids) * torch.ones(4)


@pytest.fixture(scope="module")
def program() -> Program:
    return recognize(capture(LoadedModel(Names().eval().requires_grad_(False), "module", CONTEXT, 0, "")))


def of_text(
    program: Program, path: Path, windows: int, sequences: int | None = None, parameters: int = 1
) -> Sequences:
    """Of a text of so many windows in each half, its tokens their own positions."""
    np.save(path / "text.npy", np.arange(2 * windows * CONTEXT))
    config = CalibrationConfig(calibration=path / "text.npy", sequences=sequences)
    return calibrate(config, program, parameters, lambda: program)


def starts(rows: Tensor) -> list[int]:
    assert bool((rows.diff(dim=1) == 1).all())
    return (rows[:, 0] // CONTEXT).tolist()


def test_by_default_a_budget_is_held_by_many_more_than_weigh(program: Program, tmp_path: Path) -> None:
    found = of_text(program, tmp_path, 1000)
    weighing, judging, held = (starts(rows) for rows in (found.calibration, found.judging, found.heldout))
    assert len(weighing) == SEQUENCES
    assert len(judging) == JUDGING // CONTEXT
    assert len(held) == HELD // CONTEXT
    assert not set(weighing) & set(judging)
    assert max(weighing + judging) < 1000 <= min(held)
    for each in (weighing, judging, held):
        assert each == sorted(set(each))  # in the order of the text


def test_what_does_not_weigh_judges(program: Program, tmp_path: Path) -> None:
    found = of_text(program, tmp_path, 100)
    assert sorted(starts(found.calibration) + starts(found.judging)) == list(range(100))


@pytest.mark.parametrize("windows", [1, 5, 2 * SEQUENCES - 1])
def test_a_short_text_does_both(program: Program, tmp_path: Path, windows: int) -> None:
    found = of_text(program, tmp_path, windows)
    assert len(found.calibration) == min(windows, SEQUENCES)
    assert starts(found.judging) == list(range(windows))


def test_so_many_as_are_asked_for(program: Program, tmp_path: Path) -> None:
    found = of_text(program, tmp_path, 100, sequences=7)
    assert [len(rows) for rows in (found.calibration, found.judging, found.heldout)] == [7, 28, 7]


@pytest.mark.parametrize("able", [2, 40])
def test_a_large_model_takes_fewer(program: Program, tmp_path: Path, able: int) -> None:
    found = of_text(program, tmp_path, 200, parameters=WORK // (CONTEXT * able))
    wanted = [min(SEQUENCES, able), able, able]
    assert [len(rows) for rows in (found.calibration, found.judging, found.heldout)] == wanted


def test_samples_are_divided_in_thirds(program: Program) -> None:
    config = CalibrationConfig(sequences=3)
    found = calibrate(config, program, 1, lambda: streamify(program))
    kinds = found.calibration, found.judging, found.heldout
    assert [len(rows) for rows in kinds] == [3, 3, 3]
    assert len(torch.cat(kinds).unique(dim=0)) == 9
    assert found.sampled


def test_without_a_budget_fewer_are_sampled(program: Program) -> None:
    config = CalibrationConfig(sequences=3)
    found = calibrate(config, program, 1, lambda: streamify(program), judged=False)
    assert torch.equal(found.judging, found.calibration)
    assert len(torch.cat([found.calibration, found.heldout]).unique(dim=0)) == 6
