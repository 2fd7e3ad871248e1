"""Tables and picture of bench.distill, made from its JSON."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from operator import truediv
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["PLOTTED", "picture", "tables"]

PLOTTED = {"filters", "cost"}
"""Parts that the picture shows."""

COLORS = {
    "hankel": "#4c78a8",
    "varpro": "#d1495b",
    "balanced": "#72a276",
    "modal": "#b79a5b",
    "aaa": "#8063a7",
    "gradient": "#555555",
    "gradient-h2": "#999999",
}
Row = dict[str, Any]


def tables(result: dict[str, Any]) -> str:
    """Markdown of every part that was run."""
    makers: dict[str, Callable[[list[Row]], str]] = {
        "filters": _filters,
        "patience": _patience,
        "starts": _starts,
        "planted": _planted,
        "cost": _cost,
        "scale": _scale,
        "model": _model,
    }
    out = ["# Distillation", "Errors are relative; a bound is what no system of that order goes below."]
    if PLOTTED & result.keys():
        out.append("![error and time of the methods](distill.svg)")
    for part, make in makers.items():
        if part in result:
            out += [make(result[part]["rows"]), _made(result[part])]
    return "\n\n".join(out)


def _made(part: dict[str, Any]) -> str:
    machine = part["machine"]
    torch = machine["versions"]["torch"]
    return f"Made by `{part['command']}` on {machine['processor']}, {machine['cores']} cores, torch {torch}."


def _filters(rows: list[Row]) -> str:
    out = [
        "## Trained filters",
        f"{rows[0]['filters']} filters of the example model, spread over its layers, 1024 taps each.",
    ]
    for norm, title in (("l2", "l2 norm of the taps"), ("heard", "weighted by what each filter hears")):
        mine = [row for row in rows if row["norm"] == norm]
        bounds = {row["order"]: f"{row['bound_mean']:.4f}" for row in mine}
        out += [f"**Mean error, {title}**", _by_method(mine, "error_mean", ".4f", [("bound", bounds)])]
        out += [f"**Largest error, {title}**", _by_method(mine, "error_worst", ".3f")]
        out += [f"**Milliseconds a filter, {title}**", _by_method(mine, "milliseconds", ".2f")]
    return "\n\n".join([*out, "**Against gradient descent**", _against_gradient(rows)])


def _against_gradient(rows: list[Row]) -> str:
    """Errors and times of hankel and varpro as shares of gradient descent's, at equal order."""
    plain = {(row["method"], row["order"]): row for row in rows if row["norm"] == "l2"}
    body = []
    for (slow, order), other in plain.items():
        for quick in ("hankel", "varpro") if slow.startswith("gradient") else ():
            mine = plain[quick, order]
            layers = [a / b for a, b in zip(mine["layers"], other["layers"], strict=True)]
            ratio = mine["error_mean"] / other["error_mean"]
            faster = other["milliseconds"] / mine["milliseconds"]
            body.append([quick, slow, order, f"{ratio:.3f}", f"{max(layers):.3f}", f"{faster:.0f}"])
    heads = ["method", "against", "order", "mean error ÷", "worst layer's mean ÷", "times as fast"]
    return _table(heads, body)


def _patience(rows: list[Row]) -> str:
    body = [
        (
            row["settings"],
            row["order"],
            f"{row['error']:.4f}",
            f"{row['default_error']:.4f}",
            f"{max(map(truediv, row['default_layers'], row['layers'])):.2f}",
            f"{row['reached']} of {row['filters']}",
            f"{row['seconds'] / row['default_seconds']:.0f}",
            f"{row['plain_seconds'] / row['default_seconds']:.0f}" if "plain_seconds" in row else "–",
        )
        for row in rows
    ]
    heads = ["settings", "order", "mean error", "default's", "default's share in the worst layer"]
    heads += ["filters within 1 % of the default's", "times the default's time", "in the published form"]
    steps = f"{rows[0]['steps']:,}".replace(",", " ")
    text = (
        f"{rows[0]['filters']} of the filters, {steps} steps each. *Published* are the settings of the "
        "notebook in which one of the paper's authors distills a MultiHyena (notebooks/distill.ipynb of "
        "github.com/Zymrael/savanna): AdamW, a rate of 6e-4 that falls as a cosine, poles that start at random; there "
        "the 108 filters of a layer took 67 s on a GPU, at 16 modes, which is order 32. *Tuned* are those of "
        "`--method gradient`. Times are the processor's, with gradients by hand; the published form is float32 with "
        "automatic differentiation through complex powers, reckoned from 20 of its steps."
    )
    return f"## Gradient descent with patience\n\n{text}\n\n{_table(heads, body)}"


def _starts(rows: list[Row]) -> str:
    body = [[row["order"], f"{row['mean']:.4f}", f"{row['worst']:.4f}"] for row in rows]
    text = f"{rows[0]['filters']} of the filters: the default's error as a multiple of the least that 60 starts end at."
    return f"## Many starts\n\n{text}\n\n{_table(['order', 'mean', 'worst'], body)}"


def _by_method(rows: list[Row], figure: str, form: str, more: Sequence[tuple[str, dict[int, str]]] = ()) -> str:
    """A row for each method, a column for each order."""
    orders = sorted({row["order"] for row in rows})
    found: dict[str, dict[int, str]] = {}
    for row in rows:
        found.setdefault(row["method"], {})[row["order"]] = format(row[figure], form)
    body = [[name, *(cells.get(order, "–") for order in orders)] for name, cells in [*found.items(), *more]]
    return _table(["order", *orders], body)


