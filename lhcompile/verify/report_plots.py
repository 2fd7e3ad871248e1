"""The plots of report.html: each function returns inline SVG that takes its colours from the page.

matplotlib draws with a few marker colours, which are then replaced by CSS variables; so one drawing is right
in light and in dark mode. Text stays text. The SVG carries no addresses, no style sheet and no metadata, and
its ids are prefixed, so that many of them can stand in one page.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from lhcompile.verify.model import BudgetReport, FilterSample, LayerReport, PoleCloud, Spectrum, StageFidelity
from lhcompile.verify.report_text import number, power_of_ten, signed_percent

__all__ = [
    "POLES_SHOWN",
    "error_by_stage",
    "hankel",
    "loss_by_stage",
    "memory",
    "order_by_layer",
    "order_search",
    "taps_and_fit",
    "unit_disc",
]

POLES_SHOWN = 3000
THIRD, HALF, FULL = (3.6, 2.35), (5.5, 3.2), (11.2, 3.2)  # inches; all are shown at the same scale

INK, MUTED, GRID, ACCENT, WARM, SOFT = (f"#01020{digit}" for digit in range(1, 7))
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", ACCENT: "accent", WARM: "warm", SOFT: "soft"}
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lhcompile",
    "font.size": 8.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


class _Canvas:
    """Holds the axes while a plot is drawn, and its SVG afterwards."""

    axes: Axes
    svg: str = ""


@contextmanager
def _canvas(size: tuple[float, float], label: str) -> Iterator[_Canvas]:
    """One figure of `size` inches; `label` is what a screen reader says."""
    with matplotlib.rc_context(_RC):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        canvas = _Canvas()
        canvas.axes = figure.add_subplot()
        yield canvas
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    canvas.svg = _inline(buffer.getvalue(), label)


def _inline(document: str, label: str) -> str:
    """An SVG document as an element of an html page."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    head, body = svg.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    if view is None:
        raise ValueError("matplotlib wrote an SVG without a viewBox")
    prefix = "p" + re.sub(r"\W+", "-", label.lower()) + "-"
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="', f'id="{prefix}', body)
    body = re.sub(r'href="#', f'href="#{prefix}', body)
    body = re.sub(r"url\(#", f"url(#{prefix}", body)
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    body = re.sub(r"\n\s*", "\n", body)
    spoken = label.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return f'<svg {view.group()} role="img" aria-label="{spoken}">{body}'


def _log_axis(axis: matplotlib.axis.Axis, *, powers: bool) -> None:
    """Decade ticks with plain labels: 1, 10, 100 or, with `powers`, 10⁻³."""
    axis.set_major_locator(LogLocator(base=10, numticks=7))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: power_of_ten(value) if powers else f"{value:g}"))


def _finite(values: Sequence[float | None]) -> np.ndarray:
    """float64 [count] with gaps (nan) where a value is missing or not finite."""
    array = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    array[~np.isfinite(array)] = np.nan
    return array


def loss_by_stage(stages: Sequence[StageFidelity], budget: BudgetReport | None) -> str:
    """Loss of the model after each stage, each labelled with its rise over the reference."""
    losses = _finite([stage.loss for stage in stages])
    reference = losses[0]
    with _canvas(HALF if budget and budget.orders else FULL, "Loss by stage") as canvas:
        axes, at = canvas.axes, np.arange(len(stages))
        axes.axhline(reference, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.plot(at, losses, color=ACCENT, linewidth=1.6, marker="o", markersize=5.5)
        shown = [loss for loss in losses if np.isfinite(loss)]
        if budget is not None:
            limit = reference * (1 + budget.requested)
            shown.append(limit)
            axes.axhline(limit, color=WARM, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"budget {signed_percent(budget.requested)}",
                (1, limit),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 4),
                textcoords="offset points",
                ha="right",
                color=WARM,
            )
        for x, loss in list(zip(at.tolist(), losses.tolist(), strict=True))[1:]:
            if np.isfinite(loss):
                text = signed_percent((loss - reference) / reference) if reference else f"{loss:g}"
                climbs = x + 1 < len(losses) and losses[x + 1] > loss
                axes.annotate(
                    text,
                    (x, loss),
                    xytext=(0, -14 if climbs else 8),
                    textcoords="offset points",
                    ha="center",
                    color=INK,
                )
        low, high = min(shown), max(shown)
        room = max(high - low, abs(reference) * 5e-4, 1e-6)
        axes.set_ylim(low - 0.25 * room, high + 0.35 * room)
        axes.set_xlim(-0.4, len(stages) - 0.6)
        axes.set_xticks(at, [stage.name for stage in stages], color=INK)
        axes.ticklabel_format(axis="y", useOffset=False)
        axes.grid(axis="x", visible=False)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_ylabel("loss, nats per token")
    return canvas.svg


