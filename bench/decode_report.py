"""Tables and pictures of bench.decode_cuda, made from its JSON."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["picture", "tables", "write"]

COLORS = {"transformer": "#4c78a8", "hyena": "#72a276", "loop": "#b79a5b", "loop, eager": "#999999"}
OURS = {"bf16": "#e07b39", "fp8": "#8d1f3a", "int4": "#e8a0a9"}
Row = dict[str, Any]


def write(result: dict[str, Row], folder: Path, text: str) -> None:
    """decode_cuda.md and .svg; text: what the benchmark is and measures."""
    _, _, method = text.strip().partition("to see that it works\n\n")
    lines = ["# Decoding on a GPU", method, "![tokens a second](decode_cuda.svg)", *tables(result)]
    (folder / "decode_cuda.md").write_text("\n\n".join(lines) + "\n")
    picture(result, folder / "decode_cuda.svg")


def tables(result: dict[str, Row]) -> Iterator[str]:
    """Markdown, shape by shape."""
    for name, found in result.items():
        rates, machine = found["rates"], found["machine"]
        shape = found["shape"]
        yield f"## {name}: {shape['layers']} layers, width {shape['width']}, vocabulary {shape['vocabulary']}"
        yield (
            f"Memory is copied at {rates['copy'] / 1e12:.3g} TB/s and read at {rates['read'] / 1e12:.3g} TB/s; "
            f"matrices multiply at {rates['matrix'] / 1e12:.3g} TFLOP/s, floors are at {rates['nominal'] / 1e12:.3g}."
        )
        yield "**Best throughput**\n\n" + "\n".join(_best(found))
        yield "**One sequence**\n\n" + "\n".join(_single(found))
        yield "**All batches**\n\n" + "\n".join(_all(found))
        for build in found["builds"].values():
            yield f"Built by `{build['command']}` in {build['seconds']:.0f} s."
        for system, error in found.get("errors", {}).items():
            yield f"{system} failed: {error.strip().splitlines()[-1]}"
        versions = ", ".join(f"{key} {value}" for key, value in machine["versions"].items() if value)
        where = machine.get("gpu", machine["processor"])
        yield f"Made by `{found['command']}` on {where}, {versions}, in {found['seconds']:.0f} s."


def points(found: Row) -> Iterator[tuple[str, str, list[Row]]]:
    """(system, context, rows) of all that was measured; "any" where the context does not matter."""
    for system, by_context in found["systems"].items():
        for context, rows in by_context.items():
            yield system, context, rows


def _contexts(found: Row) -> list[str]:
    return sorted({context for _, context, _ in points(found)} - {"any"}, key=int) or ["any"]


def _at(found: Row, context: str) -> Iterator[tuple[str, list[Row]]]:
    """What there is at a context: systems that do not depend on it are there at every one."""
    for system, by_context in found["systems"].items():
        if context in by_context or "any" in by_context:
            yield system, by_context.get(context) or by_context["any"]


def _ratios(rows: list[tuple[str, Row]], ours: list[str]) -> Iterator[tuple[str, Row, list[str]]]:
    """Each with how many times its rate those of ours are."""
    rates = {name: row["tokens_per_second"] for name, row in rows}
    for name, row in rows:
        yield name, row, [f"{rates[one] / row['tokens_per_second']:.2f}" for one in ours]


def _best(found: Row) -> Iterator[str]:
    ours = [name for name in found["systems"] if name.startswith("ours")]
    head = ["context", "system", "batch", "ms a step", "tokens/s", "GB in use", "step / floor", "measured floor"]
    yield from _header([*head, *(f"{name} is times as fast" for name in ours)])
    for context in _contexts(found):
        best = [(name, max(rows, key=lambda row: row["tokens_per_second"])) for name, rows in _at(found, context)]
        for name, row, ratios in _ratios(best, ours):
            cells = [context, name, str(row["batch"]), f"{1e3 * row['seconds']:.2f}"]
            used = f"{row['used_bytes'] / 1e9:.1f}" if row["used_bytes"] else "–"
            cells += [f"{row['tokens_per_second']:,.0f}", used, *_floors(row), *ratios]
            yield f"| {' | '.join(cells)} |"


def _single(found: Row) -> Iterator[str]:
    ours = [name for name in found["systems"] if name.startswith("ours")]
    head = ["context", "system", "ms a step", "tokens/s", "state MB", "step / floor", "measured floor", "form"]
    yield from _header([*head, *(f"{name} is times as fast" for name in ours)])
    for context in _contexts(found):
        single = [(name, row) for name, rows in _at(found, context) for row in rows if row["batch"] == 1]
        for name, row, ratios in _ratios(single, ours):
            cells = [context, name, f"{1e3 * row['seconds']:.3f}", f"{row['tokens_per_second']:,.0f}"]
            form = str(row.get("form") or row.get("graph"))
            cells += [f"{row['state_bytes'] / 1e6:.2f}", *_floors(row), form, *ratios]
            yield f"| {' | '.join(cells)} |"


def _all(found: Row) -> Iterator[str]:
    yield from _header(["system", "context", "batch", "ms a step", "floor ms", "tokens/s", "step / floor", "measured"])
    for system, context, rows in points(found):
        for row in rows:
            cells = [system, context, str(row["batch"]), f"{1e3 * row['seconds']:.3f}"]
            cells += [f"{1e3 * row['floor_seconds']:.3f}", f"{row['tokens_per_second']:,.0f}", *_floors(row)]
            yield f"| {' | '.join(cells)} |"


def _floors(row: Row) -> list[str]:
    return [f"{row['seconds'] / row[floor]:.2f}" for floor in ("floor_seconds", "floor_measured_seconds")]


def _header(titles: list[str]) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|---" * len(titles) + "|"


def picture(result: dict[str, Row], path: Path) -> None:
    """A row for each shape: best rates by context, and rates by batch at the smallest context."""
    figure = Figure(figsize=(10, 3.6 * len(result)), layout="constrained")
    axes = figure.subplots(len(result), 2, squeeze=False)
    for (left, right), (name, found) in zip(axes, result.items(), strict=True):
        _bars(left, found)
        _curves(right, found)
        left.set_title(f"{name}: best throughput")
        right.set_title(f"{name}: by batch, context {_contexts(found)[0]}")
    with matplotlib.rc_context({"svg.hashsalt": "decode", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def _color(system: str) -> str:
    name, _, precision = system.partition(" ")
    return OURS.get(precision.partition(":")[0], "#d1495b") if name == "ours" else COLORS.get(system, "#333333")


def _bars(axes: Axes, found: Row) -> None:
    contexts, systems = _contexts(found), list(found["systems"])
    thick = 0.8 / max(1, len(systems))
    for place, system in enumerate(systems):
        for column, context in enumerate(contexts):
            for other, rows in _at(found, context):
                if other == system:
                    rate = max(row["tokens_per_second"] for row in rows)
                    label = system if column == 0 else None
                    at = column + (place - (len(systems) - 1) / 2) * thick
                    axes.bar(at, rate, thick, color=_color(system), label=label)
    axes.set_xticks(range(len(contexts)), contexts)
    axes.set_xlabel("context")
    axes.set_ylabel("tokens a second")
    axes.set_yscale("log")
    axes.set_ylim(top=8 * axes.get_ylim()[1])
    axes.legend(fontsize="small", loc="upper left", ncols=2)


def _curves(axes: Axes, found: Row) -> None:
    for system, rows in _at(found, _contexts(found)[0]):
        batches = [row["batch"] for row in rows]
        swept = len(rows) > 2  # a line between two batches would say something of those between
        rates = [row["tokens_per_second"] for row in rows]
        axes.plot(batches, rates, "o-" if swept else "D", color=_color(system), label=system, ms=3)
        if not swept:
            continue
        floor = [row["batch"] / row["floor_seconds"] for row in rows]
        axes.plot(batches, floor, ":", color=_color(system), lw=1)
    axes.set_xlabel("batch (dotted: the floor's rate)")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
