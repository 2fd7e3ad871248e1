"""Fixtures: toy models as built directories. Makes lhruntime importable from a plain checkout."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from toy_models import Toy, save, toy  # noqa: E402


@pytest.fixture(scope="session")
def model() -> Toy:
    return toy()


@pytest.fixture(scope="session")
def built(model: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level token model; tests must not change it."""
    return save(model, tmp_path_factory.mktemp("built") / "tokens")


@pytest.fixture(scope="session")
def feature_model() -> Toy:
    return toy(seed=1, vocab=5, channels=3)


@pytest.fixture(scope="session")
def built_features(feature_model: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(feature_model, tmp_path_factory.mktemp("built") / "features")
