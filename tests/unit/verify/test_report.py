"""The report is one html file that needs nothing beside it, for every kind of build."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from pydantic import ValidationError

from lhcompile.verify import report_text as text
from lhcompile.verify.model import (
    BudgetReport,
    FilterSample,
    GraphReport,
    LayerReport,
    ModelReport,
    OrderTried,
    PoleCloud,
    Report,
    Spectrum,
    StageFidelity,
)
from lhcompile.verify.report import render_report

SECTIONS = ["loss", "order", "taps", "hankel", "poles", "stages", "layers", "timings", "files", "command"]
PLOTS = [
    "Loss by stage",
    "Orders tried",
    "Order by layer",
    "Taps and fit Best fit",
    "Taps and fit Median fit",
]
PLOTS += ["Taps and fit Worst fit", "Hankel singular values layer 1", "Poles in the unit disc"]
NAN = float("nan")
VOID = {"meta", "br", "hr", "img", "input", "link"}


class _Page(HTMLParser):
    """Checks that elements close in order, and collects ids, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self._keep(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._keep(attrs)

    def _keep(self, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _stages(loss: float | None, rise: float, kl: float | None) -> list[StageFidelity]:
    names = ["reference", "captured", "distilled", "streamed", "onnx"]
    changed = [name not in ("reference", "captured") for name in names]
    return [
        StageFidelity(
            name=name,
            tokens=32768,
            loss=None if loss is None else loss * (1 + rise * different),
            kl_mean=None if kl is None else kl * different,
            top1_agreement=None if kl is None else 1 - 0.0088 * different,
            max_difference=2.3125 * different,
        )
        for name, different in zip(names, changed, strict=True)
    ]


def _exact(count: int = 2, **changes: Any) -> Report:
    """A build that keeps all taps: nothing was distilled."""
    fields: dict[str, Any] = {
        "model": ModelReport(
            family="toy <hyena>", source="model.pt", parameters=3412992, vocab_size=256, context_length=128
        ),
        "target": "cpu",
        "command": "lhcompile build model.pt -o out/ --exact",
        "stages": _stages(1.08, 0.0, 0.0),
        "layers": [
            LayerReport(
                module=f"layers.{i}.filter",
                method="taps",
                filters=8,
                channels=8,
                order_max=0,
                order_mean=0,
                state_bytes=8 * 127 * 4,
            )
            for i in range(count)
        ],
        "state_bytes": 8 * 127 * 4 * count,
    }
    return Report(**fields | changes)


def _distilled(count: int = 2, modes: int = 16, length: int = 128, **changes: Any) -> Report:
    """A build with everything a report can show."""
    modulus = np.linspace(0.5, 0.999, modes)
    taps = 0.9 ** np.arange(length)
    modules = [f"layers.{i}.filter" for i in range(count)]
    fields: dict[str, Any] = {
        "command": "lhcompile build model.pt -o out/",
        "versions": {"lhcompile": "0.1.0", "torch": "2.13.0"},
        "stages": _stages(1.08, 6.2e-4, 8.2e-4),
        "layers": [
            LayerReport(
                module=module,
                method="hankel",
                filters=8,
                channels=8,
                order_max=8,
                order_mean=5.5,
                tap_error=0.44,
                hankel_bound=0.4,
                state_bytes=256,
            )
            for module in modules
        ],
        "samples": [
            FilterSample(
                module=module, filter=k, taps=taps.tolist(), fit=(taps * 0.9).tolist(), error=0.1 * k
            )
            for module in modules
            for k in range(1, 4)
        ],
        "spectra": [
            Spectrum(module=module, hankel_singular_values=(0.5 ** np.arange(24)).tolist(), order=8)
            for module in modules
        ],
        "poles": [
            PoleCloud(module=module, re=(modulus * 0.6).tolist(), im=(modulus * 0.8).tolist())
            for module in modules
        ],
        "budget": BudgetReport(
            requested=1e-3,
            measured=6.2e-4,
            orders=[
                OrderTried(order=4, loss=1.085, rise=0.0046, expected=0.0051),
                OrderTried(order=8, loss=1.0807, rise=6.2e-4, expected=8e-4),
            ],
        ),
        "graph": GraphReport(step_nodes=212, nodes_per_layer=38.4),
        "timings": {"load": 0.2, "distill": 5.1},
        "files": {"step.onnx": 13651968, "prefill.onnx": 13700000},
    }
    return _exact(count, **fields | changes)


def _feature() -> Report:
    model = ModelReport(family="s4", source="model.pt", parameters=10, context_length=128)
    return _distilled(model=model, stages=_stages(None, 0, None), budget=None)


@pytest.mark.parametrize(
    "report",
    [
        _distilled(),
        _exact(),
        _feature(),
        _distilled(count=1, samples=[]),
        _exact(count=0, quantize="int8"),
    ],
    ids=["distilled", "exact", "features", "no-samples", "no-layers"],
)
def test_a_report_is_one_self_contained_page(report: Report) -> None:
    html = render_report(report)
    page = _Page(html)
    assert [name for name in SECTIONS if name not in page.ids] == []
    assert len(page.ids) == len(set(page.ids))
    assert not re.search(r"https?:|//\w|@import|<script|<link|<img|@font-face", html)
    targets = [value for name, value in page.attributes if name in ("href", "src")]
    targets += re.findall(r"url\(([^)]*)\)", html)
    assert all(target.startswith("#") and target[1:] in page.ids for target in targets)
    assert "None" not in page.text
    assert "nan" not in page.text


def test_every_plot_is_there_and_is_well_formed_svg() -> None:
    html = render_report(_distilled())
    drawings = {
        svg.split('aria-label="')[1].split('"')[0]: svg for svg in re.findall(r"<svg.*?</svg>", html, re.S)
    }
    assert [name for name in PLOTS if name not in drawings] == []
    for svg in drawings.values():
        ElementTree.fromstring(svg)
        assert "var(--accent)" in svg
        assert "#0102" not in svg


def test_the_headline_figures_are_written_out() -> None:
    page = _Page(render_report(_distilled()))
    for figure in ["+0.062\u00a0%", "8.20×10⁻⁴", "99.12\u00a0%", "2.31", "5.50", "212", "26.1\u00a0MiB"]:
        assert figure in page.text
    assert "budget +0.100\u00a0%" in page.text
    assert "The loss rises by 0.062\u00a0% over 32\u202f768 tokens" in page.text
    assert "toy <hyena>, compiled for cpu" in page.text


def test_an_exact_build_says_that_nothing_was_fitted() -> None:
    html = render_report(_exact())
    assert "Every long convolution keeps its own taps, so no filter was approximated." in html
    assert "No filter was fitted" in html
    assert "There are no poles" in html
    assert "The loss stays the same" in html
    assert "Mean order</dt>" not in html


def test_a_layer_that_kept_its_taps_is_mentioned_and_not_averaged() -> None:
    layers = [_distilled().layers[0], _exact().layers[0]]
    report = _distilled(layers=layers)
    assert report.order_mean == 5.5
    assert "of order 5.50 on average, except in 1 of 2 layers" in render_report(report)


def test_a_feature_model_is_judged_by_its_outputs() -> None:
    page = _Page(render_report(_feature()))
    assert "Worst output difference" in page.text
    assert "KL divergence" not in page.text
    assert "No loss was measured" in page.text


def test_many_layers_and_poles_stay_a_small_page() -> None:
    html = render_report(_distilled(count=100, modes=4000, length=5000))
    assert len(html) < 2_000_000
    assert "6 of 100 layers are shown" in html
    assert "3\u202f000 of 400\u202f000 poles are drawn" in html
    assert "<details>" in html


def test_figures_that_are_not_finite_are_shown_and_kept() -> None:
    stages = _stages(1.08, float("nan"), float("inf"))
    report = _distilled(stages=[stages[0], *stages[2:]])
    assert "not finite" in render_report(report)
    again = Report.model_validate_json(report.model_dump_json())
    assert np.isnan(again.stages[-1].loss)  # type: ignore[arg-type]
    assert again.stages[-1].kl_mean == float("inf")


@pytest.mark.parametrize(
    "changes",
    [
        {"poles": [PoleCloud(module="a", re=[0.0], im=[0.0])]},
        {"poles": [PoleCloud(module="a", re=[], im=[])]},
        {"spectra": [Spectrum(module="a", hankel_singular_values=[], order=0)]},
        {
            "spectra": [
                Spectrum(module="a", hankel_singular_values=[0.0, 0.0], order=2, low=[0, 0], high=[0, 0])
            ]
        },
        {"spectra": [Spectrum(module="a", hankel_singular_values=[1.0, NAN, 0.1], order=900)]},
        {"samples": [FilterSample(module="<b>&", filter=0, taps=[1.0], fit=[1.0], error=0)]},
        {"samples": [FilterSample(module="a", filter=0, taps=[NAN] * 5, fit=[NAN] * 5, error=NAN)] * 4},
        {"stages": [StageFidelity(name="reference", tokens=1, loss=0.0)]},
        {"stages": _stages(NAN, 0, 0)},
        {"budget": BudgetReport(requested=0, orders=[OrderTried(order=8, loss=NAN, rise=NAN, expected=NAN)])},
        {
            "budget": BudgetReport(
                requested=0, orders=[OrderTried(order=i, loss=1, rise=0, expected=0) for i in range(1, 20)]
            )
        },
        {"model": ModelReport(family="a", source="b", parameters=0, context_length=1)},
    ],
)
def test_odd_figures_still_render(changes: dict[str, Any]) -> None:
    _Page(render_report(_distilled(**changes)))


def test_a_continuous_signal_is_judged_by_its_error() -> None:
    stages = [
        StageFidelity(name=name, tokens=2048, relative_error=error, max_difference=5 * error)
        for name, error in [("reference", 0.0), ("captured", 0.0), ("distilled", 0.012), ("onnx", 0.012)]
    ]
    model = ModelReport(family="s4d", source="s4.pt", parameters=10, features=3, context_length=64)
    budget = BudgetReport(
        requested=0.02, measured=0.012, orders=[OrderTried(order=8, loss=1.4e-4, rise=0.012, expected=0.014)]
    )
    changes = {"stages": stages, "model": model, "calibration": "white noise of size 1, seed 0", "notes": ["a note"]}
    page = _Page(render_report(_distilled(budget=budget, **changes)))
    for text_ in ("The outputs differ by 0.0120 of their size", "Relative error", "of the outputs, budget 0.0200",
                  "Error by stage", "white noise of size 1, seed 0", "a note", "Positions"):  # fmt: skip
        assert text_ in page.text, text_
    for text_ in ("Loss", "nats", "KL", "agreement", "tokens"):
        assert text_ not in page.text, text_
    _Page(render_report(_distilled(budget=None, **changes)))


def test_report_json_reads_back_as_it_was_written() -> None:
    report = _distilled()
    assert Report.model_validate_json(report.model_dump_json()) == report


def test_the_same_report_renders_to_the_same_page() -> None:
    assert render_report(_distilled()) == render_report(_distilled())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: _exact(stages=[]), "a report needs at least its reference stage"),
        (lambda: PoleCloud(module="a", re=[0.1], im=[]), "a: 1 real parts and 0 imaginary parts"),
        (
            lambda: FilterSample(module="a", filter=0, taps=[1.0, 2.0], fit=[1.0], error=0),
            "a: 2 taps but a fit of 1",
        ),
        (lambda: _exact(surprise=1), "Extra inputs are not permitted"),
    ],
)
def test_a_report_that_contradicts_itself_is_refused(build: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        build()


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (text.number(None), "–"),
        (text.number(0), "0"),
        (text.number(-0.01234), "−0.0123"),
        (text.number(1234.5), "1234"),
        (text.number(1.5e-7), "1.50×10⁻⁷"),
        (text.number(float("inf")), "not finite"),
        (text.signed_percent(-0.0123), "−1.23\u00a0%"),
        (text.signed_percent(1e-9), "0\u00a0%"),
        (text.percent(0.99912), "99.91\u00a0%"),
        (text.size(0), "0\u00a0B"),
        (text.size(5 << 30), "5.00\u00a0GiB"),
        (text.count(6896640), "6\u202f896\u202f640"),
        (text.seconds(125), "2\u00a0min 5\u00a0s"),
        (text.power_of_ten(1e-3), "10⁻³"),
    ],
)
def test_figures_are_written_short(written: str, expected: str) -> None:
    assert written == expected
