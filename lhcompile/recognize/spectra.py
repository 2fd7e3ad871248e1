"""Transforms of signals and products with constant spectra, whatever the spelling.

A rule returns the new value, or None when the operator does not touch a spectrum and is an ordinary one:

    rfft(u, n)       Spectrum(n)
    · constant       Spectrum(gain · constant)
    irfft            Window(0, n) with taps = irfft(gain)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lhcompile.recognize.signals import Rule, Signals, bind, rank_of
from lhcompile.recognize.values import (
    FirTaps,
    LongTaps,
    Parts,
    Plain,
    Spectrum,
    Taps,
    Value,
    Window,
    as_spectrum_gain,
    refuse,
    tensor_sizes,
)
from lhcompile.sizes import Point, Size

__all__ = ["RULES"]

aten = torch.ops.aten


# ---- transforms ----------------------------------------------------------------------------------------------------


def _forward(onesided: bool) -> Rule:
    def rule(signals: Signals, node: Node) -> Value | None:
        args = bind(node)
        signal, value = signals.signal(args["self"]), signals.values[args["self"]]
        if isinstance(value, Plain) and value.extra:
            longer = f"{abs(value.extra)} positions {'longer' if value.extra > 0 else 'shorter'}"
            raise refuse(node, f"transforms a signal {longer} than the sequence")
        if signal is None or args["dim"] % rank_of(args["self"]) != signal.axis:
            return None
        if signal.taps is not None or signal.start != 0 or signal.stop < signals.context:
            signal = signals.whole(args["self"], node)
        size = _sizer(signals, args["n"], args["self"].meta["sizes"][signal.axis])
        length = size(signals.context)
        if length < signals.context:
            raise refuse(node, f"a transform of length {length} drops part of the sequence of {signals.context}")
        norm = args["norm"] or "backward"
        scale = {"backward": lambda n: 1.0, "ortho": lambda n: n**-0.5, "forward": lambda n: 1.0 / n}[norm]
        return Spectrum(signal.source, signal.axis, size, onesided, lambda t: scale(size(t)))

    return rule


def _sizer(signals: Signals, n: Any, axis: Size) -> Callable[[int], int]:
    """A transform's length as a function of the sequence's; without n it is the length of the axis."""
    if n is None:
        return lambda time: axis.at(Point(1, time))
    return lambda time: int(signals.number(n, time))


def _inverse(onesided: bool) -> Rule:
    def rule(signals: Signals, node: Node) -> Value | None:
        args = bind(node)
        spectrum = signals.values[args["self"]]
        if not isinstance(spectrum, Spectrum) or args["dim"] % rank_of(args["self"]) != spectrum.axis:
            return None
        if spectrum.onesided != onesided:
            raise refuse(node, "inverts a one-sided spectrum as a full one, or the other way round")
        bins = spectrum.size(signals.context)
        size = signals.number(args["n"])
        size = (2 * (bins // 2) if onesided else bins) if size is None else size
        if size != bins:
            raise refuse(node, f"has length {size} where the forward transform has {bins}")
        norm = args["norm"] or "backward"
        undo = {"backward": lambda n: 1.0, "ortho": lambda n: n**0.5, "forward": lambda n: float(n)}[norm]
        taps = LongTaps(_taps_of(spectrum, undo, onesided), spectrum.size, complex=not onesided)
        return Window(spectrum.source, spectrum.axis, 0, size, taps, node)

    return rule


def _taps_of(spectrum: Spectrum, undo: Callable[[int], float], onesided: bool) -> Taps:
    """gain → circular taps in double precision; `undo` is the inverse's norm relative to 1/n."""
    axis, rank = spectrum.axis, len(tensor_sizes(spectrum.source))

    def taps(time: int) -> Tensor:
        n = spectrum.size(time)
        bins = n // 2 + 1 if onesided else n
        gain = torch.ones(1, dtype=torch.float64) if spectrum.gain is None else as_spectrum_gain(spectrum.gain(time))
        gain = gain.reshape((1,) * (rank - gain.ndim) + gain.shape)
        gain = gain * spectrum.scale(time) * undo(n)
        shape = list(gain.shape)
        shape[axis] = bins
        gain = gain.expand(shape).to(torch.complex128)
        return torch.fft.irfft(gain, n=n, dim=axis) if onesided else torch.fft.ifft(gain, dim=axis)

    return taps


