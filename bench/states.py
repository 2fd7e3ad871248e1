"""State of one sequence, for every published size of every family, beside a Transformer's key/value cache.

    python -m bench.states --out docs/families      writes states.json and the tables in the folder's pages

Nothing is measured: bytes follow from the published configurations, in float32, by one formula for each operator with
memory. A page has its table between two marks, that of its own models, README.md that of all.

    short or explicit filter      4 · channels · (taps − 1)
    state space                   4 · channels · order             order in real numbers: 2 for a complex pair
    attention                     4 · positions · heads · 2 · width of a head
    counter, with attention       8
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "MODELS",
    "ORDER",
    "Attention",
    "Fir",
    "Modal",
    "Model",
    "attention",
    "explicit",
    "figures",
    "h3",
    "hyena",
    "long_conv",
    "multihyena",
    "s4",
    "state_bytes",
    "striped",
    "striped_real",
    "table",
    "write",
]

NUMBER, COUNTER = 4, 8
ORDER = 4.0
"""Mean order assumed for filters that are distilled; every build measures its own."""
POSITIONS = {"2k": 2048, "32k": 32768}
OPENING, CLOSING = "<!-- states -->", "<!-- /states -->"


# ---- operators with memory -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fir:
    """A causal filter of so many taps: the latest taps − 1 inputs of each channel."""

    channels: int
    taps: int

    @property
    def bytes(self) -> int:
        return NUMBER * self.channels * (self.taps - 1)


@dataclass(frozen=True)
class Modal:
    """A state space of `order` real numbers a channel; None: a filter that is distilled, whose order a build finds."""

    channels: int
    order: int | None = None

    def bytes(self, order: float) -> int:
        """order: the mean of those that are distilled"""
        return round(NUMBER * self.channels * (order if self.order is None else self.order))


@dataclass(frozen=True)
class Attention:
    """The keys and values of so many heads, each of `width` channels."""

    heads: int
    width: int

    def bytes(self, positions: int) -> int:
        return NUMBER * positions * self.heads * 2 * self.width


Operator = Fir | Modal | Attention
Block = tuple[Operator, ...]


# ---- a layer of each kind ------------------------------------------------------------------------------------------


def hyena(width: int, order: int = 2, taps: int = 3) -> Block:
    """Hyena, HyenaDNA: order − 1 filters a channel"""
    return Fir((order + 1) * width, taps), *[Modal(width)] * (order - 1)


def multihyena(width: int, heads: int, taps: int = 3) -> Block:
    """Each head has the outer products of its width / heads keys and values."""
    return Fir(3 * width, taps), Modal(width * width // heads)


def long_conv(width: int, channels: int = 1) -> Block:
    """channels: filters of each channel"""
    return (Modal(channels * width),)


def h3(width: int, states: int = 64, head_dim: int = 1) -> Block:
    """The shift, a filter of `states` taps, and states / 2 complex pairs; head_dim² products a head."""
    return Fir(width, states), Modal(width * head_dim, states)


def striped(width: int, pairs: int, taps: int = 3) -> Block:
    """StripedHyena, Evo-1: complex modes without conjugates"""
    return Fir(3 * width, taps), Modal(width, 2 * pairs)


def striped_real(width: int, states: int = 16, taps: int = 3) -> Block:
    """Evo 2, hcl: real poles"""
    return Fir(3 * width, taps), Modal(width, states)


def explicit(width: int, length: int, taps: int = 3) -> Block:
    """Evo 2, hcm and hcs: a filter of `length` taps behind the short one"""
    return Fir(3 * width, taps), Fir(width, length)


def s4(width: int, states: int = 64, channels: int = 1) -> Block:
    """S4D, S4: d_state / 2 complex pairs"""
    return (Modal(channels * width, states),)


def attention(heads: int, width: int) -> Block:
    """heads: of keys and values; width: of a head"""
    return (Attention(heads, width),)


# ---- the published sizes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """blocks: (how many, each); longest: positions that the published model is defined on, None for no limit

    page: name of its page in docs/families
    """

    page: str
    name: str
    width: int
    longest: int | None
    blocks: tuple[tuple[int, Block], ...]

    @property
    def depth(self) -> int:
        return sum(count for count, _ in self.blocks)

    @property
    def operators(self) -> list[Operator]:
        return [operator for count, block in self.blocks for _ in range(count) for operator in block]


def _hyenadna(name: str, width: int, layers: int, length: int) -> Model:
    return Model("hyenadna", f"hyenadna-{name}", width, length + 2, ((layers, hyena(width)),))


def _h3(name: str, width: int, layers: int, heads: int, attending: int) -> Model:
    blocks = (layers - attending, h3(width)), (attending, attention(heads, width // heads))
    return Model("h3", f"H3-{name}", width, None, blocks)


def _evo2(name: str, width: int, heads: int, longest: int, each: int, attending: int) -> Model:
    """each: layers of each of hcl, hcm and hcs"""
    convolutions = (each, striped_real(width)), (each, explicit(width, 128)), (each, explicit(width, 7))
    return Model("evo2", name, width, longest, (*convolutions, (attending, attention(heads, width // heads))))


MODELS = (
    Model("hyena", "hyena-small-150b-tok", 864, 2048, ((18, hyena(864)),)),
    _hyenadna("tiny-1k", 128, 2, 1_024),
    _hyenadna("small-32k", 256, 4, 32_768),
    _hyenadna("medium-160k", 256, 8, 160_000),
    _hyenadna("medium-450k", 256, 8, 450_000),
    _hyenadna("large-1m", 256, 8, 1_000_000),
    _h3("125M", 768, 12, 12, 1),
    _h3("355M", 1024, 24, 16, 2),
    _h3("1.3B", 2048, 24, 16, 2),
    _h3("2.7B, 2 attention layers", 2560, 32, 20, 2),
    _h3("2.7B, 3 attention layers", 2560, 32, 20, 3),
    Model("stripedhyena", "StripedHyena-7B", 4096, 32_768, ((16, striped(4096, 2)), (16, attention(8, 128)))),
    Model("stripedhyena", "Evo-1-131k", 4096, 131_072, ((29, striped(4096, 8)), (3, attention(32, 128)))),
    _evo2("Evo2-1B-8k", 1920, 15, 8_192, each=7, attending=4),
    _evo2("Evo2-7B-1m", 4096, 32, 1_048_576, each=9, attending=5),
    Model("s4", "S4D, the published example", 128, None, ((4, s4(128)),)),
)
"""Widths, layers, heads and states as their configurations have them."""


# ---- figures and tables --------------------------------------------------------------------------------------------


def state_bytes(operators: Iterable[Operator], positions: int, order: float = ORDER) -> dict[str, int]:
    """Bytes of one sequence's state by kind: fir, modal, key_value, position.

    positions: that keys and values have room for; order: mean of the filters that are distilled
    """
    found = {"fir": 0, "modal": 0, "key_value": 0, "position": 0}
    for operator in operators:
        if isinstance(operator, Fir):
            found["fir"] += operator.bytes
        elif isinstance(operator, Modal):
            found["modal"] += operator.bytes(order)
        else:
            found["key_value"] += operator.bytes(positions)
            found["position"] = COUNTER
    return found


def figures(model: Model, order: float = ORDER) -> dict[str, Any]:
    """A model's row; a length beyond its longest sequence has None."""
    states = [x for x in model.operators if isinstance(x, Modal)]
    fitted = any(x.order is None for x in states)
    row: dict[str, Any] = {
        "page": model.page,
        "model": model.name,
        "width": model.width,
        "layers": model.depth,
        "attention_layers": sum(isinstance(x, Attention) for x in model.operators),
        "longest": model.longest,
        "order": order if fitted else states[0].order,
        "order_assumed": fitted,
        **{kind: size for kind, size in state_bytes(model.operators, 0, order).items() if kind in ("fir", "modal")},
    }
    for name, positions in POSITIONS.items():
        state = state_bytes(model.operators, positions, order)
        total, cache = sum(state.values()), model.depth * Attention(1, model.width).bytes(positions)
        within = model.longest is None or positions <= model.longest
        at = {"key_value": state["key_value"], "state": total, "transformer": cache, "ratio": cache / total}
        row[name] = at if within else None
    return row


