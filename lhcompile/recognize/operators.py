"""Operators of our own that a module calls itself: taken over as they are, their constants made buffers.

    before                                                    after
    modal_ssm(u, cat(re, re), cat(−im, im), …, None, 1)       modal_ssm(u, own_0, other_1, …, None, 1)
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Node

from lhcompile.recognize.signals import Rule, Signals, bind
from lhcompile.recognize.values import Plain, Value, refuse, tensor_sizes
from lhcompile.sizes import BATCH, TIME, Size
from lhcompile.ssm import RealModal

__all__ = ["RULES"]

lhc = torch.ops.lhc


def _fir(signals: Signals, node: Node) -> Value:
    return _taken_over(signals, node, bind(node)["weight"])


def _long_conv(signals: Signals, node: Node) -> Value:
    return _taken_over(signals, node, None)


def _modal_ssm(signals: Signals, node: Node) -> Value:
    """A modal system must be one that forgets, in the form of `lhcompile.ssm`."""
    args = bind(node)
    tables = [args[name] for name in ("own", "other", "readout", "direct")]
    if not all(signals.is_constant(table) for table in tables):
        raise refuse(node, "its filter depends on the tokens")
    real = RealModal(*(signals.number(table) for table in tables))
    if not bool(torch.isfinite(torch.cat([table.flatten() for table in vars(real).values()])).all()):
        raise refuse(node, "its poles or residues hold NaN or infinite numbers")
    if not real.in_slots:
        raise refuse(node, "its tables hold neither conjugate pairs nor real poles")
    largest = float(real.moduli.max())
    if largest >= 1:
        raise refuse(node, f"has a pole of modulus {largest:.7g}: its state would grow without bound")
    return _taken_over(signals, node, None)


def _taken_over(signals: Signals, node: Node, outs: Node | None) -> Value:
    """The operator on its settled signal; its result has as many channels as `outs` has rows, or as the signal."""
    args = bind(node)
    u = args.pop("u")
    if signals.is_constant(u):
        raise refuse(node, "its weights depend on the tokens, and its signal does not")
    if args["state"] is not None:
        raise refuse(node, "is given a state: a sequence begins from none")
    source = signals.settle(u, node, cut=True).node
    sizes = tensor_sizes(source)
    if sizes[:2] != (BATCH, TIME):
        raise refuse(node, f"its signal is [{', '.join(map(str, sizes))}], not [B, T, channels]")
    operands = [_constant(signals, node, name, value) for name, value in args.items()]
    source = signals.emit.cast(source, torch.float32)
    if outs is not None:
        sizes = (BATCH, TIME, Size(0, 0, signals.constants.tensor(outs, signals.context).shape[0]))
    pair = signals.emit.call(node.target, (source, *operands), None)
    y = signals.emit.call(operator.getitem, (pair, 0), sizes)
    return [Plain(signals.emit.cast(y, node.meta["val"][0].dtype))]


def _constant(signals: Signals, node: Node, name: str, value: object) -> object:
    """A table of weights as a buffer; numbers and None as they are."""
    if not isinstance(value, Node) or "size" in value.meta:
        return signals.number(value)
    if not signals.is_constant(value):
        raise refuse(node, f"its argument {name!r} depends on the tokens")
    table, shorter = (signals.constants.tensor(value, time) for time in (signals.context, signals.context // 2))
    if not (table.shape == shorter.shape and torch.allclose(table, shorter, equal_nan=True)):
        raise refuse(node, f"its argument {name!r} changes with the length of the sequence")
    return signals.emit.constant(_single(table), name)


def _single(table: Tensor) -> Tensor:
    return table.float() if table.is_floating_point() else table


RULES: dict[object, Rule] = {
    lhc.fir.default: _fir,
    lhc.long_conv.default: _long_conv,
    lhc.modal_ssm.default: _modal_ssm,
}
