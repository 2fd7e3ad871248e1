"""The project's fused operators as ONNX functions: what each of them computes, in standard operators.

A graph names the operators `HyenaMixer`, `HyenaStep`, `Linear` and `Sample` of domain "lhcompile" and carries these
functions.
Where the library of runtimes/ops is registered, its kernels are taken; anywhere else the runtime inlines the function.
So a function is the operator's specification, its fallback, and what the kernels are tested against.

An operator has one kernel and one function for each form it is used in (types, which inputs are there, one token or
any number): a function's `overload` names the form. `call` makes the node. Signals are [batch, time, channels],
arithmetic is float32 between inputs and outputs of any type, and tables are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import onnx_ir as ir

from lhcompile.lower.body import DOMAIN, FLOAT, Body, Type
from lhcompile.ssm import partners

__all__ = ["call", "linear_function", "mixer_function", "sample_function"]

DOUBLE = Type.DOUBLE
Norm = Literal["none", "layer", "rms"]
Activation = Literal["none", "gelu", "gelu_tanh"]
Projection = Literal["Linear", "LinearFp8", "LinearInt4"]
_END = 2**63 - 1
_BLOCK, _BYTES = 32, 4
"""Inputs that share a scale of 4-bit codes; accuracy_level of MatMulNBits for products of bytes."""
_LARGEST, _SMALLEST = 448.0, 1e-30
"""The largest number of float8 e4m3; a row of a signal that is taken for zero."""
_SHORT = {Type.FLOAT: "f32", Type.FLOAT16: "f16", Type.BFLOAT16: "bf16"}


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
    gate, u = _gated(body, body.op("Add", mixed, offset) if bias else mixed, block, outer)

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
    form = f"k{taps}n{order}b{block}o{outer}" + _flags(bias=bias, complex=complex_poles, packed=packed)
    types = "_".join(_SHORT[t] for t in (signal, conv_state, recurrent_state))
    overload = f"{form}_{types}{_flags(step=one_token)}"
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


def _gated(body: Body, mixed: ir.Value, block: int, outer: int) -> tuple[ir.Value, ir.Value]:
    """[batch, time, 3D] → the part that gates what is heard, and the product of the others, [batch, time, D] each"""
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


def linear_function(
    *,
    norm: Norm = "none",
    activation: Activation = "none",
    epsilon: float = 1e-5,
    bias: bool = True,
    residual: bool = False,
    norm_bias: bool = False,
    one_token: bool = False,
    signal: Type = FLOAT,
    bias_type: Type | None = None,
    name: Projection = "Linear",
    byte_signals: bool = False,
    block_product: tuple[int, int] | None = None,
) -> ir.Function:
    """Linear: a projection with its neighbours, y = residual + activation(norm(x) Wᵀ + bias).

    norm "layer" is (x − mean) / √(variance + epsilon) ∘ scale (+ norm_bias), "rms" is x / √(mean x² + epsilon) ∘ scale;
    activation "gelu" is the one with erf, "gelu_tanh" the one with tanh.

    Inputs: x [batch, time, K]; weight [N, K] of x's type; bias [N] of `bias_type` (x's type if None), optional;
    residual [batch, time, N] of x's type, optional; norm_scale float [K], with a norm; norm_bias float [K], optional.
    Output: y [batch, time, N]. What enters the product is rounded to x's type, its sum is float32, and everything
    behind it is float32.

    LinearFp8 has its product in 8 bits, (q Wᵀ) ∘ a ∘ weight_scale for q = round(norm(x) / a), a = max |norm(x)| / 448
    for each row, so that no token depends on others in the call. weight and q are float8 e4m3; behind the other inputs
    there is weight_scale float [N].

    LinearInt4 has its weight in 4 bits, W = (code − 8) ∘ weight_scale in float32, rounded to x's type where that is of
    16 bits; from there on it is Linear. weight is uint8 [N, K / 32, 16], two codes a byte, the even input in the lower
    half; weight_scale float16 [N, K / 32] is behind the other inputs. K is a multiple of 32.

    byte_signals: of a LinearInt4 of float32. Its accuracy_level is 4 then, as that of MatMulNBits, and what enters the
    product is rounded to 8 bits: norm(x) becomes round(norm(x) / a) a for a = max |norm(x)| / 127 of each block.
    block_product: (N, K), with byte_signals: the product is com.microsoft MatMulNBits, a fallback that is fast on a CPU
    and rounds nearly so, but no specification.
    """
    names = "x weight bias residual norm_scale norm_bias" + " weight_scale" * (name != "Linear")
    inputs = [ir.Value(name=each) for each in names.split()]
    x, weight, offset, carried, scale, shift = inputs[:6]
    fp8 = name == "LinearFp8"
    body = Body()
    x = body.cast(x, signal) if fp8 or norm != "none" else x
    if norm != "none":
        x = _normed(body, x, scale, shift if norm_bias else None, norm, epsilon)
        x = x if fp8 else body.back(x, signal)
    if block_product:
        y = _product_blocks(body, x, weight, inputs[6], *block_product)
    else:
        rows = body.op("Squeeze", x, body.ints(1)) if one_token else body.op("Flatten", x, axis=2)
        rows = _in_bytes(body, rows) if byte_signals else rows
        y = _product(body, rows, weight, inputs[6] if name != "Linear" else None, name, signal)
    if bias:
        y = body.op("Add", y, body.cast(offset, bias_type or signal))
    if activation != "none":
        y = body.op("Gelu", y, approximate="tanh" if activation == "gelu_tanh" else "none")
    y = y if block_product else _in_time(body, y, inputs[0], one_token)
    if residual:
        y = body.op("Add", y, body.cast(carried, signal))
    form = f"{norm}_{activation}" + _flags(bias=bias, residual=residual, shift=norm_bias)
    form += f"_{_SHORT[signal]}" + ("" if bias_type in (None, signal) else f"_{_SHORT[bias_type]}")
    if norm != "none":
        form += f"_{epsilon:g}"
    if block_product:
        form += "_blocks_{}x{}".format(*block_product)
    form += _flags(bytes=byte_signals, step=one_token)
    attributes: dict[str, int | float | str] = {"norm": norm, "activation": activation, "epsilon": epsilon}
    if name == "LinearInt4":
        attributes["accuracy_level"] = _BYTES if byte_signals else 0
    return body.function(name, form, inputs, [body.back(y, signal)], **attributes)


def _in_time(body: Body, y: ir.Value, like: ir.Value, one_token: bool) -> ir.Value:
    """[batch · time, N] → [batch, time, N], with the batch and time of `like`"""
    if one_token:
        return body.op("Unsqueeze", y, body.ints(1))
    return body.op("Reshape", y, body.op("Concat", body.op("Shape", like, start=0, end=2), body.ints(-1), axis=0))


def _product(
    body: Body, rows: ir.Value, weight: ir.Value, unit: ir.Value | None, name: Projection, signal: Type
) -> ir.Value:
    """rows [batch · time, K] and the weight as the operator has it, with its scale → float32 [batch · time, N]"""
    if unit is not None and name == "LinearFp8":
        return _product_fp8(body, rows, weight, unit)
    if unit is not None:
        weight = _weight_int4(body, weight, unit, signal)
    if signal == Type.BFLOAT16:  # processors have no product of these
        return body.op("Gemm", body.cast(rows, signal), body.cast(weight, signal), transB=1)
    return body.cast(body.op("Gemm", rows, weight, transB=1), signal)


def _in_bytes(body: Body, rows: ir.Value) -> ir.Value:
    """rows float32 [batch · time, K], rounded to 8 bits block by block"""
    blocks = body.op("Reshape", rows, body.ints(0, -1, _BLOCK))
    largest = body.op("ReduceMax", body.op("Abs", blocks), body.ints(-1), keepdims=1)
    unit = body.op("Div", body.op("Max", largest, body.scalar(_SMALLEST, FLOAT)), body.scalar(127.0, FLOAT))
    codes = body.op("Round", body.op("Div", blocks, unit))
    return body.op("Reshape", body.op("Mul", codes, unit), body.ints(0, -1))


def _product_fp8(body: Body, rows: ir.Value, weight: ir.Value, unit: ir.Value) -> ir.Value:
    """rows float32 [batch · time, K], weight float8 [N, K], unit [N] → float32 [batch · time, N]"""
    largest = body.op("ReduceMax", body.op("Abs", rows), body.ints(-1), keepdims=1)
    own = body.op("Div", body.op("Max", largest, body.scalar(_SMALLEST, FLOAT)), body.scalar(_LARGEST, FLOAT))
    codes = body.op("Cast", body.op("Div", rows, own), to=Type.FLOAT8E4M3FN)
    y = body.op("Gemm", body.op("Cast", codes, to=FLOAT), body.op("Cast", weight, to=FLOAT), transB=1)
    return body.op("Mul", body.op("Mul", y, own), unit)


def _product_blocks(
    body: Body, x: ir.Value, weight: ir.Value, unit: ir.Value, outputs: int, inputs: int
) -> ir.Value:
    """x float32 [batch, time, inputs], weight and unit as LinearInt4 has them → [batch, time, outputs]"""
    sizes = {"N": outputs, "K": inputs, "bits": 4, "block_size": _BLOCK, "accuracy_level": _BYTES}
    return body.op("com.microsoft::MatMulNBits", x, weight, body.cast(unit, Type.FLOAT16), **sizes)


def _weight_int4(body: Body, codes: ir.Value, scale: ir.Value, signal: Type) -> ir.Value:
    """uint8 [N, K / 32, 16] and float16 [N, K / 32] → the weight [N, K] of the signal's type"""
    lower = body.op("BitwiseAnd", codes, body.scalar(15, Type.UINT8))
    upper = body.op("BitShift", codes, body.scalar(4, Type.UINT8), direction="RIGHT")
    pairs = body.op("Concat", *(body.op("Unsqueeze", each, body.ints(-1)) for each in (lower, upper)), axis=-1)
    codes = body.op("Cast", body.op("Reshape", pairs, body.ints(0, 0, -1)), to=FLOAT)
    unit = body.op("Unsqueeze", body.cast(scale, Type.FLOAT16), body.ints(-1))
    weight = body.op("Mul", body.op("Sub", codes, body.scalar(8.0, FLOAT)), unit)
    return body.back(body.op("Reshape", weight, body.ints(0, -1)), signal)


def _normed(
    body: Body, x: ir.Value, scale: ir.Value, shift: ir.Value | None, norm: Norm, epsilon: float
) -> ir.Value:
    """Normalized over the last axis, in float32."""
    if norm == "layer":
        return body.op("LayerNormalization", x, scale, *([shift] if shift else []), axis=-1, epsilon=epsilon)
    square = body.op("ReduceMean", body.op("Mul", x, x), body.ints(-1), keepdims=1)
    root = body.op("Sqrt", body.op("Add", square, body.scalar(epsilon, FLOAT)))
    x = body.op("Mul", body.op("Div", x, root), scale)
    return x if shift is None else body.op("Add", x, shift)


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
    possible = body.op("Cast", body.op("Greater", by_id, zero), to=Type.INT32)
    drawn = body.op("Min", drawn, body.op("ArgMax", possible, axis=1, select_last_index=1))
    best = body.op("Slice", ids, body.ints(0), body.ints(1), column)
    tokens = body.op("Where", greedy, best, drawn)
    tokens.type = ir.TensorType(Type.INT64)
    return body.function("Sample", _SHORT[signal], inputs, [tokens])


def _flags(**flags: bool) -> str:
    return "".join(f"_{name}" for name, there in flags.items() if there)
