"""Renders a Report as one html file that needs nothing beside it: no network, no scripts, no fonts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TypeVar

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lhcompile.verify import report_plots as plots
from lhcompile.verify import report_text as text
from lhcompile.verify.model import FilterSample, Report, Spectrum

__all__ = ["render_report"]

_SPECTRA_SHOWN = 6
_TAPS_SHOWN = 2048
_T = TypeVar("_T")


@dataclass(frozen=True)
class _Tile:
    """One headline figure; `note` says in a few words what it is."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class _Panel:
    """One plot with its title and an optional remark, such as the module it shows."""

    title: str
    svg: Markup
    remark: str = ""


@dataclass(frozen=True)
class _Section:
    """Plots of one kind, a sentence on how to read them, and what to say where there are none."""

    key: str
    title: str
    how: str
    empty: str
    panels: list[_Panel] = field(default_factory=list)
    columns: int = 1


def render_report(report: Report) -> str:
    """The text of report.html."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for name in text.__all__:
        environment.filters[name] = getattr(text, name)
    template = environment.from_string(
        resources.files(__package__).joinpath("report.html").read_text("utf-8")
    )
    return template.render(
        report=report,
        verdict=_verdict(report),
        tiles=_tiles(report),
        sections=[
            _loss_section(report) if report.model.features is None else _error_section(report),
            _order_section(report),
            _taps_section(report),
            _hankel_section(report),
            _poles_section(report),
        ],
        longest=max(report.timings.values(), default=0.0),
    )


def _verdict(report: Report) -> str:
    """The result in one or two plain sentences."""
    last = report.stages[-1]
    parts = []
    if report.loss_rise is not None:
        way = "rises" if report.loss_rise > 0 else "falls"
        change = text.signed_percent(abs(report.loss_rise)).lstrip("+")
        same = abs(report.loss_rise) < 5e-6
        moved = "stays the same" if same else f"{way} by {change}"
        parts.append(f"The loss {moved} over {text.count(last.tokens)} tokens")
    if last.relative_error is not None:
        parts.append(
            f"The outputs differ by {text.number(last.relative_error)} of their size over "
            f"{text.count(last.tokens)} positions"
        )
    if last.top1_agreement is not None:
        agreed = text.percent(last.top1_agreement)
        the = "the" if parts else "The"
        parts.append(f"{the} likeliest next token is the model’s own {agreed} of the time")
    filters = _what_became_of_the_filters(report)
    return f"{' and '.join(parts)}. {filters}" if parts else filters


def _what_became_of_the_filters(report: Report) -> str:
    kept = sum(layer.kept for layer in report.layers)
    if report.order_mean is None:
        return "Every long convolution keeps its own taps, so no filter was approximated."
    given, layers = sum(layer.given for layer in report.layers), len(report.layers)
    mean = text.number(report.order_mean)
    if given + kept == layers:
        others = ", or keeps its own taps" if kept else ""
        return f"Every long convolution was a state space already{others}, so no filter was approximated."
    exceptions = f", except in {kept} of {layers} layers, which keep their taps" if kept else ""
    exact = f"; in {given} of {layers} layers it was one already and is exact" if given else ""
    return f"Each filter became a small state space of order {mean} on average{exceptions}{exact}."


def _tiles(report: Report) -> list[_Tile]:
    """The figures people judge a build by; those that do not apply are left out."""
    last = report.stages[-1]
    output, position = ("logit", "token") if last.kl_mean is not None else ("output", "position")
    modal = [layer for layer in report.layers if not layer.kept]
    tiles = [
        _Tile("Loss rise", text.signed_percent(report.loss_rise), _budget_note(report)),
        _Tile("Relative error", text.number(last.relative_error), _error_note(report)),
        _Tile("KL divergence", text.number(last.kl_mean), "nats per token, mean"),
        _Tile("Top-1 agreement", text.percent(last.top1_agreement), "same likeliest next token"),
        _Tile(f"Worst {output} difference", text.number(last.max_difference), f"largest, any {position}"),
        _Tile(
            "Mean order",
            text.number(report.order_mean),
            f"largest {max((layer.order_max for layer in modal), default=0)}",
        ),
        _Tile("State", text.size(report.state_bytes), _room_note(report)),
        _Tile(
            "Files", text.size(sum(report.files.values()) if report.files else None), "the built directory"
        ),
        _Tile(
            "Step graph", text.count(report.graph.step_nodes if report.graph else None), _nodes_note(report)
        ),
    ]
    return [tile for tile in tiles if tile.value != text.number(None)]


def _budget_note(report: Report) -> str:
    if report.budget is None:
        return "relative to the reference"
    return f"budget {text.signed_percent(report.budget.requested)}"


def _room_note(report: Report) -> str:
    if report.capacity is None:
        return "per sequence, at any length"
    return f"per sequence of at most {text.count(report.capacity)} positions"


def _error_note(report: Report) -> str:
    if report.budget is None:
        return "of the outputs, l2"
    return f"of the outputs, budget {text.number(report.budget.requested)}"


def _nodes_note(report: Report) -> str:
    if report.graph is None or report.graph.nodes_per_layer is None:
        return "ONNX nodes"
    return f"ONNX nodes, {text.number(report.graph.nodes_per_layer)} per layer"


def _loss_section(report: Report) -> _Section:
    panels = []
    reference = report.stages[0].loss
    if reference is not None and math.isfinite(reference):
        panels.append(_Panel("After each stage", Markup(plots.loss_by_stage(report.stages, report.budget))))
        panels += _search_panel(report, "text", "rise of the loss")
    return _Section(
        "loss",
        "Loss by stage",
        "Every point is the same model on the same tokens, one stage further on its way to ONNX; "
        "the closer to the dotted line of the reference, the better.",
        "No loss was measured: the model has no tokens to predict, or no calibration tokens were given.",
        panels,
        columns=len(panels),
    )


def _error_section(report: Report) -> _Section:
    panels = [_Panel("After each stage", Markup(plots.error_by_stage(report.stages, report.budget)))]
    panels += _search_panel(report, "signals", "error of the outputs")
    return _Section(
        "error",
        "Error by stage",
        "Every point is the same model on the same signals, one stage further on its way to ONNX: the l2 distance "
        "of its outputs from the reference’s, relative to their size.",
        "No error was measured.",
        panels,
        columns=len(panels),
    )


def _search_panel(report: Report, heard: str, cost: str) -> list[_Panel]:
    """What was tried, as `plots.order_search` draws it; nothing where no order was searched for."""
    if report.budget is None or not report.budget.orders:
        return []
    return [_Panel("While searching for the order", Markup(plots.order_search(report.budget, heard, cost)))]


def _order_section(report: Report) -> _Section:
    layers = report.layers if report.order_mean is not None else []
    return _Section(
        "order",
        "Order by layer",
        "The order is the number of real values a filter remembers; the lower, the smaller the state and the "
        "faster a step. A tall line means that one filter of the layer needed much more than the others.",
        "Nothing was reduced: every long convolution keeps its own taps.",
        [_Panel("Mean and largest order", Markup(plots.order_by_layer(layers)))] if layers else [],
    )


def _taps_section(report: Report) -> _Section:
    panels = [
        _Panel(
            f"{title}, error {text.number(sample.error)}",
            Markup(plots.taps_and_fit(_thin(sample), title)),
            f"{sample.module}, filter {sample.filter}",
        )
        for title, sample in _best_median_worst(report.samples)
    ]
    return _Section(
        "taps",
        "Taps against fit",
        "Grey is how the filter was trained to weigh each earlier position, blue is what replaced it. Much "
        "of the grey is noise the model does not use; a large error here need not change the loss.",
        "No filter was fitted, so there is nothing to compare.",
        panels,
        columns=3,
    )


def _hankel_section(report: Report) -> _Section:
    shown = [(i, report.spectra[i]) for i in _evenly(len(report.spectra), _SPECTRA_SHOWN)]
    floor = _spectrum_floor([spectrum for _, spectrum in shown])
    some = (
        f" {len(shown)} of {len(report.spectra)} layers are shown."
        if len(shown) < len(report.spectra)
        else ""
    )
    return _Section(
        "hankel",
        "Hankel singular values",
        "Each value says how much of the filter one more state would capture; what lies to the right of the "
        f"orange line was left out. The band covers the filters of the layer.{some}",
        "No spectrum was computed, because no filter was reduced.",
        [
            _Panel(f"Layer {i + 1}", Markup(plots.hankel(spectrum, floor, f"layer {i + 1}")), spectrum.module)
            for i, spectrum in shown
        ],
        columns=3,
    )


def _poles_section(report: Report) -> _Section:
    total = sum(len(cloud.re) for cloud in report.poles)
    shown = min(total, plots.POLES_SHOWN)
    some = f" {text.count(shown)} of {text.count(total)} poles are drawn." if shown < total else ""
    panels = []
    if total:
        panels = [
            _Panel("Poles in the unit disc", Markup(plots.unit_disc(report.poles))),
            _Panel("How long they remember", Markup(plots.memory(report.poles, report.model.context_length))),
        ]
    return _Section(
        "poles",
        "Poles",
        "A pole is one mode of memory: its distance from the centre is what is kept from step to step, its "
        f"angle how fast it swings. All lie inside the circle, so no state can grow without bound.{some}",
        "There are no poles, because no filter became a state space.",
        panels,
        columns=2,
    )


def _best_median_worst(samples: Sequence[FilterSample]) -> list[tuple[str, FilterSample]]:
    """The samples of least, middle and largest error, without repeating one."""
    ordered = sorted(samples, key=lambda sample: sample.error)
    if len(ordered) < 3:
        return list(zip(("Best fit", "Worst fit"), ordered, strict=False))
    return [
        ("Best fit", ordered[0]),
        ("Median fit", ordered[len(ordered) // 2]),
        ("Worst fit", ordered[-1]),
    ]


def _thin(sample: FilterSample) -> FilterSample:
    """The sample with at most as many taps as a plot can show."""
    step = -(-len(sample.taps) // _TAPS_SHOWN)
    return sample.model_copy(
        update={"taps": sample.taps[::step], "fit": sample.fit[::step], "stride": sample.stride * step}
    )


def _evenly(total: int, shown: int) -> list[int]:
    """At most `shown` of the indices 0 … total − 1, first and last among them."""
    return sorted({round(x) for x in np.linspace(0, total - 1, min(total, shown))})


def _spectrum_floor(spectra: Sequence[Spectrum]) -> float:
    """The decade below every relative singular value, but not below 10⁻⁷, shared by all panels."""
    least = 1e-2
    for spectrum in spectra:
        values = [value for value in spectrum.hankel_singular_values if value > 0]
        if values:
            least = min(least, min(values) / max(values))
    return float(10.0 ** np.floor(np.log10(max(least, 1e-7))))