def _real(signals: Signals, node: Node) -> Value | None:
    value = signals.values[node.args[0]]  # type: ignore[index]
    if isinstance(value, Window) and isinstance(value.taps, LongTaps) and value.taps.complex:
        return replace(value, taps=replace(value.taps, complex=False))
    return None


def _view_as_real(signals: Signals, node: Node) -> Value | None:
    value = signals.values[node.args[0]]  # type: ignore[index]
    return Parts(value) if isinstance(value, Window) else None


def _select(signals: Signals, node: Node) -> Value | None:
    args = bind(node)
    value = signals.values[args["self"]]
    if isinstance(value, Parts) and args["index"] == 0 and args["dim"] in (-1, rank_of(args["self"]) - 1):
        return _real_part(value.window)
    return None


def _real_part(window: Window) -> Window:
    assert isinstance(window.taps, LongTaps)
    return replace(window, taps=replace(window.taps, complex=False))


# ---- products of spectra -------------------------------------------------------------------------------------------


def _product(divide: bool) -> Rule:
    def rule(signals: Signals, node: Node) -> Value | None:
        left, right = node.args[0], node.args[1]
        spectra = [arg for arg in (left, right) if isinstance(arg, Node) and _is_spectrum(signals, arg)]
        if not spectra:
            return None
        if len(spectra) == 2 or (divide and not _is_spectrum(signals, left)):
            raise refuse(node, "its filter depends on the tokens")
        other = right if spectra[0] is left else left
        if not signals.is_constant(other):
            raise refuse(node, "its filter depends on the tokens")
        value = signals.values[spectra[0]]
        assert isinstance(value, Spectrum)

        def factor(time: int) -> Tensor:
            constant = signals.number(other, time)
            constant = as_spectrum_gain(constant if isinstance(constant, Tensor) else torch.tensor(constant))
            return 1.0 / constant if divide else constant

        return _amplified(signals, value, factor)

    return rule


def _is_spectrum(signals: Signals, arg: object) -> bool:
    return isinstance(arg, Node) and not signals.is_constant(arg) and isinstance(signals.values[arg], Spectrum)


def _amplified(signals: Signals, value: Spectrum, factor: Taps) -> Spectrum:
    """The spectrum times a factor; a factor of higher rank gives the source leading axes."""
    before = value.gain
    gain: Taps = factor if before is None else (lambda time: before(time) * factor(time))
    missing = factor(signals.context).ndim - len(tensor_sizes(value.source))
    source, axis = value.source, value.axis
    if missing > 0:
        source = signals.emit.reshape(source, (Size(0, 0, 1),) * missing + tensor_sizes(source))
        axis += missing
    return replace(value, source=source, axis=axis, gain=gain)


