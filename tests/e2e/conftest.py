"""Tiny models as the files users have, and a built directory of one of them; tests must not change these."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import done
from factories import hyena

from lhcompile.load.safari import HyenaLM

TEXT = "".join(f"def f{i % 7}(x, y={i % 3}):\n    return x + {i % 5}\n" for i in range(100))


@pytest.fixture(scope="session")
def bytes_model() -> HyenaLM:
    return hyena()


@pytest.fixture(scope="session")
def checkpoint(bytes_model: HyenaLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hyena") / "model.pt"
    torch.save(bytes_model.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.py"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def order_4(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Hyena at order 4."""
    out = tmp_path_factory.mktemp("order_4") / "out"
    done("build", checkpoint, "-o", out, "--order", 4, "--calibration", text, "--sequences", 4)
    return out
