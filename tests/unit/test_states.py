"""bench.states: its formulas against what the compiler makes of checkpoints, its tables against the pages."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import lm_checkpoints
import pytest
import stacked_s4
import striped_checkpoints
import torch

import lhcompile
from bench import states
from lhcompile.artifacts import Program
from lhcompile.capture import capture
from lhcompile.config import BuildConfig, DistillConfig
from lhcompile.distill import distill
from lhcompile.load import load
from lhcompile.recognize import recognize
from lhcompile.streamify import streamify

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "families"
Files = tuple[Path, Path | None]


def striped(name: str) -> Callable[[Path], Files]:
    return lambda folder: striped_checkpoints.write(striped_checkpoints.published(name), folder)


def language(make: Callable[[], lm_checkpoints.Published]) -> Callable[[Path], Files]:
    return lambda folder: lm_checkpoints.write(make(), folder)


def stacked(kind: str) -> Callable[[Path], Files]:
    def written(folder: Path) -> Files:
        torch.save(stacked_s4.checkpoint(**stacked_s4.KINDS[kind]), folder / "model.pt")
        return folder / "model.pt", None

    return written


FAMILIES: dict[str, tuple[Callable[[Path], Files], list[states.Block]]] = {
    "h3": (
        language(lambda: lm_checkpoints.h3(d=8, head_dim=2)),
        [states.h3(8, head_dim=2), states.attention(2, 4), states.h3(8, head_dim=2)],
    ),
    "hyenadna": (language(lm_checkpoints.hyenadna), 3 * [states.hyena(6)]),
    "multihyena": (language(lm_checkpoints.multihyena), 2 * [states.multihyena(6, heads=2)]),
    "long conv": (language(lm_checkpoints.long_conv_sequence), 2 * [states.long_conv(6, channels=2)]),
    "stripedhyena": (striped("sh-7b"), [states.striped(32, 2), states.attention(2, 4), states.striped(32, 2)]),
    "evo 2": (
        striped("evo-2"),
        [states.explicit(32, 7), states.explicit(32, 128), states.striped_real(32, 16), states.attention(4, 8)],
    ),
    "s4d": (stacked("s4d"), 2 * [states.s4(stacked_s4.D_MODEL, 2 * stacked_s4.HALF)]),
    "s4": (stacked("diag"), 2 * [states.s4(stacked_s4.D_MODEL, 2 * stacked_s4.HALF, channels=2)]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_formulas_are_what_inspect_finds(tmp_path: Path, family: str) -> None:
    """Operator by operator; a convolution that is kept whole counts as an order of its taps less one."""
    write, blocks = FAMILIES[family]
    weights, config = write(tmp_path)
    found = lhcompile.inspect(str(weights), config=config, **({"context": 64} if config is None else {}))
    operators = [operator for block in blocks for operator in block]
    for layer, operator in zip(found.layers, operators, strict=True):
        if isinstance(operator, states.Attention):
            assert (layer.kind, layer.exact_bytes) == ("attention", operator.bytes(found.context_length))
        elif isinstance(operator, states.Fir):
            assert (layer.kind, layer.exact_bytes) == ("short convolution", operator.bytes)
        else:
            kind = "long convolution" if operator.order is None else "state space"
            assert (layer.kind, layer.exact_bytes) == (kind, operator.bytes(layer.taps - 1))


def recognized(files: Files) -> Program:
    return recognize(capture(load(str(files[0]), config=files[1])))


def by_kind(program: Program) -> dict[str, int]:
    """Bytes of a streamed program's states, summed as `state_bytes` does."""
    found = {"fir": 0, "modal": 0, "key_value": 0, "position": 0}
    for state in program.states:
        found["key_value" if state.kind in ("key", "value") else state.kind] += state.bytes
    return found


def test_states_of_a_hybrid_with_a_counter(tmp_path: Path) -> None:
    streamed = streamify(recognized(striped("evo-1")(tmp_path)), 48)
    operators = [*states.striped(32, 8), *states.attention(4, 8), *states.striped(32, 8)]
    assert by_kind(streamed) == states.state_bytes(operators, 48)