def error_by_stage(stages: Sequence[StageFidelity], budget: BudgetReport | None) -> str:
    """Relative error of a continuous model's outputs after each stage; no error at all lies on the floor."""
    errors = _finite([stage.relative_error for stage in stages[1:]])
    floor = min([1e-8, *(0.1 * errors[errors > 0])])
    with _canvas(HALF if budget and budget.orders else FULL, "Error by stage") as canvas:
        axes, at = canvas.axes, np.arange(len(errors))
        axes.plot(at, np.maximum(errors, floor), color=ACCENT, linewidth=1.6, marker="o", markersize=5.5)
        if budget is not None:
            axes.axhline(budget.requested, color=WARM, linewidth=1, linestyle=(0, (4, 3)), label="budget")
            axes.legend(loc="upper left", frameon=False)
        for x, error in zip(at.tolist(), errors.tolist(), strict=True):
            if np.isfinite(error):
                place = (x, max(error, floor))
                axes.annotate(number(error), place, (0, 8), textcoords="offset points", ha="center", color=INK)
        axes.set_yscale("log")
        axes.margins(y=0.2)
        axes.set_xlim(-0.4, len(errors) - 0.6)
        axes.set_xticks(at, [stage.name for stage in stages[1:]], color=INK)
        axes.grid(axis="x", visible=False)
        _log_axis(axes.yaxis, powers=True)
        axes.set_ylabel("relative error")
    return canvas.svg


