"""Finding out how long a sequence a module takes, when nobody says."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from lhcompile.artifacts import Signal
from lhcompile.errors import CaptureError

__all__ = ["UNBOUNDED_CONTEXT", "probe_context", "stored_taps"]

aten = torch.ops.aten

UNBOUNDED_CONTEXT = 2048
"""Context assumed for a module that takes any length; `--context` sets another."""


def probe_context(module: torch.nn.Module, signal: Signal) -> int:
    """The longest length at which the module returns values for each position of one sequence.

    Doubles the length until the module refuses or `UNBOUNDED_CONTEXT` is reached, then bisects.
    Raises CaptureError, with the module's own words, when even a short sequence is refused.
    """
    good, bad, refusal = 0, UNBOUNDED_CONTEXT + 1, ""
    length = 8
    while length < bad:
        refusal_here = _refusal(module, length, signal)
        if refusal_here is None:
            good, length = length, min(length * 2, UNBOUNDED_CONTEXT)
            if good == UNBOUNDED_CONTEXT:
                return good
        else:
            bad, refusal = length, refusal_here
            break
    if not good:
        raise CaptureError(f"the module does not run on {_described(signal)}: {refusal}")
    while bad - good > 1:
        middle = (good + bad) // 2
        if _refusal(module, middle, signal) is None:
            good = middle
        else:
            bad = middle
    return good


def stored_taps(graph: GraphModule) -> int | None:
    """Length of the shortest filter that is transformed whole, whatever the sequence; None when there is none."""
    dependent: set[Node] = set()
    lengths = []
    for node in graph.graph.nodes:
        if node.op == "placeholder" or ("size" not in node.meta and dependent & set(node.all_input_nodes)):
            dependent.add(node)
        elif node.target in (aten.fft_rfft.default, aten.fft_fft.default):
            dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", -1)
            axis = node.args[0].meta["sizes"][dim]
            lengths += [axis.offset] if axis.fixed else []
    return min(lengths, default=None)


def _described(signal: Signal) -> str:
    return "token ids [1, 8]" if signal.features is None else f"features [1, 8, {signal.features}]"


def _refusal(module: torch.nn.Module, length: int, signal: Signal) -> str | None:
    """Why the module does not take this length, or None when it does."""
    try:
        out = module(signal.constant(1, length))
    except Exception as error:  # the module is the user's: it may raise anything
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not isinstance(out, torch.Tensor):
        return f"it returns a {type(out).__name__}, not a tensor"
    if out.ndim != 3 or out.shape[:2] != (1, length):
        return f"its output has shape {list(out.shape)}, not [1, {length}, {signal.width}]"
    return None
