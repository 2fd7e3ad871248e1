"""Table and picture of bench.decode_cpu, made from its JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["tables", "write"]

COLORS = {"ours": "#d1495b", "llama.cpp": "#4c78a8", "onnxruntime": "#72a276", "torch": "#b79a5b"}
EQUAL = {
    "float32": ["llama.cpp F32", "onnxruntime float32", "torch float32", "torch hyena float32"],
    "int4": ["llama.cpp Q4_0", "onnxruntime int4"],
}
"""Peers whose weights are as precise as those of ours."""
LIBRARY = " + library"
"""What the name of ours ends with where it runs on fused operators."""
Row = dict[str, Any]


def write(result: Row, folder: Path, text: str) -> None:
    """decode_cpu.json, .md and .svg; text: what the benchmark is and measures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decode_cpu.json").write_text(json.dumps(result, indent=1) + "\n")
    _, _, method = text.strip().partition("to see that it works\n\n")
    lines = ["# Decoding on two cores", method, "![tokens a second by context](decode_cpu.svg)", *tables(result)]
    (folder / "decode_cpu.md").write_text("\n\n".join(lines) + "\n")
    picture(result, folder / "decode_cpu.svg")


def tables(result: Row) -> Iterator[str]:
    """Markdown: rates, memory, and ours against the best peer of equal precision."""
    shape, machine = result["shape"], result["machine"]
    rows = ["| context | system | ms a step | tokens/s | quarter to quarter, ms | model MB | cache MB | resident MB |"]
    rows.append("|---" * 8 + "|")
    for context, systems in result["contexts"].items():
        for name, row in systems.items():
            low, high = (1e3 * part for part in row["quartiles"])
            file = result["files"].get(name.removesuffix(LIBRARY))
            size = f"{file / 1e6:.0f}" if file else "–"
            rows.append(
                f"| {context} | {name} | {1e3 * row['seconds']:.2f} | {1 / row['seconds']:.1f} "
                f"| {low:.2f} to {high:.2f} | {size} | {row['cache_bytes'] / 1e6:.2f} "
                f"| {row['resident_bytes'] / 1e6:.0f} |"
            )
    yield f"{shape['layers']} layers, width {shape['width']}, vocabulary {shape['vocabulary']}."
    yield "\n".join(rows)
    yield "**Ours against peers whose weights are as precise**\n\n" + "\n".join(_against(result))
    for name, how in result["builds"].items():
        yield f"{name}: built by `{how['command']}` in {how['seconds']:.0f} s."
    versions = ", ".join(f"{key} {value}" for key, value in machine["versions"].items() if value)
    yield (
        f"Made by `{result['command']}` on {machine['processor']}, {machine['cores']} cores, which copy "
        f"{result['bandwidth'] / 1e9:.1f} GB/s; {versions}; {result['rounds']} turns each."
    )


def _against(result: Row) -> Iterator[str]:
    yield "| context | ours | best peer | times its rate |"
    yield "|---" * 4 + "|"
    for context, systems in result["contexts"].items():
        for precision, peers in EQUAL.items():
            found = {name: systems[name]["seconds"] for name in peers if name in systems and "hyena" not in name}
            for name in (f"ours {precision}", f"ours {precision}{LIBRARY}"):
                if name in systems and found:
                    best = min(found, key=found.__getitem__)
                    yield f"| {context} | {name} | {best} | {found[best] / systems[name]['seconds']:.2f} |"


def picture(result: Row, path: Path) -> None:
    """Tokens a second by context, dashed for weights of four bits."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    contexts = list(result["contexts"])
    for name in dict.fromkeys(name for systems in result["contexts"].values() for name in systems):
        here = [context for context in contexts if name in result["contexts"][context]]
        rates = [1 / result["contexts"][context][name]["seconds"] for context in here]
        small = name.removesuffix(LIBRARY).endswith(("int4", "Q4_0"))
        style = "--" if small else ":" if "hyena" in name or name.endswith("F16") else "-"
        color = COLORS[name.split()[0]]
        mark = "s" if name.endswith(LIBRARY) else "o"
        axes.plot([int(context) for context in here], rates, mark + style, color=color, label=name, ms=3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("context")
    axes.set_ylabel("tokens a second")
    axes.legend(fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "decode", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})