def _planted(rows: list[Row]) -> str:
    body = [
        [row["kind"], f"{row['noise']:g}", row["order"], row["method"]]
        + [f"{row[name]:.2e}" for name in ("error_mean", "error_worst", "missed_mean")]
        + [f"{row['milliseconds']:.2f}"]
        for row in rows
    ]
    heads = ["poles", "noise", "order", "method", "mean error", "worst", "error of the noiseless taps", "ms a filter"]
    text = (
        "Random systems reduced to their own order, 1024 taps, moduli up to 0.9995; clustered: angles within 0.1 of "
        "each other. Noise is white, of this norm relative to the taps'."
    )
    return f"## Planted systems\n\n{text}\n\n{_table(heads, body)}"


def _cost(rows: list[Row]) -> str:
    out = [
        "## Cost",
        "Seconds of a reduction to order 4, below one the shortest of three; a dash where it would have been long.",
    ]
    for what, title in (("length", "one filter, by length"), ("filters", "1024 taps, by number of filters")):
        mine = [row for row in rows if row["what"] == what]
        sizes = sorted({row["size"] for row in mine})
        found = {(row["method"], row["size"]): row["seconds"] for row in mine}
        methods = list(dict.fromkeys(row["method"] for row in mine))
        body = [
            [method, *(f"{found[method, size]:.3g}" if (method, size) in found else "–" for size in sizes)]
            for method in methods
        ]
        out += [f"**{title[0].upper()}{title[1:]}**", _table(["method", *map(str, sizes)], body)]
    return "\n\n".join(out)


def _scale(rows: list[Row]) -> str:
    body = [
        [row[name] for name in ("device", "filters", "length", "method", "order")]
        + [f"{row['seconds']:.1f}", f"{row['gib']:.2f}", f"{row['error_mean']:.4f}"]
        for row in rows
    ]
    text = (
        f"Made-up implicit filters, weighted, {rows[0]['threads']} threads on a CPU. Memory is the peak above the "
        "taps: on a CPU, what the process grew by beyond the peak of the rows above."
    )
    heads = ["on", "filters", "taps", "method", "order", "seconds", "GiB", "mean error"]
    return f"## Scale\n\n{text}\n\n{_table(heads, body)}"


def _model(rows: list[Row]) -> str:
    body = [
        [
            row["fit"],
            "–" if row["mean_order"] is None else f"{row['mean_order']:.2f}",
            f"{row['loss']:.5f}",
            f"{100 * row['rise']:+.3f} %",
        ]
        for row in rows
    ]
    text = (
        "The example on its held-out tokens. Plain poles are those of a Hankel reduction; heard residues are fitted in "
        "the norm of what the filter hears; default is what a build does with one order, or, in the last row, with its "
        "budget, where every filter has an order of its own."
    )
    heads = ["fit", "mean order", "loss, nats a byte", "rise"]
    return f"## The model\n\n{text}\n\n{_table(heads, body)}"


def _table(heads: Sequence[object], body: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def picture(result: dict[str, Any]) -> str:
    """An SVG of up to four plots: error by order, error by time, time by length, time by number of filters."""
    plots = []
    if "filters" in result:
        rows = [row for row in result["filters"]["rows"] if row["norm"] == "l2"]
        plots += [(_error_by_order, rows), (_error_by_time, rows)]
    if "cost" in result:
        plots += [(draw, result["cost"]["rows"]) for draw in (_by_length, _by_count)]
    with matplotlib.rc_context({"svg.hashsalt": "lhcompile", "svg.fonttype": "none", "font.size": 8.5}):
        figure = Figure(figsize=(9, 3.4 * max(1, (len(plots) + 1) // 2)), layout="constrained")
        FigureCanvasSVG(figure)
        for place, (draw, rows) in enumerate(plots):
            axes = figure.add_subplot((len(plots) + 1) // 2, 2, place + 1)
            draw(axes, rows)
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _lines(axes: Axes, rows: list[Row], x: str, y: str) -> None:
    for method, color in COLORS.items():
        mine = [row for row in rows if row["method"] == method]
        if mine:
            axes.plot([row[x] for row in mine], [row[y] for row in mine], "o-", color=color, ms=3, lw=1.3, label=method)
    axes.set_xscale("log")
    axes.set_yscale("log")


def _error_by_order(axes: Axes, rows: list[Row]) -> None:
    _lines(axes, rows, "order", "error_mean")
    bounds = [row for row in rows if row["method"] == "hankel"]
    pairs = [row["order"] for row in bounds], [row["bound_mean"] for row in bounds]
    axes.plot(*pairs, "--", color="black", lw=1, label="bound")
    axes.set_xscale("log", base=2)
    axes.set_xticks(pairs[0], [str(order) for order in pairs[0]])
    axes.set(xlabel="order", ylabel="mean relative error", title="trained filters")
    axes.legend(frameon=False, fontsize=7.5, ncols=2)


def _error_by_time(axes: Axes, rows: list[Row]) -> None:
    _lines(axes, rows, "milliseconds", "error_mean")
    axes.set(xlabel="milliseconds a filter, growing orders", ylabel="mean relative error", title="what time buys")


def _by_length(axes: Axes, rows: list[Row]) -> None:
    _lines(axes, [row for row in rows if row["what"] == "length"], "size", "seconds")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="taps", ylabel="seconds", title="one filter, order 4")


def _by_count(axes: Axes, rows: list[Row]) -> None:
    _lines(axes, [row for row in rows if row["what"] == "filters"], "size", "seconds")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="filters", ylabel="seconds", title="1024 taps, order 4")
