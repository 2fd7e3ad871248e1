"""Rules for what happens to a signal along its time axis, whatever the spelling.

A rule returns the new value, or None when the operator does not touch time and is an ordinary one. With y the signal
taps * u and times outside 0 … t-1 zero:

    pad left p               Window(start - p, …)          rfft(u, n)       Spectrum(n)
    slice [a, b)             Window(start + a, start + b)  · constant       Spectrum(gain · constant)
    conv1d(k taps, pad p)    Window(start - p + k - 1, …)  irfft            Window(0, n) with taps = irfft(gain)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

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
from lhcompile.sizes import TIME, Point, Size

if TYPE_CHECKING:
    from lhcompile.recognize.walk import Walk

__all__ = ["RULES"]

aten = torch.ops.aten
Rule = Callable[["Walk", Node], Value | None]


def _bind(node: Node) -> dict[str, Any]:
    """All arguments of an aten operator by the names of its schema, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound = {arg.name: arg.default_value for arg in schema.arguments if arg.has_default_value()}
    bound.update({arg.name: value for arg, value in zip(schema.arguments, node.args, strict=False)})
    bound.update(node.kwargs)
    return bound


def _axis(dim: int, rank: int) -> int:
    return dim % rank


# ---- pads and cuts -------------------------------------------------------------------------------------------------


def _slice(walk: Walk, node: Node) -> Value | None:
    args = _bind(node)
    start, stop, step = (walk.number(args[key]) for key in ("start", "end", "step"))
    if step != 1 and args["self"].meta["sizes"][_axis(args["dim"], _rank(args["self"]))].has_time:
        raise refuse(node, f"takes every {step}th position: the output is not one per token")
    return _cut(walk, node, args["self"], args["dim"], start, stop)


def _narrow(walk: Walk, node: Node) -> Value | None:
    args = _bind(node)
    start, length = (walk.number(args[key]) for key in ("start", "length"))
    return _cut(walk, node, args["self"], args["dim"], start, start + length)


def _cut(walk: Walk, node: Node, arg: Node, dim: int, start: int | None, stop: int | None) -> Value | None:
    """Positions start … stop-1 of `arg` along `dim`."""
    value, axis = walk.values[arg], _axis(dim, _rank(arg))
    if isinstance(value, Plain):
        law = tensor_sizes(value.node)[axis]
        if not law.has_time:
            return None
        if law != TIME:
            raise refuse(node, f"cuts an axis of {law} entries, which is not time alone")
        window = Window(value.node, axis, 0, walk.context + value.extra)
        extra = value.extra
    elif isinstance(value, Window) and value.axis == axis:
        window, extra = value, 0
    else:
        return None
    length = window.stop - window.start
    start = _clip(0 if start is None else start, length)
    stop = _clip(length if stop is None else stop, length)
    if extra > 0 and (start, stop) != (0, walk.context):
        raise refuse(node, f"cuts positions {start} to {stop} of a signal that is {extra} positions too long")
    if isinstance(value, Plain) and (start, stop) == (0, walk.context):
        return Plain(value.node)
    return replace(window, start=window.start + start, stop=window.start + stop)


def _clip(index: int, length: int) -> int:
    return min(max(index + length if index < 0 else index, 0), length)


