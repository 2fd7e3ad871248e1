"""What all tests share. The helper modules beside this file (`models`, `streams`) are imported by their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from models import HeadsInnermost, HeadsOutermost, Hyena, Mixed, program_of, with_modal

from lhcompile.artifacts import Lowered, Program
from lhcompile.config import LowerConfig
from lhcompile.lower import lower
from lhcompile.streamify import streamify

torch.set_num_threads(1)  # the models are tiny: a second thread only waits for the first

TINY_MODELS = {
    "per channel": (Hyena, Mixed),
    "shared": (HeadsInnermost, HeadsOutermost),
}


@dataclass(frozen=True)
class Built:
    """A tiny model after two stages; tests must not change it."""

    program: Program
    lowered: Lowered


@pytest.fixture(scope="session")
def built() -> Callable[[str, bool], Built]:
    """built(name in TINY_MODELS, modal): the model with its long convolutions kept, or with modal systems instead."""
    made: dict[tuple[str, bool], Built] = {}

    def get(name: str, modal: bool) -> Built:
        if (name, modal) not in made:
            program = program_of(*TINY_MODELS[name])
            streamed = streamify(with_modal(program) if modal else program)
            made[name, modal] = Built(streamed, lower(streamed, LowerConfig(target="portable")))
        return made[name, modal]

    return get