def test_states_of_distilled_filters_by_their_mean_order(tmp_path: Path) -> None:
    distilled = distill(recognized(FAMILIES["hyenadna"][0](tmp_path)), DistillConfig(order=3, method="hankel"), None)
    orders = torch.cat([layer.orders for layer in distilled.layers if layer.orders is not None]).double()
    assert len(orders) == 18
    expected = states.state_bytes(3 * states.hyena(6), 48, order=float(orders.mean()))
    assert by_kind(streamify(distilled.program)) == expected


def test_figures_of_a_published_size() -> None:
    """Evo 2 7B worked out by hand: 27 convolutions, 5 layers of attention, float32."""
    (model,) = [model for model in states.MODELS if model.name == "Evo2-7B-1m"]
    row = states.figures(model)
    assert (row["layers"], row["attention_layers"], row["order"], row["order_assumed"]) == (32, 5, 16, False)
    assert row["fir"] == 4 * 4096 * (27 * 3 * 2 + 9 * 127 + 9 * 6)
    assert row["modal"] == 4 * 4096 * 9 * 16
    assert row["32k"]["key_value"] == 5 * 2 * 4 * 4096 * 32768
    assert row["32k"]["transformer"] == 32 * 2 * 4 * 4096 * 32768
    assert row["2k"]["state"] == row["fir"] + row["modal"] + row["2k"]["key_value"] + 8


def test_no_figures_beyond_the_longest_sequence() -> None:
    (model,) = [model for model in states.MODELS if model.page == "hyena"]
    row = states.figures(model, order=6)
    assert row["32k"] is None
    assert row["modal"] == 4 * 864 * 18 * 6
    assert "| 864 × 18 | – | 6 (assumed) | 373 KB | 373 KB | – | – | 255 MB | – | 341 × | – |" in states.table([row])


# ---- the pages -----------------------------------------------------------------------------------------------------


def test_tables_are_up_to_date(tmp_path: Path) -> None:
    copy = shutil.copytree(PAGES, tmp_path / "families")
    (copy / "states.json").unlink()
    states.write(copy)
    for made in sorted(copy.iterdir()):
        assert made.read_bytes() == (PAGES / made.name).read_bytes(), made.name
    assert len(json.loads((copy / "states.json").read_text())["models"]) == len(states.MODELS)


@pytest.mark.parametrize("text", ["", "<!-- states -->", 2 * "<!-- states --><!-- /states -->"])
def test_a_page_without_one_place_is_refused(tmp_path: Path, text: str) -> None:
    copy = shutil.copytree(PAGES, tmp_path / "families")
    (copy / "h3.md").write_text(text)
    before = (copy / "README.md").read_bytes()
    with pytest.raises(SystemExit, match=r"h3\.md: has not one place between <!-- states --> and <!-- /states -->"):
        states.write(copy)
    (copy / "h3.md").unlink()
    with pytest.raises(SystemExit, match=r"h3\.md: the page does not exist"):
        states.write(copy)
    assert (copy / "README.md").read_bytes() == before


def test_links_lead_somewhere() -> None:
    pages = sorted(PAGES.glob("*.md"))
    linked = set()
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
            linked.add((page.parent / target).resolve())
    assert {page for page in pages if page.name != "README.md"} <= linked
    assert "(docs/families/README.md)" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_options_on_the_pages_exist() -> None:
    known = {name.replace("_", "-") for section in BuildConfig.sections().values() for name in section.model_fields}
    for page in sorted(PAGES.glob("*.md")):
        text = re.sub(r"`python -m bench.*?`", "", page.read_text(encoding="utf-8"))
        used = set(re.findall(r"(?<![\w<!-])--([a-z][a-z-]*)", text))
        assert used <= known, page.name
        assert page.name == "README.md" or "config" in used, page.name
