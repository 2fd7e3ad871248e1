"""Projections with their neighbours as ONNX functions: `Linear` in several types of weights, and `MlpFp8` of two; and
`Embedding`, whose table is the head's weight where they are tied.

What functions are here, see `lower.functions`.
"""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from lhcompile.lower.body import FLOAT, SHORT, Body, Type, flags

__all__ = ["Activation", "Norm", "Projection", "embedding_function", "linear_function", "mlp_function"]

Norm = Literal["none", "layer", "rms"]
Activation = Literal["none", "gelu", "gelu_tanh"]
Projection = Literal["Linear", "LinearFp8", "LinearInt4"]
_BLOCK, _BYTES = 32, 4
"""Inputs that share a scale of 4-bit codes; accuracy_level of MatMulNBits for products of bytes."""
_LARGEST, _SMALLEST = 448.0, 1e-30
"""The largest number of float8 e4m3; a row of a signal that is taken for zero."""


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
    within = False  # whether the product adds the bias
    if block_product:
        y = _product_blocks(body, x, weight, inputs[6], *block_product)
    else:
        rows = body.op("Squeeze", x, body.ints(1)) if one_token else body.op("Flatten", x, axis=2)
        rows = _in_bytes(body, rows) if byte_signals else rows
        within = bias and name == "Linear" and signal == FLOAT and bias_type in (None, FLOAT)
        scales = inputs[6] if name != "Linear" else None
        y = _product(body, rows, weight, scales, name, signal, offset if within else None)
    if bias and not within:
        y = body.op("Add", y, body.cast(offset, bias_type or signal))
    y = _activated(body, y, activation)
    y = y if block_product else _in_time(body, y, inputs[0], one_token)
    if residual:
        y = body.op("Add", y, body.cast(carried, signal))
    form = f"{norm}_{activation}" + flags(bias=bias, residual=residual, shift=norm_bias)
    form += f"_{SHORT[signal]}" + ("" if bias_type in (None, signal) else f"_{SHORT[bias_type]}")
    if norm != "none":
        form += f"_{epsilon:g}"
    if block_product:
        form += "_blocks_{}x{}".format(*block_product)
    form += flags(bytes=byte_signals, step=one_token)
    attributes: dict[str, int | float | str] = {"norm": norm, "activation": activation, "epsilon": epsilon}
    if name == "LinearInt4":
        attributes["accuracy_level"] = _BYTES if byte_signals else 0
    return body.function(name, form, inputs, [body.back(y, signal)], **attributes)


def mlp_function(
    *,
    norm: Norm = "none",
    activation: Activation = "none",
    epsilon: float = 1e-5,
    up_bias: bool = True,
    down_bias: bool = True,
    residual: bool = False,
    norm_bias: bool = False,
    one_token: bool = False,
    signal: Type = FLOAT,
    bias_type: Type | None = None,
) -> ir.Function:
    """MlpFp8: two projections in 8 bits, the second of what the first gives, which never is in more.

        z = norm(x);  h = activation(z W₁ᵀ + b₁);  y = residual + h W₂ᵀ + b₂

    Both products are those of LinearFp8, and z is rounded as there. h is rounded before all of its row is known, and so
    by what none of its numbers exceeds: |z wᵀ + b| ≤ ‖z‖ max ‖w‖ + max |b| over rows w of W₁ and numbers b of b₁, by
    Cauchy and Schwarz, and no activation makes a number larger. With c = (‖z‖ reach₀ + reach₁) / 448 it enters the
    second product as c round(h / c). No token depends on others, and none of its numbers is cut off. Float8 has its
    full precision down to 1 / 28672 of the bound: one that is 100 times too large costs nothing, 1000 times doubles the
    error of rounding.

    Inputs: x [batch, time, K]; up_weight float8 e4m3 [H, K]; up_bias [H] of `bias_type` (x's type if None), optional;
    down_weight float8 e4m3 [N, H]; down_bias [N] likewise; residual [batch, time, N] of x's type, optional;
    norm_scale float [K], with a norm; norm_bias float [K], optional; up_scale float [H]; down_scale float [N];
    reach float [2]: the largest norm of a row of W₁, with what rounding adds to that of z, and the largest of |b₁|.
    Output: y [batch, time, N] of x's type. Arithmetic is float32.
    """
    names = "x up_weight up_bias down_weight down_bias residual norm_scale norm_bias up_scale down_scale reach"
    inputs = [ir.Value(name=each) for each in names.split()]
    x, up, up_offset, down, down_offset, carried, scale, shift, up_unit, down_unit, reach = inputs
    body = Body()
    z = body.cast(x, signal)
    if norm != "none":
        z = _normed(body, z, scale, shift if norm_bias else None, norm, epsilon)
    rows = body.op("Squeeze", z, body.ints(1)) if one_token else body.op("Flatten", z, axis=2)
    h = _product_fp8(body, rows, up, up_unit)
    if up_bias:
        h = body.op("Add", h, body.cast(up_offset, bias_type or signal))
    h = _activated(body, h, activation)
    length = body.op("ReduceL2", rows, body.ints(-1), keepdims=1)
    slope, least = (body.op("Gather", reach, body.ints(place), axis=0) for place in (0, 1))
    bound = body.op("Max", body.op("Add", body.op("Mul", length, slope), least), body.scalar(_SMALLEST, FLOAT))
    y = _product_coded(body, h, body.op("Div", bound, body.scalar(_LARGEST, FLOAT)), down, down_unit)
    if down_bias:
        y = body.op("Add", y, body.cast(down_offset, bias_type or signal))
    y = _in_time(body, y, x, one_token)
    if residual:
        y = body.op("Add", y, body.cast(carried, signal))
    form = f"{norm}_{activation}" + flags(up=up_bias, down=down_bias, residual=residual, shift=norm_bias)
    form += f"_{SHORT[signal]}" + ("" if bias_type in (None, signal) else f"_{SHORT[bias_type]}")
    form += (f"_{epsilon:g}" if norm != "none" else "") + flags(step=one_token)
    attributes: dict[str, int | float | str] = {"norm": norm, "activation": activation, "epsilon": epsilon}
    return body.function("MlpFp8", form, inputs, [body.back(y, signal)], **attributes)