def _pad(walk: Walk, node: Node) -> Value | None:
    args = _bind(node)
    signal = walk.signal(args["self"])
    pads = walk.number(args["pad"])
    if signal is None:
        return None
    rank = _rank(args["self"])
    by_axis = {rank - 1 - i // 2: (pads[i], pads[i + 1]) for i in range(0, len(pads), 2)}
    before, after = by_axis.pop(signal.axis, (0, 0))
    if not (before or after):
        return None
    if any(pair != (0, 0) for pair in by_axis.values()):
        raise refuse(node, "pads time and channels at once")
    if signal.taps is not None and max(before, after) > 0:
        signal = _whole(walk, args["self"], node)
    if args.get("value") not in (None, 0, 0.0):
        raise refuse(node, f"pads time with {args['value']}, not with zeros")
    if args.get("mode") not in (None, "constant"):
        raise refuse(node, f"pads time by {args['mode']}, not with zeros")
    return _extended(walk, node, signal, before, after)


def _extended(walk: Walk, node: Node, signal: Window, before: int, after: int) -> Window:
    """Zeros before and after; where samples exist there already the result is no longer the same signal."""
    if (before > 0 and signal.start > 0) or (after > 0 and signal.stop < walk.context):
        raise refuse(node, "pads a signal with zeros where positions were cut off")
    return replace(signal, start=signal.start - before, stop=signal.stop + after)


def _cat(walk: Walk, node: Node) -> Value | None:
    args = _bind(node)
    parts = args["tensors"]
    moving = [part for part in parts if not walk.is_constant(part)]
    signal = walk.signal(moving[0])
    if signal is None or _axis(args["dim"], _rank(moving[0])) != signal.axis:
        return None
    if len(moving) > 1:
        raise refuse(node, "joins signals along time")
    if signal.taps is not None:
        signal = _whole(walk, moving[0], node)
    where = parts.index(moving[0])
    for part in parts:
        if part is not moving[0] and bool(walk.constants.tensor(part, walk.context).any()):
            raise refuse(node, "joins a signal along time with a constant that is not zero")
    before, after = (
        sum(walk.constants.tensor(part, walk.context).shape[signal.axis] for part in some)
        for some in (parts[:where], parts[where + 1 :])
    )
    return _extended(walk, node, signal, before, after)


def _slice_scatter(walk: Walk, node: Node) -> Value | None:
    """zeros[:, a:b] = signal: the signal with zeros before and behind"""
    args = _bind(node)
    source, base = args["src"], args["self"]
    axis = _axis(args["dim"], _rank(base))
    if walk.is_constant(source) or not walk.is_constant(base) or not base.meta["sizes"][axis].has_time:
        return None
    signal = walk.signal(source)
    if signal is None or signal.axis != axis or bool(walk.constants.tensor(base, walk.context).any()):
        return None
    if signal.taps is not None:
        signal = _whole(walk, source, node)
    length = base.meta["sizes"][axis].at(Point(1, walk.context))
    start, stop = (walk.number(args[key]) for key in ("start", "end"))
    start, stop = _clip(0 if start is None else start, length), _clip(length if stop is None else stop, length)
    return _extended(walk, node, signal, start, length - stop)


# ---- short convolutions --------------------------------------------------------------------------------------------


def _conv1d(walk: Walk, node: Node) -> Value | None:
    args = _bind(node)
    if not all(walk.is_constant(args[key]) for key in ("weight", "bias")):
        raise refuse(node, "its weight depends on the tokens")
    signal = walk.signal(args["input"])
    if signal is None or signal.axis != _rank(args["input"]) - 1:
        return None
    weight = _steady(walk, args["weight"], node)
    bias = None if args["bias"] is None else _steady(walk, args["bias"], node)
    padding = walk.number(args["padding"])
    padding = [0] if padding == "valid" else padding
    stride, dilation = walk.number(args["stride"]), walk.number(args["dilation"])
    if isinstance(padding, str):
        raise refuse(node, f"looks ahead: padding={padding!r} is not causal")
    if list(stride) not in ([1], []):
        raise refuse(node, f"has stride {list(stride)}: the output is not one per token")
    weight = _dilated(weight, dilation[0] if dilation else 1)
    taps, pad = weight.shape[-1], padding[0] if padding else 0
    if taps == 1 and pad == 0:
        return None  # a linear map of each position
    if signal.taps is not None or signal.start > 0 or signal.stop < walk.context:
        signal = _whole(walk, args["input"], node)
    start = signal.start - pad + taps - 1
    stop = start + (signal.stop - signal.start) + 2 * pad - (taps - 1)
    return Window(signal.source, signal.axis, start, stop, FirTaps(weight, bias, walk.number(args["groups"])), node)


def _steady(walk: Walk, arg: Node, node: Node) -> Tensor:
    """A convolution's weight or bias, checked to have the same newest taps at another length."""
    value, shorter = (walk.constants.tensor(arg, time) for time in (walk.context, walk.context // 2))
    span = min(value.shape[-1], shorter.shape[-1])
    if not torch.allclose(value[..., -span:], shorter[..., -span:], rtol=1e-4):
        raise refuse(node, f"its weights at length {walk.context // 2} are others than at length {walk.context}")
    return value


def _whole(walk: Walk, arg: Node, node: Node) -> Window:
    """The signal as an operator's finished result, to start the next one from."""
    plain = walk.settle(arg, node, cut=True)
    axis = next(i for i, size in enumerate(tensor_sizes(plain.node)) if size.has_time)
    return Window(plain.node, axis, 0, walk.context)


def _dilated(weight: Tensor, dilation: int) -> Tensor:
    if dilation == 1:
        return weight
    spread = weight.new_zeros(*weight.shape[:-1], (weight.shape[-1] - 1) * dilation + 1)
    spread[..., ::dilation] = weight
    return spread


# ---- transforms ----------------------------------------------------------------------------------------------------


def _forward(onesided: bool) -> Rule:
    def rule(walk: Walk, node: Node) -> Value | None:
        args = _bind(node)
        signal, value = walk.signal(args["self"]), walk.values[args["self"]]
        if isinstance(value, Plain) and value.extra:
            longer = f"{abs(value.extra)} positions {'longer' if value.extra > 0 else 'shorter'}"
            raise refuse(node, f"transforms a signal {longer} than the sequence")
        if signal is None or _axis(args["dim"], _rank(args["self"])) != signal.axis:
            return None
        if signal.taps is not None or signal.start != 0 or signal.stop < walk.context:
            signal = _whole(walk, args["self"], node)
        size = _sizer(walk, args["n"], args["self"].meta["sizes"][signal.axis])
        length = size(walk.context)
        if length < walk.context:
            raise refuse(node, f"a transform of length {length} drops part of the sequence of {walk.context}")
        norm = args["norm"] or "backward"
        scale = {"backward": lambda n: 1.0, "ortho": lambda n: n**-0.5, "forward": lambda n: 1.0 / n}[norm]
        return Spectrum(signal.source, signal.axis, size, onesided, lambda t: scale(size(t)))

    return rule


def _sizer(walk: Walk, n: Any, axis: Size) -> Callable[[int], int]:
    """A transform's length as a function of the sequence's; without n it is the length of the axis."""
    if n is None:
        return lambda time: axis.at(Point(1, time))
    return lambda time: int(walk.number(n, time))


def _inverse(onesided: bool) -> Rule:
    def rule(walk: Walk, node: Node) -> Value | None:
        args = _bind(node)
        spectrum = walk.values[args["self"]]
        if not isinstance(spectrum, Spectrum) or _axis(args["dim"], _rank(args["self"])) != spectrum.axis:
            return None
        if spectrum.onesided != onesided:
            raise refuse(node, "inverts a one-sided spectrum as a full one, or the other way round")
        bins = spectrum.size(walk.context)
        size = walk.number(args["n"])
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


def _real(walk: Walk, node: Node) -> Value | None:
    value = walk.values[node.args[0]]  # type: ignore[index]
    if isinstance(value, Window) and isinstance(value.taps, LongTaps) and value.taps.complex:
        return replace(value, taps=replace(value.taps, complex=False))
    return None


def _view_as_real(walk: Walk, node: Node) -> Value | None:
    value = walk.values[node.args[0]]  # type: ignore[index]
    return Parts(value) if isinstance(value, Window) else None


def _select(walk: Walk, node: Node) -> Value | None:
    args = _bind(node)
    value = walk.values[args["self"]]
    if isinstance(value, Parts) and args["index"] == 0 and args["dim"] in (-1, _rank(args["self"]) - 1):
        return _real_part(value.window)
    return None


def _real_part(window: Window) -> Window:
    assert isinstance(window.taps, LongTaps)
    return replace(window, taps=replace(window.taps, complex=False))


# ---- products of spectra -------------------------------------------------------------------------------------------


def _product(divide: bool) -> Rule:
    def rule(walk: Walk, node: Node) -> Value | None:
        left, right = node.args[0], node.args[1]
        spectra = [arg for arg in (left, right) if isinstance(arg, Node) and _is_spectrum(walk, arg)]
        if not spectra:
            return None
        if len(spectra) == 2 or (divide and not _is_spectrum(walk, left)):
            raise refuse(node, "its filter depends on the tokens")
        other = right if spectra[0] is left else left
        if not walk.is_constant(other):
            raise refuse(node, "its filter depends on the tokens")
        value = walk.values[spectra[0]]
        assert isinstance(value, Spectrum)

        def factor(time: int) -> Tensor:
            constant = walk.number(other, time)
            constant = as_spectrum_gain(constant if isinstance(constant, Tensor) else torch.tensor(constant))
            return 1.0 / constant if divide else constant

        return _amplified(walk, value, factor)

    return rule


def _is_spectrum(walk: Walk, arg: object) -> bool:
    return isinstance(arg, Node) and not walk.is_constant(arg) and isinstance(walk.values[arg], Spectrum)


def _amplified(walk: Walk, value: Spectrum, factor: Taps) -> Spectrum:
    """The spectrum times a factor; a factor of higher rank gives the source leading axes."""
    before = value.gain
    gain: Taps = factor if before is None else (lambda time: before(time) * factor(time))
    missing = factor(walk.context).ndim - len(tensor_sizes(value.source))
    source, axis = value.source, value.axis
    if missing > 0:
        source = walk.emit.reshape(source, (Size(0, 0, 1),) * missing + tensor_sizes(source))
        axis += missing
    return replace(value, source=source, axis=axis, gain=gain)


def _einsum(walk: Walk, node: Node) -> Value | None:
    equation, operands = str(node.args[0]), list[Any](node.args[1])  # type: ignore[arg-type]
    spectra = [i for i, arg in enumerate(operands) if _is_spectrum(walk, arg)]
    if not spectra:
        return None
    inputs, _, output = equation.replace(" ", "").partition("->")
    mine = inputs.split(",")[spectra[0]]
    letters = "".join(inputs.split(",")[: spectra[0]] + inputs.split(",")[spectra[0] + 1 :])
    distinct = all(len(set(part)) == len(part) for part in (mine, letters, output))
    if len(operands) != 2 or not distinct or "." in equation or set(output) != set(mine) | set(letters):
        raise refuse(node, f"combines spectra as {equation!r}, which is not a product bin by bin")
    other = operands[1 - spectra[0]]
    if not walk.is_constant(other):
        raise refuse(node, "its filter depends on the tokens")
    order = sorted(range(len(letters)), key=lambda i: output.index(letters[i]))

    def factor(time: int) -> Tensor:
        constant = as_spectrum_gain(walk.constants.tensor(other, time)).permute(order)
        present = [letters[i] for i in order]
        return constant.reshape([constant.shape[present.index(c)] if c in present else 1 for c in output])

    value = walk.values[operands[spectra[0]]]
    assert isinstance(value, Spectrum)
    added = [i for i, c in enumerate(output) if c not in mine]
    moved = _rearranged(walk, value, [mine.index(c) for c in output if c in mine], added)
    assert isinstance(moved, Spectrum)
    return _amplified(walk, moved, factor)


def _cast(walk: Walk, node: Node) -> Value | None:
    """A cast of a tracked signal is the signal: programs are float32."""
    value = walk.values[node.args[0]]  # type: ignore[index]
    return value if isinstance(value, (Spectrum, Window)) and not isinstance(value, Plain) else None


# ---- layout of spectra ---------------------------------------------------------------------------------------------


def _layout(walk: Walk, node: Node) -> Value | None:
    """unsqueeze, permute and transpose of a spectrum happen to its source and its gain alike."""
    value = walk.values[node.args[0]]  # type: ignore[index]
    if not isinstance(value, (Spectrum, Window)) or (isinstance(value, Window) and isinstance(value.taps, FirTaps)):
        return None
    return _rearranged(walk, value, *_new_order(node, len(tensor_sizes(value.source))))


def _rearranged(walk: Walk, value: Spectrum | Window, order: list[int], added: list[int]) -> Spectrum | Window:
    """Axes in another order, then new ones of size 1 at the positions `added`, ascending."""
    rank = len(tensor_sizes(value.source))
    source = walk.emit.permute(value.source, order)
    axis = order.index(value.axis)
    for position in added:
        sizes = tensor_sizes(source)
        source = walk.emit.reshape(source, (*sizes[:position], Size(0, 0, 1), *sizes[position:]))
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
    args = _bind(node)
    order = list(range(rank))
    if node.target == aten.unsqueeze.default:
        return order, [args["dim"] % (rank + 1)]
    if node.target == aten.permute.default:
        return [dim % rank for dim in args["dims"]], []
    first, second = args["dim0"] % rank, args["dim1"] % rank
    order[first], order[second] = order[second], order[first]
    return order, []


def _rank(node: Node) -> int:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.ndim


RULES: dict[object, Rule] = {
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.slice_scatter.default: _slice_scatter,
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad,
    aten.cat.default: _cat,
    aten.conv1d.default: _conv1d,
    aten.conv1d.padding: _conv1d,
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
