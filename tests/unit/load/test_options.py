"""Merging and settling of options: what wins, what is assumed, and every message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from lhcompile.errors import ConfigError
from lhcompile.load.checkpoint import Checkpoint
from lhcompile.load.options import given_options, settle, unpadded_vocabulary

Write = Callable[[str], Path]


@dataclass(frozen=True)
class Options:
    width: int
    heads: int
    eps: float = 1e-5
    tied: bool = True
    kind: Literal["a", "b"] = "a"
    layers: tuple[int, ...] = ()
    limit: int | None = None


SHAPED: dict[str, tuple[Any, str]] = {"width": (8, "embed.weight"), "layers": ((1, 2), "layers.1")}
SUPPORTED: dict[str, tuple[Any, ...]] = {"blocks": (1,), "bias": (None, True)}


def settled(values: dict[str, Any], tmp_path: Path, **more: Any) -> tuple[Options, list[str]]:
    given = given_options(Checkpoint(tmp_path / "model.pt", {}, config=values), None)
    return settle(Options, given, SHAPED, supported=SUPPORTED, ignored={"dropout"}, **more)


def test_shapes_then_options_then_defaults(tmp_path: Path) -> None:
    values = {"heads": 2, "width": 8, "layers": [1, 2], "eps": "1e-6", "blocks": 1, "dropout": 0.1, "limit": 5}
    options, notes = settled(values, tmp_path)
    assert options == Options(width=8, heads=2, eps=1e-6, layers=(1, 2), limit=5)
    assert notes == ["assumed, as neither file says otherwise: tied True, kind a"]


def test_unknown_options_are_told(tmp_path: Path) -> None:
    """Also those like the name of an option that is given, or that shapes say."""
    options, notes = settled({"heads": 2, "colour": "red", "widths": 9, "head": 3}, tmp_path)
    assert options == Options(width=8, heads=2, layers=(1, 2))
    assert notes[0] == "did not use unknown options: colour, widths, head"


def test_null_says_nothing_of_what_shapes_say(tmp_path: Path) -> None:
    options, _ = settled({"heads": 2, "width": None, "limit": None}, tmp_path)
    assert (options.width, options.limit) == (8, None)


def test_null_leaves_a_default(tmp_path: Path) -> None:
    options, notes = settled({"heads": 2, "eps": None, "tied": None}, tmp_path)
    assert (options.eps, options.tied) == (Options(width=8, heads=2).eps, True)
    assert "tied True" in notes[0]
    assert "eps" in notes[0]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "contradiction": ({"width": 9}, "the option width is 9, but 'embed.weight' in the checkpoint makes it 8"),
    "list": ({"layers": [1]}, "the option layers is [1], but 'layers.1' in the checkpoint makes it (1, 2)"),
    "unsupported": ({"blocks": 2}, "the option blocks = 2 is not supported"),
    "misspelled": ({"tie": False}, "unknown option 'tie'; is 'tied' meant?"),
    "misspelled beside null": ({"layers": None, "tied": None, "tied_": 1}, "unknown option 'tied_'; is 'tied' meant?"),
    "number": ({"eps": "small"}, "the option eps cannot be 'small'"),
    "bool": ({"tied": 1}, "the option tied cannot be 1"),
    "no bool": ({"eps": True}, "the option eps cannot be True"),
    "fraction": ({"heads": 2.5}, "the option heads cannot be 2.5"),
    "choice": ({"kind": "c"}, "the option kind is 'c', not one of a, b"),
    "missing": ({}, "model.pt: the option heads must be given in --config: no shape says it"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_options_that_cannot_be(tmp_path: Path, name: str) -> None:
    values, message = WRONG[name]
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        settled({"heads": 2, **values} if name != "missing" else values, tmp_path)
    assert "\n" not in str(caught.value)


def test_the_users_file_wins(tmp_path: Path, config_file: Write) -> None:
    stored = {"heads": 2, "eps": 0.1, "layer": {"old": 3, "sub": {"x": 1}}}
    path = config_file(json.dumps({"model": {"eps": 0.2, "layer": {"old": "${model.eps}"}}, "data": 1}))
    checkpoint = Checkpoint(tmp_path / "a.pt", {}, config=stored, config_file=tmp_path / "stored.json")
    given = given_options(checkpoint, path, nested=("layer",), renamed={"old": "new"})
    assert given.values == {"heads": 2, "eps": 0.2, "new": 0.2, "sub": {"x": 1}}
    assert given.files["eps"] == path
    assert given.files["heads"] == tmp_path / "stored.json"
    inner = given.inside("sub")
    assert (inner.values, inner.files) == ({"x": 1}, {"x": tmp_path / "stored.json"})
    assert given.inside("absent").values == {}


def test_interpolations_inside_mappings(tmp_path: Path, config_file: Write) -> None:
    path = config_file("{n: 4, attn_cfg: {num_heads: '${n}', width: '${eval:2*${.num_heads}}'}, lost: {x: '${m}'}}")
    given = given_options(Checkpoint(tmp_path / "a.pt", {}), path)
    assert given.inside("attn_cfg").values == {"num_heads": 4, "width": 8}
    assert given.unresolved == ("lost",)


def test_json_is_read_as_json(tmp_path: Path, config_file: Write) -> None:
    """Tabs, which YAML refuses, and exponents without a point, which it takes for text."""
    (tmp_path / "config.json").write_text('{\n\t"eps": 1e-05}')
    assert given_options(Checkpoint(tmp_path / "a.pt", {}), tmp_path / "config.json").values == {"eps": 1e-5}
    (tmp_path / "config.json").write_text('{\n"eps": }')
    with pytest.raises(ConfigError, match=r"config.json: the configuration is not valid YAML or JSON at line 2"):
        given_options(Checkpoint(tmp_path / "a.pt", {}), tmp_path / "config.json")


def test_mappings_and_names_that_contradict(tmp_path: Path, config_file: Write) -> None:
    checkpoint = Checkpoint(tmp_path / "a.pt", {})
    both = given_options(checkpoint, config_file("{old: 1, new: null}"), renamed={"old": "new"})
    assert both.values == {"new": 1}
    assert given_options(checkpoint, config_file("{old: null, new: 2}"), renamed={"old": "new"}).values == {"new": 2}
    with pytest.raises(ConfigError, match="the options old and new are one but differ"):
        given_options(checkpoint, config_file("{old: 1, new: 2}"), renamed={"old": "new"})
    with pytest.raises(ConfigError, match="the option layer is no mapping"):
        given_options(checkpoint, config_file("{layer: 2}"), nested=("layer",))
    with pytest.raises(ConfigError, match="the option sub is no mapping"):
        given_options(checkpoint, config_file("{sub: 2}")).inside("sub")


def test_vocabulary(tmp_path: Path) -> None:
    def vocabulary(**values: Any) -> int:
        given = given_options(Checkpoint(tmp_path / "a.pt", {}, config=values), None)
        return unpadded_vocabulary(given, 16, "embed.weight")

    assert vocabulary(heads=1) == 16
    assert vocabulary(vocab_size=12, pad_vocab_size_multiple=8) == 12
    with pytest.raises(ConfigError, match=r"vocab_size is 12 \(pad_vocab_size_multiple 1\), but 'embed.weight' in the"):
        vocabulary(vocab_size=12)
    with pytest.raises(ConfigError, match="must be positive integers"):
        vocabulary(vocab_size=0)
