"""The parts of a report that are read off a distilled model: layers, sample filters, spectra, poles."""

from __future__ import annotations

import math

import torch

from lhcompile.artifacts import Distilled, DistilledLayer, State
from lhcompile.verify.model import FilterSample, HealingReport, LayerReport, OrderTried, PoleCloud, Spectrum

__all__ = ["healing_of", "layers_of", "orders_tried", "poles_of", "samples_of", "spectra_of", "state_bytes"]

SAMPLE_POINTS = 1024
POLES_SHOWN = 4096


def state_bytes(states: tuple[State, ...]) -> int:
    """Bytes of all states of one sequence; those that grow with it as large as they can get."""
    return sum(state.bytes for state in states)


def layers_of(distilled: Distilled, states: tuple[State, ...]) -> list[LayerReport]:
    """One row per long convolution or modal system; states are those of the streamed program, in the same order."""
    long = [state for state in states if state.kind in ("modal", "long_conv")]
    return [_layer(layer, state) for layer, state in zip(distilled.layers, long, strict=True)]


def _layer(layer: DistilledLayer, state: State) -> LayerReport:
    orders = layer.orders.double() if layer.orders is not None else torch.zeros(1)
    head = 0 if layer.head is None else layer.head.shape[1]
    worst = None if layer.error is None else int(layer.error.argmax())
    return LayerReport(
        module=layer.module,
        method=layer.method if head == 0 else f"{layer.method}, first {head + 1} taps exact",
        filters=layer.taps.shape[0],
        channels=layer.channels,
        order_max=int(orders.max()),
        order_mean=float(orders.mean()),
        tap_error=None if worst is None else float(layer.error[worst]),  # type: ignore[index]
        hankel_bound=None if worst is None or layer.bound is None else float(layer.bound[worst]),
        heard_error=None if layer.heard_error is None else float(layer.heard_error.max()),
        state_bytes=state_bytes((state,)) + 4 * head * layer.channels,
    )


def samples_of(distilled: Distilled) -> list[FilterSample]:
    """The best, median and worst fitted filter of each layer."""
    samples = []
    for layer in distilled.layers:
        if layer.system is None or layer.error is None or not layer.taps.numel():
            continue
        ranked = layer.error.argsort()
        stride = math.ceil(layer.taps.shape[1] / SAMPLE_POINTS)
        fit = layer.fitted()
        for index in dict.fromkeys(int(ranked[i]) for i in (0, len(ranked) // 2, -1)):
            samples.append(
                FilterSample(
                    module=layer.module,
                    filter=index,
                    taps=layer.taps[index, ::stride].tolist(),
                    fit=fit[index, ::stride].tolist(),
                    error=float(layer.error[index]),
                    stride=stride,
                )
            )
    return samples


def spectra_of(distilled: Distilled) -> list[Spectrum]:
    """Hankel singular values of each layer: median over filters, and the middle 80 % about it."""
    spectra = []
    for layer in distilled.layers:
        if layer.hankel_singular_values is None or layer.orders is None:
            continue
        low, middle, high = torch.quantile(
            layer.hankel_singular_values, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=0
        )
        spectra.append(
            Spectrum(
                module=layer.module,
                hankel_singular_values=middle.tolist(),
                order=int(layer.orders.max()),
                low=low.tolist(),
                high=high.tolist(),
            )
        )
    return spectra


def poles_of(distilled: Distilled) -> list[PoleCloud]:
    """The poles of each layer, thinned evenly to at most `POLES_SHOWN`."""
    clouds = []
    for layer in distilled.layers:
        if layer.system is not None:
            poles = layer.system.poles[layer.system.residues != 0]
            poles = poles[:: math.ceil(len(poles) / POLES_SHOWN) or 1]
            clouds.append(PoleCloud(module=layer.module, re=poles.real.tolist(), im=poles.imag.tolist()))
    return clouds


def healing_of(distilled: Distilled) -> HealingReport | None:
    if distilled.healed is None:
        return None
    before, after = distilled.healed
    return HealingReport(before=before, after=after, kept=after < before)


def orders_tried(distilled: Distilled) -> list[OrderTried]:
    return [OrderTried(order=t.order, loss=t.loss, rise=t.rise, expected=t.expected) for t in distilled.trials]