def _einsum(signals: Signals, node: Node) -> Value | None:
    equation, operands = str(node.args[0]), list[Any](node.args[1])  # type: ignore[arg-type]
    spectra = [i for i, arg in enumerate(operands) if _is_spectrum(signals, arg)]
    if not spectra:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    mine = inputs.split(",")[spectra[0]]
    letters = "".join(inputs.split(",")[: spectra[0]] + inputs.split(",")[spectra[0] + 1 :])
    distinct = all(len(set(part)) == len(part) for part in (mine, letters, output))
    if len(operands) != 2 or not distinct or "." in equation or set(output) != set(mine) | set(letters):
        raise refuse(node, f"combines spectra as {equation!r}, which is not a product bin by bin")
    other = operands[1 - spectra[0]]
    if not signals.is_constant(other):
        raise refuse(node, "its filter depends on the tokens")
    order = sorted(range(len(letters)), key=lambda i: output.index(letters[i]))

    def factor(time: int) -> Tensor:
        constant = as_spectrum_gain(signals.constants.tensor(other, time)).permute(order)
        present = [letters[i] for i in order]
        return constant.reshape([constant.shape[present.index(c)] if c in present else 1 for c in output])

    value = signals.values[operands[spectra[0]]]
    assert isinstance(value, Spectrum)
    added = [i for i, c in enumerate(output) if c not in mine]
    moved = _rearranged(signals, value, [mine.index(c) for c in output if c in mine], added)
    assert isinstance(moved, Spectrum)
    return _amplified(signals, moved, factor)


def _cast(signals: Signals, node: Node) -> Value | None:
    """A cast of a tracked signal is the signal: programs are float32."""
    value = signals.values[node.args[0]]  # type: ignore[index]
    return value if isinstance(value, (Spectrum, Window)) and not isinstance(value, Plain) else None


# ---- layout of spectra ---------------------------------------------------------------------------------------------


def _layout(signals: Signals, node: Node) -> Value | None:
    """unsqueeze, permute and transpose of a spectrum happen to its source and its gain alike."""
    value = signals.values[node.args[0]]  # type: ignore[index]
    if not isinstance(value, (Spectrum, Window)) or (isinstance(value, Window) and isinstance(value.taps, FirTaps)):
        return None
    return _rearranged(signals, value, *_new_order(node, len(tensor_sizes(value.source))))


def _rearranged(signals: Signals, value: Spectrum | Window, order: list[int], added: list[int]) -> Spectrum | Window:
    """Axes in another order, then new ones of size 1 at the positions `added`, ascending."""
    rank = len(tensor_sizes(value.source))
    source = signals.emit.permute(value.source, order)
    axis = order.index(value.axis)
    for position in added:
        sizes = tensor_sizes(source)
        source = signals.emit.reshape(source, (*sizes[:position], Size(0, 0, 1), *sizes[position:]))
        axis += position <= axis

    def moved(taps: Taps) -> Taps:
        def at(time: int) -> Tensor:
            x = taps(time)
            x = x.reshape((1,) * (rank - x.ndim) + x.shape).permute(order)
            for position in added:
                x = x.unsqueeze(position)
            return x

        return at

    if isinstance(value, Spectrum):
        gain = None if value.gain is None else moved(value.gain)
        return replace(value, source=source, axis=axis, gain=gain)
    long = value.taps
    taps = replace(long, at=moved(long.at)) if isinstance(long, LongTaps) else long
    return replace(value, source=source, axis=axis, taps=taps)


def _new_order(node: Node, rank: int) -> tuple[list[int], list[int]]:
    """(order of the old axes, positions of new ones)"""
    args = bind(node)
    order = list(range(rank))
    if node.target == aten.unsqueeze.default:
        return order, [args["dim"] % (rank + 1)]
    if node.target == aten.permute.default:
        return [dim % rank for dim in args["dims"]], []
    first, second = args["dim0"] % rank, args["dim1"] % rank
    order[first], order[second] = order[second], order[first]
    return order, []


RULES: dict[object, Rule] = {
    aten.fft_rfft.default: _forward(onesided=True),
    aten.fft_fft.default: _forward(onesided=False),
    aten.fft_irfft.default: _inverse(onesided=True),
    aten.fft_ifft.default: _inverse(onesided=False),
    aten.real.default: _real,
    aten.view_as_real.default: _view_as_real,
    aten.select.int: _select,
    aten.mul.Tensor: _product(divide=False),
    aten.div.Tensor: _product(divide=True),
    aten.einsum.default: _einsum,
    aten.to.dtype: _cast,
    aten.unsqueeze.default: _layout,
    aten.permute.default: _layout,
    aten.transpose.int: _layout,
}
