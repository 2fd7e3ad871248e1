"""Every key of every published form, lacking or misshaped: an error of one line that says so, never another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_checkpoints
import pytest
import torch
from torch import Tensor

from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load.checkpoint import Checkpoint
from lhcompile.load.families import FAMILIES

FORMS: dict[str, Callable[[], lm_checkpoints.Published]] = {
    "h3": lambda: lm_checkpoints.h3(rotary=2),
    "hyenadna": lm_checkpoints.hyenadna,
    "long-conv": lm_checkpoints.long_conv,
    "long-conv-sequence": lambda: lm_checkpoints.long_conv_sequence("batch"),
    "multihyena": lm_checkpoints.multihyena,
}
DAMAGE: dict[str, Callable[[Tensor], Tensor | None]] = {
    "lacking": lambda tensor: None,
    "scalar": lambda tensor: torch.tensor(1.0),
    "empty": lambda tensor: torch.zeros(0),
    "another axis": lambda tensor: tensor.unsqueeze(-1),
    "not finite": lambda tensor: torch.full_like(tensor, float("nan")),
}


def loaded(state: dict[str, Tensor], options: dict[str, Any]) -> object:
    checkpoint = Checkpoint(Path("model.pt"), state, config=options)
    family = next(family for family in FAMILIES if family.recognizes(checkpoint))
    return family.load(checkpoint, None, None)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("form", FORMS)
def test_every_key_is_needed_as_it_is(form: str, damage: str) -> None:
    published = FORMS[form]()
    loaded(published.state, published.options)
    for key, tensor in published.state.items():
        twice = form == "multihyena" and key.endswith(".freq")  # the other keys of the one tensor remain
        if key.endswith("num_batches_tracked") or (twice and damage == "lacking"):
            continue
        state = dict(published.state)
        broken = DAMAGE[damage](tensor)
        if broken is None:
            del state[key]
        else:
            state[key] = broken
        with pytest.raises((CheckpointError, ConfigError)) as caught:
            loaded(state, published.options)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(("model.pt: ", "config.json: ")), key