def embedding_function(*, signal: Type = FLOAT, int4: bool = False) -> ir.Function:
    """Embedding: the rows of a table that tokens stand for.

    Inputs: table [entries, D]; tokens int64 [batch, time], from −entries on, negative ones counted from the end.
    Output: x [batch, time, D] of the table's type. Where a token is not in the table a processor raises an error, and
    the kernel of a GPU writes zeros.

    EmbeddingInt4 has a table as LinearInt4 has its weight, uint8 [entries, D / 32, 16], and behind the tokens scale
    float16 [entries, D / 32]: its entries are (code − 8) ∘ scale, rounded to float16, which x is.
    """
    table, tokens, scale = (ir.Value(name=name) for name in ("table", "tokens", "scale"))
    body = Body()
    if not int4:
        x = body.op("Gather", table, tokens, axis=0)
        x.type = ir.TensorType(signal)
        return body.function("Embedding", SHORT[signal], [table, tokens], [x])
    codes = body.op("Cast", body.op("Gather", table, tokens, axis=0), to=FLOAT)
    upper = body.op("Floor", body.op("Mul", codes, body.scalar(1 / 16, FLOAT)))  # a GPU has no shift of integers
    lower = body.op("Sub", codes, body.op("Mul", upper, body.scalar(16.0, FLOAT)))
    pairs = body.op("Concat", *(body.op("Unsqueeze", each, body.ints(-1)) for each in (lower, upper)), axis=-1)
    codes = body.op("Sub", body.op("Reshape", pairs, body.ints(0, 0, 0, -1)), body.scalar(8.0, FLOAT))
    unit = body.cast(body.op("Gather", scale, tokens, axis=0), Type.FLOAT16)
    entries = body.op("Mul", codes, body.op("Unsqueeze", unit, body.ints(-1)))
    x = body.back(body.op("Reshape", entries, body.ints(0, 0, -1)), Type.FLOAT16)
    x.type = ir.TensorType(Type.FLOAT16)
    return body.function("EmbeddingInt4", SHORT[Type.FLOAT16], [table, tokens, scale], [x])


def _in_time(body: Body, y: ir.Value, like: ir.Value, one_token: bool) -> ir.Value:
    """[batch · time, N] → [batch, time, N], with the batch and time of `like`"""
    if one_token:
        return body.op("Unsqueeze", y, body.ints(1))
    return body.op("Reshape", y, body.op("Concat", body.op("Shape", like, start=0, end=2), body.ints(-1), axis=0))


def _product(
    body: Body, rows: ir.Value, weight: ir.Value, unit: ir.Value | None, name: Projection, signal: Type,
    bias: ir.Value | None = None,
) -> ir.Value:  # fmt: skip
    """rows [batch · time, K] and the weight as the operator has it, with its scale → float32 [batch · time, N]"""
    if unit is not None and name == "LinearFp8":
        return _product_fp8(body, rows, weight, unit)
    if unit is not None:
        weight = _weight_int4(body, weight, unit, signal)
    if signal == Type.BFLOAT16:  # processors have no product of these
        return body.op("Gemm", body.cast(rows, signal), body.cast(weight, signal), transB=1)
    return body.cast(body.op("Gemm", rows, weight, *([bias] if bias else []), transB=1), signal)


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
    return _product_coded(body, rows, own, weight, unit)


def _product_coded(body: Body, rows: ir.Value, own: ir.Value, weight: ir.Value, unit: ir.Value) -> ir.Value:
    """The same for rows whose units are `own`, [batch · time, 1]; what they cannot hold stops at the largest code."""
    codes = body.op("Cast", body.op("Div", rows, own), to=Type.FLOAT8E4M3FN)
    y = body.op("Gemm", body.op("Cast", codes, to=FLOAT), body.op("Cast", weight, to=FLOAT), transB=1)
    return body.op("Mul", body.op("Mul", y, own), unit)


def _activated(body: Body, y: ir.Value, activation: Activation) -> ir.Value:
    if activation == "none":
        return y
    return body.op("Gelu", y, approximate="tanh" if activation == "gelu_tanh" else "none")


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
