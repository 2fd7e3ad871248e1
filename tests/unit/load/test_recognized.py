"""The loaded modules are written so that every operator of theirs is recognized for what it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import lm_checkpoints
import pytest
import torch
from models import operators

from lhcompile.capture import capture
from lhcompile.load import load
from lhcompile.recognize import recognize

FORMS: dict[str, tuple[Callable[[], lm_checkpoints.Published], dict[str, int]]] = {
    "h3": (lambda: lm_checkpoints.h3(d=16, rotary=4), {"fir": 2, "modal_ssm": 2, "attention": 1, "position": 1}),
    "h3 of wide heads": (lambda: lm_checkpoints.h3(head_dim=2, attention=()), {"fir": 3, "modal_ssm": 3}),
    "hyenadna": (lm_checkpoints.hyenadna, {"fir": 3, "long_conv": 3}),
    "long-conv": (lambda: lm_checkpoints.long_conv(channels=2), {"long_conv": 2}),
    "multihyena": (lm_checkpoints.multihyena, {"fir": 2, "long_conv": 2}),
}


@pytest.mark.parametrize("form", FORMS)
def test_operators(tmp_path: Path, form: str) -> None:
    make, wanted = FORMS[form]
    weights, config = lm_checkpoints.write(make(), tmp_path)
    loaded = load(str(weights), config=config, context=40)
    program = recognize(capture(loaded))
    targets = [str(node.target) for node in program.graph.graph.nodes]
    assert Counter(name.split(".")[1] for name in targets if name.startswith("lhc.")) == wanted
    ids = torch.randint(13, (2, 30), generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(program(ids), loaded.module(ids), rtol=1e-4, atol=1e-5)


def test_heads_share_their_filter(tmp_path: Path) -> None:
    """One filter a head, not one for each of its outer products."""
    weights, config = lm_checkpoints.write(lm_checkpoints.multihyena(), tmp_path)
    found = operators(recognize(capture(load(str(weights), config=config))))
    assert [shape for name, shape in found if name == "long_conv"] == [(2, 40), (2, 40)]