def order_search(budget: BudgetReport, heard: str, cost: str) -> str:
    """What each mean order that was tried costs, with the budget.

    heard: what models of this kind are measured on, text or signals; cost: what the budget is of
    """
    tried = sorted(budget.orders, key=lambda entry: entry.order)
    orders = [entry.order for entry in tried]
    with _canvas(HALF, "Orders tried") as canvas:
        axes = canvas.axes
        axes.axhline(0, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        axes.axhline(100 * budget.requested, color=WARM, linewidth=1, linestyle=(0, (4, 3)))
        lines = (
            ([entry.expected for entry in tried], ACCENT, "o", f"on other {heard}, at most"),
            ([entry.rise for entry in tried], MUTED, "s", f"measured on {heard} of the search"),
        )
        straight, largest = max(200 * budget.requested, 1e-3), 0.0
        for rises, color, marker, label in lines:
            found = _finite([100 * rise for rise in rises])
            axes.plot(orders, found, color=color, linewidth=1.6, marker=marker, markersize=4, label=label)
            largest = max(largest, float(np.nanmax(np.abs(found), initial=0)))
        axes.legend(loc="upper right", frameon=False)
        if largest > straight:
            axes.set_yscale("symlog", linthresh=straight)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(MaxNLocator(7))
        axes.grid(axis="x", visible=False)
        axes.margins(x=0.1, y=0.16)
        axes.set_xlabel("mean order of the filters")
        axes.set_ylabel(f"{cost}, %")
    return canvas.svg


def order_by_layer(layers: Sequence[LayerReport]) -> str:
    """Mean and largest order of each layer, numbered as in the table."""
    number = np.arange(1, len(layers) + 1)
    mean = _finite([layer.order_mean for layer in layers])
    largest = _finite([layer.order_max for layer in layers])
    with _canvas(FULL, "Order by layer") as canvas:
        axes = canvas.axes
        size = 5.5 if len(layers) <= 40 else 3
        axes.vlines(number, mean, largest, color=SOFT, linewidth=size * 0.6)
        axes.plot(number, largest, "o", color=WARM, markersize=size, fillstyle="none", label="largest")
        axes.plot(number, mean, "o", color=ACCENT, markersize=size, label="mean")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
        axes.set_xlim(0.3, len(layers) + 0.7)
        axes.set_ylim(0, max(float(np.nanmax(largest, initial=1)) * 1.12, 2))
        axes.xaxis.set_major_locator(MaxNLocator(20, integer=True, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("layer, numbered as in the table below")
        axes.set_ylabel("order")
    return canvas.svg


def taps_and_fit(sample: FilterSample, label: str) -> str:
    """A filter's taps and their fit over the distance into the past."""
    distance = np.arange(len(sample.taps)) * sample.stride + 1
    with _canvas(THIRD, f"Taps and fit {label}") as canvas:
        axes = canvas.axes
        axes.plot(distance, _finite(sample.taps), color=MUTED, linewidth=0.8, alpha=0.75, label="taps")
        axes.plot(distance, _finite(sample.fit), color=ACCENT, linewidth=1.6, label="fit")
        axes.set_xscale("log")
        _log_axis(axes.xaxis, powers=False)
        axes.set_xlim(1, max(distance[-1], 2))
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.legend(loc="best", frameon=False, handlelength=1.2, borderaxespad=0.2)
        axes.set_xlabel("place in the past, newest 1")
        axes.set_ylabel("weight")
    return canvas.svg


def hankel(spectrum: Spectrum, floor: float, label: str) -> str:
    """Singular values relative to the largest, down to `floor`, with the chosen order marked."""
    values = _finite(spectrum.hankel_singular_values)
    scale = np.nanmax(values, initial=0) or 1.0
    index = np.arange(1, len(values) + 1)
    with _canvas(THIRD, f"Hankel singular values {label}") as canvas:
        axes = canvas.axes
        if len(spectrum.low) == len(spectrum.high) == len(values):
            low, high = _finite(spectrum.low) / scale, _finite(spectrum.high) / scale
            axes.fill_between(index, np.maximum(low, floor), high, color=SOFT, linewidth=0)
        axes.plot(index, np.where(values > 0, values / scale, np.nan), color=ACCENT, linewidth=1.6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlim(1, max(len(values), 2))
        axes.set_ylim(floor, max(2.0, 2 * float(np.nanmax(_finite(spectrum.high) / scale, initial=1))))
        _log_axis(axes.xaxis, powers=False)
        _log_axis(axes.yaxis, powers=True)
        if 0 < spectrum.order <= len(values):
            right = spectrum.order > len(values) ** 0.6
            axes.axvline(spectrum.order, color=WARM, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                f"order {spectrum.order}",
                (spectrum.order, 0.05),
                xycoords=("data", "axes fraction"),
                xytext=(-5 if right else 5, 0),
                textcoords="offset points",
                ha="right" if right else "left",
                color=WARM,
            )
        axes.set_xlabel("number")
        axes.set_ylabel("relative to the first")
    return canvas.svg


def _subsample(clouds: Sequence[PoleCloud], count: int) -> np.ndarray:
    """At most `count` poles in use, complex128, the same ones each time."""
    every = np.array(list(itertools.chain.from_iterable(cloud.re for cloud in clouds)), dtype=np.complex128)
    every += 1j * np.array(list(itertools.chain.from_iterable(cloud.im for cloud in clouds)), dtype=np.float64)
    every = every[np.isfinite(every) & (every != 0)]
    if len(every) <= count:
        return every
    return np.random.default_rng(0).choice(every, count, replace=False)


def unit_disc(clouds: Sequence[PoleCloud]) -> str:
    """Poles in the complex plane, with the circle they must stay inside."""
    poles = _subsample(clouds, POLES_SHOWN)
    with _canvas((5.5, 4.2), "Poles in the unit disc") as canvas:
        axes = canvas.axes
        angle = np.linspace(0, 2 * np.pi, 241)
        axes.fill(np.cos(angle), np.sin(angle), color=SOFT, alpha=0.35, linewidth=0)
        axes.plot(np.cos(angle), np.sin(angle), color=MUTED, linewidth=0.8)
        axes.plot(poles.real, poles.imag, "o", color=ACCENT, alpha=0.4, markersize=2.6, markeredgewidth=0)
        axes.set_aspect("equal")
        axes.set_xlim(-1.08, 1.08)
        axes.set_ylim(-1.08, 1.08)
        axes.set_xticks([-1, -0.5, 0, 0.5, 1])
        axes.set_yticks([-1, -0.5, 0, 0.5, 1])
        axes.set_xlabel("real part")
        axes.set_ylabel("imaginary part")
    return canvas.svg


def memory(clouds: Sequence[PoleCloud], context_length: int) -> str:
    """Histogram of how many positions a mode takes to fade to 1/e: −1 / log |λ|."""
    modulus = np.clip(np.abs(_subsample(clouds, 1_000_000)), 1e-300, 1 - 1e-12)
    fading = np.maximum(-1 / np.log(modulus), 0.1)
    top = max(10.0 * context_length, 100.0)
    with _canvas((5.5, 4.2), "How long modes remember") as canvas:
        axes = canvas.axes
        bins = np.geomspace(0.1, top, 41).tolist()
        share = np.full(len(fading), 100 / max(len(fading), 1))
        axes.hist(np.minimum(fading, top), bins=bins, weights=share, color=ACCENT, alpha=0.85, rwidth=0.9)
        axes.set_xscale("log")
        _log_axis(axes.xaxis, powers=False)
        axes.set_xlim(0.1, top)
        axes.margins(y=0.12)
        axes.axvline(context_length, color=WARM, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"context {context_length}",
            (context_length, 0.96),
            xycoords=("data", "axes fraction"),
            xytext=(-5, 0),
            textcoords="offset points",
            ha="right",
            color=WARM,
        )
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.grid(axis="x", visible=False)
        axes.set_xlabel("positions until 1/e is left")
        axes.set_ylabel("share of the poles, %")
    return canvas.svg
