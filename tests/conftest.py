"""What all tests share. The helper modules beside this file (`models`, `streams`) are imported by their names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import ORDERS, TINY_MODELS, program_of, with_modal
from streams import Built

from lhcompile.lower import lower
from lhcompile.streamify import streamify

torch.set_num_threads(1)  # the models are tiny: a second thread only waits for the first


@pytest.fixture(scope="session")
def built() -> Callable[[str, str], Built]:
    """built(name in TINY_MODELS, form): the model with its long convolutions kept ("exact"), or with modal systems of
    one order ("modal") or of mixed orders ("packed") instead."""
    made: dict[tuple[str, str], Built] = {}

    def get(name: str, form: str) -> Built:
        if (name, form) not in made:
            program = program_of(*TINY_MODELS[name])
            if form != "exact":
                program = with_modal(program, orders=ORDERS if form == "packed" else None)
            streamed = streamify(program)
            made[name, form] = Built(streamed, lower(streamed, "portable"))
        return made[name, form]

    return get