HEADS = (
    "model", "width × layers", "attention", "order", "fir", "modal", "key, value 2k", "32k", "Transformer 2k", "32k",
    "smaller by 2k", "32k",
)  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown of rows from `figures`."""
    lines = [HEADS, ["---"] * len(HEADS)]
    for row in rows:
        order = f"{row['order']:g}" + (" (assumed)" if row["order_assumed"] else "")
        lengths = [row[name] for name in POSITIONS]
        lines.append([
            row["model"],
            f"{row['width']} × {row['layers']}",
            str(row["attention_layers"] or "–"),
            order,
            _bytes(row["fir"]),
            _bytes(row["modal"]),
            *(_bytes(at["key_value"]) if at else "–" for at in lengths),
            *(_bytes(at["transformer"]) if at else "–" for at in lengths),
            *(f"{_digits(at['ratio'])} ×" if at else "–" for at in lengths),
        ])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _bytes(size: int) -> str:
    """Three digits in the largest unit that is reached, decimal."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= scale:
            return f"{_digits(size / scale)} {unit}"
    return f"{size} B" if size else "–"


def _digits(value: float) -> str:
    """Three significant digits, more before the point."""
    return f"{value:.{max(0, 3 - len(str(int(value))))}f}"


def write(folder: Path, order: float = ORDER) -> None:
    """Writes states.json, and each page's table between its marks.

    Raises SystemExit, in one line, when a page is missing or has no place for its table.
    """
    rows = [figures(model, order) for model in MODELS]
    pages = {"README": rows}
    for row in rows:
        pages.setdefault(row["page"], []).append(row)
    texts = {folder / f"{page}.md": _with_table(folder / f"{page}.md", mine) for page, mine in pages.items()}
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    command = "python -m bench.states --out docs/families" + ("" if order == ORDER else f" --order {order:g}")
    result = {"command": command, "dtype": "float32", "positions": POSITIONS, "order": order, "models": rows}
    (folder / "states.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _with_table(page: Path, rows: Sequence[dict[str, Any]]) -> str:
    """The page's text with its table made anew."""
    if not page.is_file():
        raise SystemExit(f"{page}: the page does not exist")
    text, place = page.read_text(encoding="utf-8"), f"{re.escape(OPENING)}.*?{re.escape(CLOSING)}"
    if len(re.findall(place, text, re.DOTALL)) != 1:
        raise SystemExit(f"{page}: has not one place between {OPENING} and {CLOSING}")
    made = f"{OPENING}\n{table(rows)}\n{CLOSING}"
    return re.sub(place, lambda _: made, text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the pages")
    parser.add_argument("--order", type=float, default=ORDER, help="mean order of filters that are distilled")
    options = parser.parse_args()
    print(table([figures(model, options.order) for model in MODELS]))
    if options.out is not None:
        write(options.out, options.order)


if __name__ == "__main__":
    main()
