"""The project's fused operators as ONNX functions: what each of them computes, in standard operators.

A graph names the operators `HyenaMixer`, `HyenaStep` and `Sample` of domain "lhcompile", and those of
`lower.projections`, and carries their functions.
Where the library of runtimes/ops is registered, its kernels are taken; anywhere else the runtime inlines the function.
So a function is the operator's specification, its fallback, and what the kernels are tested against.

An operator has one kernel and one function for each form it is used in (types, which inputs are there, one token or
any number): a function's `overload` names the form. `call` makes the node. Signals are [batch, time, channels],
arithmetic is float32 between inputs and outputs of any type, and tables are float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lhcompile.lower.body import DOMAIN, FLOAT, SHORT, Body, Type, flags
from lhcompile.ssm import partners

__all__ = ["call", "mixer_function", "sample_function"]

DOUBLE = Type.DOUBLE
_END = 2**63 - 1


def call(function: ir.Function, inputs: Sequence[ir.Value | None]) -> ir.Node:
    """The node that calls `function`, with its attributes; None where an optional input is not there."""
    given = list(inputs)
    while given and given[-1] is None:
        given.pop()
    node = ir.Node(
        DOMAIN,
        function.name,
        given,
        attributes=list(function.attributes.values()),
        overload=function.overload,
        num_outputs=len(function.outputs),
    )
    for value, like in zip(node.outputs, function.outputs, strict=True):
        value.type = like.type
    return node


def mixer_function(
    *,
    taps: int,
    order: int,
    block: int,
    outer: int,
    complex_poles: bool,
    bias: bool = True,
    packed: bool = False,
    one_token: bool = False,
    apart: bool = False,
    whole: bool = False,
    signal: Type = FLOAT,
    conv_state: Type = FLOAT,
    recurrent_state: Type = FLOAT,
) -> ir.Function:
    """HyenaMixer: everything between the input and the output projection of a Hyena block.

        p = short convolution of `projected`;  u = p[a] ∘ p[b];  y = p[outer] ∘ modal(u)
        s' = own ∘ s + other ∘ swap(s) + u,  modal(u) = Σ readout ∘ s' + direct ∘ u        (lhcompile.ssm)

    where p is three parts of D channels; channel c of part i lies at (c // block) · 3 · block + i · block + c % block:
    block = D for three contiguous parts, block = 1 for interleaved ones. a and b are the parts that are not `outer`.

    Inputs: projected [batch, time, 3D]; conv_state [batch, taps − 1, 3D], the last tokens of `projected`;
    recurrent_state [batch, order, D]; conv_weight [taps, 3D], the last row for the current token; conv_bias [3D],
    optional; own, other, readout [order, D], other optional (without it no poles are complex); direct [D];
    index int32 [order, D], optional.
    With index, recurrent_state is packed, [batch, states] or [batch, 1, states], and index says where in it the state
    (row, channel) lies, −1 where there is none: the tables are zero there.
    Outputs: mixed [batch, time, D], and both states after the last token, in their types and layouts. A state of
    float16 stops at its largest number, ±65504, and never becomes infinite; NaN stays NaN.

    one_token: time is 1; otherwise it is any number.
    whole: block is D, which takes fewer operators.
    apart: HyenaStep, which takes one token and has the past in tensors of its own: no conv_state, but behind the other
    inputs the last taps − 1 tokens of `projected`, [batch, 1, 3D] each, the oldest first, and no state of theirs among
    the outputs. Whoever calls it keeps `projected` for the next call, and nothing is copied.
    What of a float16 token is beyond its largest number counts as that, as in conv_state.
    Raises ValueError where the parts are not three, or no token is apart.
    """
    if outer not in (0, 1, 2):
        raise ValueError(f"outer is {outer}, expected one of the three parts: 0, 1 or 2")
    if apart and taps < 2:
        raise ValueError(f"taps is {taps}: there is no past to have apart")
    names = "projected conv_state recurrent_state conv_weight conv_bias own other readout direct index"
    inputs = [ir.Value(name=name) for name in names.split()]
    projected, before, state, weight, offset, own, other, readout, direct, index = inputs
    past = [before]
    if apart:
        past = [ir.Value(name=f"past_{age}") for age in range(taps - 1, 0, -1)]
        inputs = [each for each in inputs if each is not before] + past
    body = Body()

    heard = [body.stopped(each, conv_state) if apart else body.cast(each, conv_state) for each in past]
    window = body.op("Concat", *heard, body.cast(projected, signal), axis=1)
    after = body.op("Slice", window, body.ints(1 - taps), body.ints(_END), body.ints(1)) if not apart else None
    if taps == 1:
        after = body.op("Identity", before)
    mixed = _convolved(body, window, weight, taps, one_token)
    gate, u = _gated(body, body.op("Add", mixed, offset) if bias else mixed, None if whole else block, outer)

    s = body.cast(state, recurrent_state)
    if packed:
        s = _unpacked(body, s, index)
    system = _System(own, other if complex_poles else None, readout, order)
    if one_token:
        s = system.next(body, s, u)
        y = system.read(body, s)
    else:
        y, s = _scanned(body, system, s, u)
    y = body.op("Add", y, body.op("Mul", u, direct))
    y = body.op("Mul", y, gate)
    if packed:
        s = body.op("Reshape", _packed(body, s, state, index), body.op("Shape", state))
    kept = [] if after is None else [body.kept(after, conv_state)]
    outputs = [body.back(y, signal), *kept, body.kept(s, recurrent_state)]
    form = f"k{taps}n{order}b{block}o{outer}" + flags(bias=bias, complex=complex_poles, packed=packed, whole=whole)
    types = "_".join(SHORT[t] for t in (signal, conv_state, recurrent_state))
    overload = f"{form}_{types}{flags(step=one_token)}"
    return body.function("HyenaStep" if apart else "HyenaMixer", overload, inputs, outputs, block=block, outer=outer)


class _System:
    """A bank of modal systems in real form, of which the tables are values of the graph."""

    def __init__(self, own: ir.Value, other: ir.Value | None, readout: ir.Value, order: int) -> None:
        self.own, self.other, self.readout, self.order = own, other, readout, order

    def next(self, body: Body, state: ir.Value, u: ir.Value) -> ir.Value:
        """state [batch, order, D], u [batch, 1, D] → the next state"""
        following = body.op("Mul", state, self.own)
        if self.other is not None:
            swapped = body.op("Gather", state, body.ints(*partners(self.order)), axis=1)
            following = body.op("Add", following, body.op("Mul", swapped, self.other))
        return body.op("Add", following, u)

    def read(self, body: Body, state: ir.Value) -> ir.Value:
        """[batch, order, D] → [batch, 1, D]"""
        return body.op("ReduceSum", body.op("Mul", state, self.readout), body.ints(1), keepdims=1)


def _convolved(body: Body, window: ir.Value, weight: ir.Value, taps: int, one_token: bool) -> ir.Value:
    """The depthwise convolution: window [batch, taps − 1 + time, C], weight [taps, C] → [batch, time, C]"""
    if one_token:
        return body.op("ReduceSum", body.op("Mul", window, weight), body.ints(1), keepdims=1)
    y = None
    for lag in range(taps):  # oldest first
        until = lag - taps + 1
        part = body.op("Slice", window, body.ints(lag), body.ints(until or _END), body.ints(1))
        part = body.op("Mul", part, body.op("Gather", weight, body.ints(lag), axis=0))
        y = part if y is None else body.op("Add", y, part)
    assert y is not None
    return y


def _gated(body: Body, mixed: ir.Value, block: int | None, outer: int) -> tuple[ir.Value, ir.Value]:
    """[batch, time, 3D] → the part that gates what is heard, and the product of the others, [batch, time, D] each"""
    if block is None:
        parts = body.split(mixed, 3, axis=2)
        gate = parts.pop(outer)
        return gate, body.op("Mul", *parts)
    parts = body.split(body.op("Reshape", mixed, body.ints(0, 0, -1, 3, block)), 3, axis=3)
    flat = body.ints(0, 0, -1)
    gate = body.op("Reshape", parts.pop(outer), flat)
    return gate, body.op("Reshape", body.op("Mul", *parts), flat)


def _scanned(body: Body, system: _System, state: ir.Value, u: ir.Value) -> tuple[ir.Value, ir.Value]:
    """One token after the other: state [batch, order, D], u [batch, time, D] → y like u, last state"""
    inner = Body("token")
    old, token = (ir.Value(name=name, type=ir.TensorType(FLOAT)) for name in ("old", "heard"))
    new = system.next(inner, old, inner.op("Unsqueeze", token, inner.ints(1)))
    said = inner.op("Squeeze", system.read(inner, new), inner.ints(1))
    for value in (new, said):
        value.type = ir.TensorType(FLOAT)
    last, y = body.ops(
        "Scan",
        2,
        state,
        u,
        body=inner.graph([old, token], [new, said], "token"),
        num_scan_inputs=1,
        scan_input_axes=[1],
        scan_output_axes=[1],
    )
    return y, last


def _unpacked(body: Body, state: ir.Value, index: ir.Value) -> ir.Value:
    """[batch, (1), states] → [batch, order, D]; a zero stands behind the states, where index −1 finds it."""
    flat = body.op("Flatten", state, axis=1)
    return body.op("Gather", body.op("Pad", flat, body.ints(0, 0, 0, 1)), index, axis=1)


def _packed(body: Body, state: ir.Value, packed: ir.Value, index: ir.Value) -> ir.Value:
    """[batch, order, D] → [batch, states]; the last places in the order of index are those of the states."""
    places = body.op("Reshape", index, body.ints(-1))
    everything = body.op("Shape", places)
    _, where = body.ops("TopK", 2, places, everything, axis=0, largest=0, sorted=1)
    count = body.op("Shape", packed, start=-1)
    kept = body.op("Slice", where, body.op("Neg", count), body.ints(_END), body.ints(0))
    return body.op("Gather", body.op("Flatten", state, axis=1), kept, axis=1)


def sample_function(*, signal: Type = FLOAT) -> ir.Function:
    """Sample: the next token of every row, in double precision.

    Probabilities are softmax(logits / temperature), of which the top_k most likely stay (all if 0), and of those,
    scaled to one, the fewest most likely that reach top_p (all if 1); at least one stays. Among equal logits the lowest
    ids stay. The token is the one whose stretch of the cumulative distribution, in the order of ids, holds `uniform`;
    with temperature 0 it is the most likely one, the lowest id among equals.

    Inputs: logits [batch, 1, V]; uniform float [batch] in [0, 1); temperature float [batch]; top_k int64 [batch];
    top_p float [batch] in (0, 1]. Output: tokens int64 [batch, 1].
    """
    names = "logits uniform temperature top_k top_p"
    inputs = [ir.Value(name=name) for name in names.split()]
    body = Body()
    column = body.ints(1)
    logits = body.op("Cast", body.op("Squeeze", inputs[0], column), to=DOUBLE)
    uniform, temperature, top_p = (
        body.op("Cast", body.op("Unsqueeze", inputs[i], column), to=DOUBLE) for i in (1, 2, 4)
    )
    top_k = body.op("Unsqueeze", inputs[3], column)
    zero, one = body.scalar(0.0, DOUBLE), body.scalar(1.0, DOUBLE)

    count = body.op("Shape", logits, start=1)
    ranked, ids = body.ops("TopK", 2, logits, count, axis=1, largest=1, sorted=1)
    greedy = body.op("Equal", temperature, zero)
    gap = body.op("Sub", ranked, body.op("Slice", ranked, body.ints(0), body.ints(1), column))
    weights = body.op("Exp", body.op("Div", gap, body.op("Where", greedy, one, temperature)))
    rank = body.op("Range", body.scalar(0), body.op("Squeeze", count), body.scalar(1))
    everything = body.op("Equal", top_k, body.ints(0))
    kept = body.op("Or", everything, body.op("Less", rank, top_k))
    weights = body.op("Where", kept, weights, zero)
    weights = body.op("Div", weights, body.op("ReduceSum", weights, column, keepdims=1))
    reached = body.op("CumSum", weights, body.scalar(1), exclusive=1)  # by the more likely ones
    kept = body.op("Or", body.op("Less", reached, top_p), body.op("GreaterOrEqual", top_p, one))
    weights = body.op("Where", kept, weights, zero)

    by_id = body.op("ScatterElements", logits, ids, weights, axis=1)
    edges = body.op("CumSum", by_id, body.scalar(1))
    last = body.op("Slice", edges, body.ints(-1), body.ints(_END), column)
    passed = body.op("LessOrEqual", edges, body.op("Mul", uniform, last))
    drawn = body.op("ReduceSum", body.op("Cast", passed, to=Type.INT64), column, keepdims=1)
    before = body.op("Cast", body.op("Less", edges, last), to=Type.INT64)  # the last stretch, which ends at the sum
    drawn = body.op("Min", drawn, body.op("ReduceSum", before, column, keepdims=1))
    best = body.op("Slice", ids, body.ints(0), body.ints(1), column)
    tokens = body.op("Where", greedy, best, drawn)
    tokens.type = ir.TensorType(Type.INT64)
    return body.function("Sample", SHORT[signal], inputs, [tokens])
