"""Tiny random Hyena models, as the files users have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lhcompile.load.safari import HyenaConfig, HyenaLM


@pytest.fixture
def tiny() -> Callable[..., HyenaLM]:
    """Makes a model with every weight random, also those that begin as zeros or tables."""

    def make(**options: Any) -> HyenaLM:
        torch.manual_seed(0)
        sizes = {"d_model": 6, "n_layer": 2, "d_inner": 10, "vocab_size": 16, "l_max": 12, "emb_dim": 5}
        model = HyenaLM(HyenaConfig(**{**sizes, "filter_order": 7, "w": 3.0, **options})).eval()
        for key, value in model.state_dict().items():
            if not key.endswith("pos_emb.t"):
                value += 0.3 * torch.randn_like(value)
        return model

    return make


@pytest.fixture
def state(tiny: Callable[..., HyenaLM]) -> dict[str, Tensor]:
    return dict(tiny().state_dict())


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """Saves an object as a torch file and returns its path."""

    def save(content: Any, name: str = "model.pt") -> str:
        torch.save(content, tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def config_file(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str, name: str = "config.yaml") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write
