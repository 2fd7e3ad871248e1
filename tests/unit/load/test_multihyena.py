"""MultiHyena checkpoints against their sums: what is read, what must not be, and every message."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_checkpoints import Published, multihyena, write
from lm_reference import MultiHyenaReference, gap

from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load import load
from lhcompile.load import multihyena as modules

LENGTH = 40
TOLERANCE = 1e-4  # float32 against float64, in units of the logits' spread

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "published": ({}, {}),
    "no D": ({"direct": False}, {}),
    "no norm": ({"norm": False}, {}),
    "parts first": ({}, {"head_layout": "parts"}),
    "skip": ({}, {"skip": 0.5}),
    "eps": ({}, {"norm_eps": 1e-2}),
    "shift": ({}, {"shift": 0.1}),
}


def distance(published: Published, folder: Path, truth: Published, **options: Any) -> float:
    weights, config = write(published, folder)
    return gap(load(str(weights), config=config).module, MultiHyenaReference(truth.plain, heads=2, **options), LENGTH)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_equations(tmp_path: Path, name: str) -> None:
    form, options = VARIANTS[name]
    published = multihyena(**form)
    published.options["layer"] |= options
    assert distance(published, tmp_path, published, **options) < TOLERANCE


def test_what_is_found_and_what_is_assumed(tmp_path: Path) -> None:
    published = multihyena(direct=False)
    weights, config = write(published, tmp_path)
    config.unlink()
    loaded = load(str(weights))
    assert (loaded.family, loaded.context_length) == ("multihyena", 40)
    assert loaded.parameters == sum(p.numel() for p in loaded.module.parameters())
    found = {"num_heads": 2, "use_norm": True, "use_bias": False, "short_filter_order": 3, "l_max": 40}
    assert found.items() <= loaded.config.items()
    (told,) = loaded.notes
    assert "modulate True, shift 0.0, normalized False, head_layout heads, norm_eps 1e-06, skip 0.0" in told


def test_filters_named_filter(tmp_path: Path) -> None:
    """Of the operator without D that adds its input, whose filter has options of its own."""
    published = multihyena()
    for key in list(published.state):
        published.state[key.replace(".filter_fn.", ".filter.")] = published.state.pop(key)
    del published.options["layer"]["modulate"], published.options["layer"]["l_max"]
    inner = {"_name_": "hyena-filter", "d_model": 2, "order": 8, "seq_len": 40, "modulate": False, "bias": True}
    published.options["layer"]["filter_cfg"] = inner
    weights, config = write(published, tmp_path)
    loaded = load(str(weights), config=config)
    plain = {key: value for key, value in published.plain.items() if not key.endswith("filter_fn.bias")}
    assert gap(loaded.module, MultiHyenaReference(plain, heads=2, skip=1.0, modulate=False), LENGTH) < TOLERANCE
    assert loaded.notes[0] == "skipped *.mixer.filter.bias, which the operator does not use"


def parts(change: Callable[[list[Any]], list[Any]]) -> Callable[[Any, pytest.MonkeyPatch], None]:
    """A mutant that exchanges q, k and v."""

    def mutate(_: Any, patch: pytest.MonkeyPatch) -> None:
        right = modules.MultiHyenaMixer._parts
        patch.setattr(modules.MultiHyenaMixer, "_parts", lambda self, z: change(list(right(self, z))))

    return mutate


def every(published: Published, end: str, change: Any) -> None:
    published.state |= {key: change(value) for key, value in published.state.items() if key.endswith(end)}


def eps_outside(_: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        modules.RMSNorm,
        "forward",
        lambda self, x: self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.eps),
    )


MUTANTS: dict[str, Callable[[Published, pytest.MonkeyPatch], Any]] = {
    "q for k": parts(lambda p: [p[1], p[0], p[2]]),
    "sum over v": parts(lambda p: [p[0], p[2], p[1]]),
    "q for v": parts(lambda p: [p[2], p[1], p[0]]),
    "parts first": lambda p, m: p.options["layer"].update(head_layout="parts"),
    "skip": lambda p, m: p.options["layer"].update(skip=1.0),
    "norm's eps": lambda p, m: p.options["layer"].update(norm_eps=1e-5),
    "heads exchanged": lambda p, m: every(p, "implicit_filter.6.weight", lambda w: w.flip(0)),
    "D of the other head": lambda p, m: every(p, "filter_fn.bias", lambda w: w.flip(0)),
    "short filter reversed": lambda p, m: every(p, "short_filter.weight", lambda w: w.flip(-1)),
    "norm left out": lambda p, m: [p.state.pop(k) for k in list(p.state) if k.endswith("mixer.norm.weight")],
    "not modulated": lambda p, m: p.options["layer"].update(modulate=False),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_reading_moves_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    truth, published = multihyena(), multihyena()
    for model in (truth, published):  # small outputs before the norm, so that its eps is heard
        every(model, "mixer.short_filter.weight", lambda w: w / 20)
        every(model, "mixer.short_filter.bias", lambda w: w / 20)
    truth = Published(truth.state)
    MUTANTS[name](published, monkeypatch)
    assert distance(published, tmp_path, truth) > 3 * TOLERANCE


def test_small_outputs_are_read_right(tmp_path: Path) -> None:
    """The model of the mutants, left alone; the place of the norm's eps is heard in it."""
    published = multihyena()
    every(published, "mixer.short_filter.weight", lambda w: w / 20)
    every(published, "mixer.short_filter.bias", lambda w: w / 20)
    published = Published(published.state, published.options)
    assert distance(published, tmp_path, published) < TOLERANCE
    with pytest.MonkeyPatch.context() as patch:
        eps_outside(published, patch)
        assert distance(published, tmp_path, published) > 3 * TOLERANCE


MIXER = "backbone.layers.0.mixer."


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("in_proj.weight", torch.ones(24, 6), "'{key}' has 24 rows, expected 18"),
        ("norm.weight", torch.ones(5), "'{key}' has shape [5], expected [6]"),
        ("filter_fn.implicit_filter.6.weight", torch.ones(4, 8), "'{key}' has 4 rows, expected a number of heads that"),
        ("filter_fn.pos_emb.z", None, "missing key '{key}' of shape [1, l_max, emb_dim]; it looked like multihyena"),
    ],
)
def test_broken_checkpoints(tmp_path: Path, key: str, value: Any, message: str) -> None:
    published = multihyena()
    published.state.pop(MIXER + key)
    if value is not None:
        published.state[MIXER + key] = value
    weights, config = write(published, tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(message.format(key=MIXER + key))):
        load(str(weights), config=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "the option num_heads is 3, but 'backbone.layers.0.mixer.filter_fn.implicit_filter.6.wei"),
        ({"norm_t": True}, "the option norm_t = True is not supported"),
        ({"head_layout": "last"}, "the option head_layout is 'last', not one of heads, parts"),
        ({"outer_mixing": True}, "the option outer_mixing = True is not supported"),
    ],
)
def test_configurations_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    published = multihyena()
    published.options["layer"] |= options
    weights, config = write(published, tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(str(weights), config=config)
