"""Stage: captured program in, program whose only operators that mix time or know it are those of `lhcompile.ops` out.

The graph is rewritten in one walk. Values that do not depend on the tokens are constants: taps, whatever code
made them. Pads, cuts, transforms, products of spectra and short convolutions are tracked as what they are, linear
time-invariant functions of a signal (`windows`, `spectra`), and become one operator where something else reads them.
So do the scores of causal attention, fused or written out (`attention`). Operators of our own in a module are taken
over (`operators`). Constants that depend on the absolute position are read from tables by position (`walk`). Every
other operator must treat each position on its own, which is tried, not looked up (`pointwise`).

    before                                                after
    fft_rfft(u, 2·t) ─┐                                   lhc.long_conv(u, taps, None, 1)
    fft_rfft(k, 2·t) ─┴ mul ─ fft_irfft ─ slice(0, t)
    conv1d(x, w, b, padding=2) ─ slice(0, t)              lhc.fir(x, w, b, None, groups)
    y + u · D                                             (D joins the first tap)
    q @ kᵀ · a ─ + mask ─ softmax ─ @ v                   lhc.attention(q, k, v, None, None, None, a)
    x + table[:t]                                         x + embedding(table, lhc.position(ids, None)[0])

What is not understood stops here with module path, operator and source line.
"""

from __future__ import annotations

from lhcompile.artifacts import Program
from lhcompile.recognize.layout import sink_permutes
from lhcompile.recognize.skip import absorb_skips
from lhcompile.recognize.walk import Walk

__all__ = ["recognize"]


def recognize(program: Program) -> Program:
    """Name every convolution of a captured program; RecognizeError at the first operator not understood."""
    graph = Walk(program.graph, program.context).run()
    absorb_skips(graph)
    sink_permutes(graph)
    return Program(graph=graph, context=program.context)
