"""Stage: torch module in, program of its sizes out.

Real model code holds `min(l, l_max)` and hard-coded views, on which exporting with a symbolic length fails.
So the module is exported twice with fixed sizes, (batch, time) = (5, T-3) and (7, T), T one below the context
length. Both exports have the same nodes; a number that differs between them follows a law in batch and time
(`lhcompile.sizes`), and is replaced by an expression of the input's own sizes. The result runs at any batch
and any length up to the context, and every tensor's axes are known in terms of batch and time. The input is token ids
[batch, time] or features [batch, time, features], as the module's signal says.

A module that cuts stored filters to the sequence, `h[:, :L]`, and takes any length all the same is no longer cut at
lengths above its filters: where nobody says its context, that is the length of the shortest filter.

    before (at 7 × 1023)                         after
    slice(conv1d, 2, 0, 1023)                    slice(conv1d, 2, 0, t)      t = sym_size(input_ids, 1)
    fft_rfft(u, 2046)                            fft_rfft(u, mul(t, 2))
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from lhcompile.artifacts import LoadedModel, Program, Signal
from lhcompile.capture.context import probe_context, stored_taps
from lhcompile.capture.export import export_at
from lhcompile.capture.generalize import generalize
from lhcompile.errors import CaptureError
from lhcompile.sizes import BATCH, TIME, Point

__all__ = ["capture"]

MINIMUM_CONTEXT = 8


def capture(loaded: LoadedModel) -> Program:
    """Turn `loaded.module` into a program that runs at any batch and any length up to the context.

    Raises CaptureError when the context is too short, the module cannot be exported, or its structure or
    sizes do not follow batch and length.
    """
    with torch.no_grad():
        module, signal = loaded.module, loaded.signal
        context = loaded.context_length or probe_context(module, signal)
        graph = _capture_at(module, context, signal)
        taps = stored_taps(graph) if loaded.context_length is None else None
        if taps is not None and MINIMUM_CONTEXT <= taps < context:
            given = signal.constant(1, taps // 2)
            if not _agrees(graph, module, given):
                context, graph = taps, _capture_at(module, taps, signal)
    return Program(graph=graph, context=context)


def _capture_at(module: torch.nn.Module, context: int, signal: Signal) -> GraphModule:
    """The program that both lengths below the context agree on."""
    if context < MINIMUM_CONTEXT:
        raise CaptureError(
            f"the context length is {context}; a model needs at least {MINIMUM_CONTEXT} positions to be compiled"
        )
    first, second = Point(5, context - 4), Point(7, context - 1)
    graph = generalize(export_at(module, first, signal), export_at(module, second, signal), first, second)
    _check_output(graph, signal)
    return graph


def _agrees(graph: GraphModule, module: torch.nn.Module, given: Tensor) -> bool:
    """Whether the program is still the module on a sequence far shorter than those it was made from."""
    found = graph(given)
    while isinstance(found, (tuple, list)):
        found = found[0]
    expected = module(given)
    return torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def _check_output(graph: GraphModule, signal: Signal) -> None:
    """CaptureError unless the module returns [batch, length, a fixed number of logits or values]."""
    (output,) = [node for node in graph.graph.nodes if node.op == "output"]
    result = output.args[0]
    while isinstance(result, (tuple, list)) and result:
        result = result[0]
    sizes = result.meta.get("sizes") if isinstance(result, Node) else None
    if not (isinstance(sizes, tuple) and len(sizes) == 3 and sizes[:2] == (BATCH, TIME) and sizes[2].fixed):
        shape = "[" + ", ".join(map(str, sizes)) + "]" if isinstance(sizes, tuple) else "no tensor"
        raise CaptureError(f"the module's output is {shape}, not [batch, length, {signal.width}]")
