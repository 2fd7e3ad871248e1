"""Pads, cuts and short convolutions along time, whatever the spelling.

A rule returns the new value, or None when the operator does not touch time and is an ordinary one. With y the signal
taps * u and times outside 0 … t-1 zero:

    pad left p               Window(start - p, …)
    slice [a, b)             Window(start + a, start + b)
    conv1d(k taps, pad p)    Window(start - p + k - 1, …)
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from lhcompile.recognize.signals import Rule, Signals, bind, rank_of
from lhcompile.recognize.values import FirTaps, Plain, Value, Window, refuse, tensor_sizes
from lhcompile.sizes import TIME, Point

__all__ = ["RULES"]

aten = torch.ops.aten


# ---- pads and cuts -------------------------------------------------------------------------------------------------


def _slice(signals: Signals, node: Node) -> Value | None:
    args = bind(node)
    start, stop, step = (signals.number(args[key]) for key in ("start", "end", "step"))
    if step != 1 and args["self"].meta["sizes"][args["dim"] % rank_of(args["self"])].has_time:
        raise refuse(node, f"takes every {step}th position: the output is not one per token")
    return _cut(signals, node, args["self"], args["dim"], start, stop)


def _narrow(signals: Signals, node: Node) -> Value | None:
    args = bind(node)
    start, length = (signals.number(args[key]) for key in ("start", "length"))
    return _cut(signals, node, args["self"], args["dim"], start, start + length)


def _cut(signals: Signals, node: Node, arg: Node, dim: int, start: int | None, stop: int | None) -> Value | None:
    """Positions start … stop-1 of `arg` along `dim`."""
    value, axis = signals.values[arg], dim % rank_of(arg)
    if isinstance(value, Plain):
        law = tensor_sizes(value.node)[axis]
        if not law.has_time:
            return None
        if law != TIME:
            raise refuse(node, f"cuts an axis of {law} entries, which is not time alone")
        window = Window(value.node, axis, 0, signals.context + value.extra)
        extra = value.extra
    elif isinstance(value, Window) and value.axis == axis:
        window, extra = value, 0
    else:
        return None
    length = window.stop - window.start
    start = _clip(0 if start is None else start, length)
    stop = _clip(length if stop is None else stop, length)
    if extra > 0 and (start, stop) != (0, signals.context):
        raise refuse(node, f"cuts positions {start} to {stop} of a signal that is {extra} positions too long")
    if isinstance(value, Plain) and (start, stop) == (0, signals.context):
        return Plain(value.node)
    return replace(window, start=window.start + start, stop=window.start + stop)


def _clip(index: int, length: int) -> int:
    return min(max(index + length if index < 0 else index, 0), length)


def _pad(signals: Signals, node: Node) -> Value | None:
    args = bind(node)
    signal = signals.signal(args["self"])
    pads = signals.number(args["pad"])
    if signal is None:
        return None
    rank = rank_of(args["self"])
    by_axis = {rank - 1 - i // 2: (pads[i], pads[i + 1]) for i in range(0, len(pads), 2)}
    before, after = by_axis.pop(signal.axis, (0, 0))
    if not (before or after):
        return None
    if any(pair != (0, 0) for pair in by_axis.values()):
        raise refuse(node, "pads time and channels at once")
    if signal.taps is not None and max(before, after) > 0:
        signal = signals.whole(args["self"], node)
    if args.get("value") not in (None, 0, 0.0):
        raise refuse(node, f"pads time with {args['value']}, not with zeros")
    if args.get("mode") not in (None, "constant"):
        raise refuse(node, f"pads time by {args['mode']}, not with zeros")
    return _extended(signals, node, signal, before, after)


def _extended(signals: Signals, node: Node, signal: Window, before: int, after: int) -> Window:
    """Zeros before and after; where samples exist there already the result is no longer the same signal."""
    if (before > 0 and signal.start > 0) or (after > 0 and signal.stop < signals.context):
        raise refuse(node, "pads a signal with zeros where positions were cut off")
    return replace(signal, start=signal.start - before, stop=signal.stop + after)


def _cat(signals: Signals, node: Node) -> Value | None:
    args = bind(node)
    parts = args["tensors"]
    moving = [part for part in parts if not signals.is_constant(part)]
    signal = signals.signal(moving[0])
    if signal is None or args["dim"] % rank_of(moving[0]) != signal.axis:
        return None
    if len(moving) > 1:
        raise refuse(node, "joins signals along time")
    if signal.taps is not None:
        signal = signals.whole(moving[0], node)
    where = parts.index(moving[0])
    for part in parts:
        if part is not moving[0] and bool(signals.constants.tensor(part, signals.context).any()):
            raise refuse(node, "joins a signal along time with a constant that is not zero")
    before, after = (
        sum(signals.constants.tensor(part, signals.context).shape[signal.axis] for part in some)
        for some in (parts[:where], parts[where + 1 :])
    )
    return _extended(signals, node, signal, before, after)


def _slice_scatter(signals: Signals, node: Node) -> Value | None:
    """zeros[:, a:b] = signal: the signal with zeros before and behind"""
    args = bind(node)
    source, base = args["src"], args["self"]
    axis = args["dim"] % rank_of(base)
    if signals.is_constant(source) or not signals.is_constant(base) or not base.meta["sizes"][axis].has_time:
        return None
    signal = signals.signal(source)
    if signal is None or signal.axis != axis or bool(signals.constants.tensor(base, signals.context).any()):
        return None
    if signal.taps is not None:
        signal = signals.whole(source, node)
    length = base.meta["sizes"][axis].at(Point(1, signals.context))
    start, stop = (signals.number(args[key]) for key in ("start", "end"))
    start, stop = _clip(0 if start is None else start, length), _clip(length if stop is None else stop, length)
    return _extended(signals, node, signal, start, length - stop)


# ---- short convolutions --------------------------------------------------------------------------------------------


def _conv1d(signals: Signals, node: Node) -> Value | None:
    args = bind(node)
    if not all(signals.is_constant(args[key]) for key in ("weight", "bias")):
        raise refuse(node, "its weight depends on the tokens")
    signal = signals.signal(args["input"])
    if signal is None or signal.axis != rank_of(args["input"]) - 1:
        return None
    weight = _steady(signals, args["weight"], node)
    bias = None if args["bias"] is None else _steady(signals, args["bias"], node)
    padding = signals.number(args["padding"])
    padding = [0] if padding == "valid" else padding
    stride, dilation = signals.number(args["stride"]), signals.number(args["dilation"])
    if isinstance(padding, str):
        raise refuse(node, f"looks ahead: padding={padding!r} is not causal")
    if list(stride) not in ([1], []):
        raise refuse(node, f"has stride {list(stride)}: the output is not one per token")
    weight = _dilated(weight, dilation[0] if dilation else 1)
    taps, pad = weight.shape[-1], padding[0] if padding else 0
    if taps == 1 and pad == 0:
        return None  # a linear map of each position
    if signal.taps is not None or signal.start > 0 or signal.stop < signals.context:
        signal = signals.whole(args["input"], node)
    start = signal.start - pad + taps - 1
    stop = start + (signal.stop - signal.start) + 2 * pad - (taps - 1)
    return Window(signal.source, signal.axis, start, stop, FirTaps(weight, bias, signals.number(args["groups"])), node)


def _steady(signals: Signals, arg: Node, node: Node) -> Tensor:
    """A convolution's weight or bias, checked to have the same newest taps at another length."""
    value, shorter = (signals.constants.tensor(arg, time) for time in (signals.context, signals.context // 2))
    span = min(value.shape[-1], shorter.shape[-1])
    if not torch.allclose(value[..., -span:], shorter[..., -span:], rtol=1e-4):
        raise refuse(node, f"its weights at length {signals.context // 2} are others than at length {signals.context}")
    return value


def _dilated(weight: Tensor, dilation: int) -> Tensor:
    if dilation == 1:
        return weight
    spread = weight.new_zeros(*weight.shape[:-1], (weight.shape[-1] - 1) * dilation + 1)
    spread[..., ::dilation] = weight
    return spread


RULES: dict[object, Rule] = {
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.slice_scatter.default: _slice_scatter,
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad,
    aten.cat.default: _cat,
    aten.conv1d.default: _conv1d,
    aten.conv1d.padding: _conv1d,
}
