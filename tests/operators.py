"""The fused operators one at a time: random cases, the model of one node, and what it gives in double precision."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from lhruntime.sampling import Sampler
from torch import Tensor

from lhcompile.artifacts import LARGEST_HALF
from lhcompile.lower.body import DOMAIN, OPSET, VERSION
from lhcompile.lower.functions import call, mixer_function, sample_function
from lhcompile.lower.projections import (
    Activation,
    Norm,
    Projection,
    embedding_function,
    linear_function,
    mlp_function,
)
from lhcompile.ssm import swap

__all__ = ["FORMS", "LOUD", "Call", "Embedding", "Linear", "Mixer", "Mlp", "Sample", "error", "kept_error", "run"]

Type = ir.DataType
TORCH = {
    Type.FLOAT: torch.float32,
    Type.FLOAT16: torch.float16,
    Type.BFLOAT16: torch.bfloat16,
    Type.INT64: torch.int64,
    Type.INT32: torch.int32,
    Type.FLOAT8E4M3FN: torch.float8_e4m3fn,
    Type.UINT8: torch.uint8,
}
ONNX = {value: key for key, value in TORCH.items()}
ON_GPU = os.environ.get("LHCOMPILE_DEVICE") == "cuda"  # which has to have onnxruntime-gpu
_PROVIDERS: list[Any] = ["CPUExecutionProvider"]
if ON_GPU:
    _PROVIDERS.insert(0, ("CUDAExecutionProvider", {"use_tf32": "0"}))
    onnxruntime.preload_dlls()


@dataclass(frozen=True)
class Call:
    """One operator and its inputs, None where an optional one is not there.

    fed: which inputs are given at run time, with all their sizes dynamic; the others are weights of the model
    """

    function: ir.Function
    inputs: tuple[Tensor | None, ...]
    fed: tuple[int, ...]

    def model(self) -> bytes:
        given: list[ir.Value | None] = []
        for place, tensor in enumerate(self.inputs):
            given.append(None if tensor is None else self._value(place, tensor))
        node = call(self.function, given)
        state = {"HyenaMixer": self.inputs[2:3], "HyenaStep": self.inputs[1:2]}.get(node.op_type, ())
        ranks = [2] if node.op_type == "Sample" else [3] * len(node.outputs)
        if state and state[0] is not None:
            ranks[-1] = state[0].ndim
        for index, (value, rank) in enumerate(zip(node.outputs, ranks, strict=True)):
            value.name, value.shape = f"output{index}", ir.Shape([None] * rank)
        graph = ir.Graph(
            [value for place in self.fed if (value := given[place]) is not None],
            node.outputs,
            nodes=[node],
            initializers=[value for value in given if value is not None and value.const_value is not None],
            opset_imports={"": OPSET, DOMAIN: VERSION},
            name="one",
        )
        model = ir.Model(graph, ir_version=10, functions=[self.function])
        return ir.to_proto(model).SerializeToString()

    def feeds(self) -> dict[str, onnxruntime.OrtValue]:
        return {
            self._name(place): _to_ort(tensor) for place in self.fed if (tensor := self.inputs[place]) is not None
        }

    def _name(self, place: int) -> str:
        return str(self.function.inputs[place].name)

    def _value(self, place: int, tensor: Tensor) -> ir.Value:
        name, kind = self._name(place), ONNX[tensor.dtype]
        value = ir.Value(name=name, type=ir.TensorType(kind))
        if place in self.fed:
            value.shape = ir.Shape([f"{name}.{axis}" for axis in range(tensor.ndim)])
        else:
            value.shape = ir.Shape(tensor.shape)
            value.const_value = ir.tensor(_bits(tensor).view(kind.numpy()), kind, name=name)
        return value


def run(one: Call, library: Path | None = None, threads: int = 1) -> list[Tensor]:
    """The outputs: of the function, or of the kernel in `library`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(one.model(), options, providers=_PROVIDERS)
    names = [value.name for value in session.get_outputs()]
    return [_from_ort(value) for value in session.run_with_ort_values(names, one.feeds())]


def error(given: Tensor, wanted: Tensor) -> float:
    """‖given − wanted‖ / ‖wanted‖; infinite where something is not finite."""
    assert given.shape == wanted.shape
    distance = (given.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)
    return float(distance) if torch.isfinite(given.double()).all() else float("inf")


def kept_error(given: Tensor, wanted: Tensor) -> float:
    """As `error`, of numbers that are NaN in the same places."""
    assert torch.equal(given.isnan(), wanted.isnan())
    return error(given.where(~given.isnan(), 0), wanted.where(~wanted.isnan(), 0))


EDGES = torch.tensor([1.0, 65504, 65519, 65520, 1e5, float("inf"), float("nan")])
"""Numbers at and beyond the largest of float16."""


@dataclass(frozen=True)
class Mixer:
    """A random HyenaMixer; HyenaStep with `apart`

    packed: every channel has an order of its own, none included; loud: states leave what float16 holds, and some are
    NaN
    """

    batch: int = 2
    time: int = 1
    channels: int = 24
    taps: int = 3
    order: int = 4
    block: int = 24
    outer: int = 0
    complex_poles: bool = True
    bias: bool = True
    packed: bool = False
    one_token: bool = False
    apart: bool = False
    signal: Type = Type.FLOAT
    conv_state: Type = Type.FLOAT
    recurrent_state: Type = Type.FLOAT
    loud: bool = False
    seed: int = 0

    def call(self) -> Call:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        wide, half = 3 * self.channels, self.order // 2
        own = 0.9 * torch.rand(self.order, self.channels, generator=generator)
        other = None
        if self.complex_poles:
            other = 0.4 * random(half, self.channels).clamp(-1, 1)
            other = torch.cat([-other, other, torch.zeros(self.order % 2, self.channels)])
        readout = random(self.order, self.channels)
        index, state = None, random(self.batch, self.order, self.channels)
        if self.packed:
            there = torch.rand(max(half, 1), self.channels, generator=generator) < 0.7
            there[:, 0], there[0, 1] = False, True  # a channel without any state, and one that has
            there = torch.cat([there, there, torch.ones(1, self.channels, dtype=torch.bool)])[: self.order]
            own, readout = own * there, readout * there
            other = None if other is None else other * there
            count = int(there.sum())
            index = torch.full((self.order, self.channels), -1, dtype=torch.int32)
            index[there] = torch.randperm(count, generator=generator).to(torch.int32)
            state = random(self.batch, 1, count)
        signal, conv, recurrent = (TORCH[t] for t in (self.signal, self.conv_state, self.recurrent_state))
        projected = random(self.batch, self.time, wide)
        if self.loud:
            projected *= 300
            projected[:, -1, : len(EDGES)], projected[:, -1, -len(EDGES) :] = EDGES, -EDGES
            state.view(-1)[-1] = float("nan")
        inputs = (
            projected.to(signal),
            random(self.batch, self.taps - 1, wide).to(signal).to(conv),
            state.to(recurrent),
            random(self.taps, wide),
            random(wide) if self.bias else None,
            own,
            other,
            readout,
            random(self.channels),
            index,
        )
        function = mixer_function(
            taps=self.taps,
            order=self.order,
            block=self.block,
            outer=self.outer,
            complex_poles=self.complex_poles,
            bias=self.bias,
            packed=self.packed,
            one_token=self.one_token,
            apart=self.apart,
            whole=self.block == self.channels,
            signal=self.signal,
            conv_state=self.conv_state,
            recurrent_state=self.recurrent_state,
        )
        if self.apart:
            past = [token.contiguous() for token in inputs[1].split(1, dim=1)]
            return Call(function, (inputs[0], *inputs[2:], *past), fed=(0, 1, *range(9, 8 + self.taps)))
        return Call(function, inputs, fed=(0, 1, 2))

    def expected(self) -> list[Tensor]:
        """In double precision, one token after the other."""
        projected, before, state, weight, bias, own, other, readout, direct, index = (
            x.double() if x is not None and x.is_floating_point() else x
            for x in replace(self, apart=False).call().inputs
        )
        window = torch.cat([before, projected], 1)
        mixed = sum(window[:, lag : lag + self.time] * weight[lag] for lag in range(self.taps))
        mixed = mixed if bias is None else mixed + bias
        c = torch.arange(self.channels)
        places = c // self.block * 3 * self.block + c % self.block
        parts = [mixed[..., places + i * self.block] for i in range(3)]
        gate = parts.pop(self.outer)
        u = parts[0] * parts[1]
        full = state
        if index is not None:
            full = state.flatten(1)[:, index.clamp(min=0)] * (index >= 0)
        y = []
        for t in range(self.time):
            full = own * full + (0 if other is None else other * swap(full, 1)) + u[:, t, None]
            y.append((readout * full).sum(1) + direct * u[:, t])
        if index is not None:
            packed = torch.zeros_like(state).flatten(1)
            packed[:, index[index >= 0]] = full[:, index >= 0]
            full = packed.view_as(state)
        after = _stopped(window[:, self.time :], self.conv_state)
        kept = [] if self.apart else [after]
        return [torch.stack(y, 1) * gate, *kept, _stopped(full, self.recurrent_state)]


@dataclass(frozen=True)
class Linear:
    """A random projection of K = width inputs and N = out outputs; of LinearInt4 the width is a multiple of 32"""

    batch: int = 2
    time: int = 3
    width: int = 40
    out: int = 24
    norm: Norm = "none"
    activation: Activation = "none"
    epsilon: float = 1e-5
    bias: bool = True
    residual: bool = False
    norm_bias: bool = False
    one_token: bool = False
    signal: Type = Type.FLOAT
    bias_type: Type | None = None
    name: Projection = "Linear"
    bytes: bool = False  # whether the signal of LinearInt4 is rounded to 8 bits
    blocks: bool = False  # whether its product is onnxruntime's
    seed: int = 0

    def call(self) -> Call:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        kind = TORCH[self.signal]
        inputs = (
            (random(self.batch, self.time, self.width) + 0.3).to(kind),
            (random(self.out, self.width) / self.width**0.5).to(kind),
            random(self.out).to(TORCH[self.bias_type or self.signal]) if self.bias else None,
            random(self.batch, self.time, self.out).to(kind) if self.residual else None,
            1 + 0.2 * random(self.width) if self.norm != "none" else None,
            random(self.width) if self.norm_bias else None,
        )
        if self.name == "LinearFp8":
            weight, unit = _eight(random(self.out, self.width) / self.width**0.5)
            inputs = (inputs[0], weight, *inputs[2:], unit.squeeze(1))
        if self.name == "LinearInt4":
            shape = self.out, self.width // 32
            codes = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            inputs = (inputs[0], codes, *inputs[2:], (0.2 * random(*shape) / self.width**0.5).half())
        function = linear_function(
            name=self.name,
            norm=self.norm,
            activation=self.activation,
            epsilon=self.epsilon,
            bias=self.bias,
            residual=self.residual,
            norm_bias=self.norm_bias,
            one_token=self.one_token,
            signal=self.signal,
            bias_type=self.bias_type,
            byte_signals=self.bytes,
            block_product=(self.out, self.width) if self.blocks else None,
        )
        return Call(function, inputs, fed=(0, 3))

    def expected(self) -> list[Tensor]:
        inputs = [None if v is None else v.double() for v in self.call().inputs]
        x, weight, bias, residual, scale, shift, *rest = inputs
        assert x is not None
        assert weight is not None
        x = _normalized(x, self, scale, shift)
        if self.name == "LinearInt4":
            codes = torch.stack([weight % 16, weight // 16], -1).flatten(2)
            weight = ((codes - 8) * rest[0][..., None]).flatten(1).to(TORCH[self.signal]).double()
            if self.bytes:
                blocks = x.unflatten(-1, (-1, 32))
                unit = blocks.abs().amax(-1, keepdim=True) / 127
                x = (torch.round(blocks / unit) * unit).flatten(-2)
        if self.name == "LinearFp8":
            codes, unit = _eight(x)
            x, weight = codes.double() * unit, weight * rest[0][:, None]
        y = torch.nn.functional.linear(x, weight, bias)
        if self.activation != "none":
            y = torch.nn.functional.gelu(y, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return [y if residual is None else y + residual]


@dataclass(frozen=True)
class Mlp:
    """A random MlpFp8 of K = width inputs, H = hidden numbers between its products, and N = out outputs"""

    batch: int = 2
    time: int = 3
    width: int = 64
    hidden: int = 96
    out: int = 48
    norm: Norm = "layer"
    activation: Activation = "gelu_tanh"
    epsilon: float = 1e-5
    up_bias: bool = True
    down_bias: bool = True
    residual: bool = True
    norm_bias: bool = False
    one_token: bool = False
    signal: Type = Type.FLOAT
    bias_type: Type | None = None
    seed: int = 0

    def call(self) -> Call:
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        kind, offset = TORCH[self.signal], TORCH[self.bias_type or self.signal]
        up, up_unit = _eight(random(self.hidden, self.width) / self.width**0.5)
        down, down_unit = _eight(random(self.out, self.hidden) / self.hidden**0.5)
        up_bias = random(self.hidden).to(offset) if self.up_bias else None
        lengths = (up.float() * up_unit).norm(dim=1)
        inputs = (
            (random(self.batch, self.time, self.width) + 0.3).to(kind),
            up,
            up_bias,
            down,
            random(self.out).to(offset) if self.down_bias else None,
            random(self.batch, self.time, self.out).to(kind) if self.residual else None,
            1 + 0.2 * random(self.width) if self.norm != "none" else None,
            random(self.width) if self.norm_bias else None,
            up_unit.squeeze(1),
            down_unit.squeeze(1),
            torch.stack([lengths.max(), torch.zeros(()) if up_bias is None else up_bias.float().abs().max()]),
        )
        function = mlp_function(
            norm=self.norm,
            activation=self.activation,
            epsilon=self.epsilon,
            up_bias=self.up_bias,
            down_bias=self.down_bias,
            residual=self.residual,
            norm_bias=self.norm_bias,
            one_token=self.one_token,
            signal=self.signal,
            bias_type=self.bias_type,
        )
        return Call(function, inputs, fed=(0, 5))

    def expected(self) -> list[Tensor]:
        inputs = [None if v is None else v.double() for v in self.call().inputs]
        x, up, up_bias, down, down_bias, residual, scale, shift, up_unit, down_unit, reach = inputs
        z = _normalized(x, self, scale, shift)
        codes, unit = _eight(z)
        h = torch.nn.functional.linear(codes.double() * unit, up * up_unit[:, None], up_bias)
        if self.activation != "none":
            h = torch.nn.functional.gelu(h, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        c = (z.norm(dim=-1, keepdim=True) * reach[0] + reach[1]).clamp(min=1e-30) / 448
        assert ((h / c).abs() <= 448).all()
        h = (h.float() / c.float()).to(torch.float8_e4m3fn).double() * c
        y = torch.nn.functional.linear(h, down * down_unit[:, None], down_bias)
        return [y if residual is None else y + residual]


def _normalized(x: Tensor, of: Linear | Mlp, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    if of.norm == "layer":
        return torch.nn.functional.layer_norm(x, [of.width], scale, shift, of.epsilon)
    if of.norm == "none":
        return x
    assert scale is not None
    x = x / (x.square().mean(-1, keepdim=True) + of.epsilon).sqrt() * scale
    return x if shift is None else x + shift


LOUD = {
    "states": Mixer(loud=True),
    "odd order": Mixer(loud=True, order=5, batch=3),
    "real": Mixer(loud=True, complex_poles=False, taps=4, outer=1),
    "packed": Mixer(loud=True, packed=True, order=5),
    "interleaved": Mixer(loud=True, block=1, outer=2, channels=200),
    "many channels": Mixer(loud=True, channels=130, block=130, taps=2),
    "many rows": Mixer(loud=True, batch=70, channels=256, block=256),
}
"""Mixers whose states stop at the largest number of float16, once they are of it."""

FORMS = {
    "plain": Linear(),
    "no bias": Linear(bias=False),
    "layer": Linear(norm="layer", norm_bias=True),
    "layer without bias": Linear(norm="layer", activation="gelu", epsilon=1e-2),
    "rms": Linear(norm="rms", activation="gelu_tanh", bias=False),
    "rms with bias": Linear(norm="rms", norm_bias=True, residual=True),
    "everything": Linear(norm="layer", norm_bias=True, activation="gelu", residual=True),
}
"""Linears of every form, small."""


@dataclass(frozen=True)
class Embedding:
    """Random tokens, every fourth counted from the end of the table, which has its first and last entry looked up."""

    batch: int = 5
    time: int = 3
    entries: int = 50
    width: int = 64
    signal: Type = Type.FLOAT
    int4: bool = False
    seed: int = 0

    def call(self) -> Call:
        generator = np.random.default_rng(self.seed)
        tokens = generator.integers(self.entries, size=(self.batch, self.time))
        tokens.ravel()[:2] = (0, self.entries - 1)[: tokens.size]
        tokens.ravel()[3::4] -= self.entries
        if self.int4:
            codes = generator.integers(256, size=(self.entries, self.width // 32, 16), dtype=np.uint8)
            scales = generator.standard_normal((self.entries, self.width // 32)).astype(np.float16)
            inputs = tuple(torch.from_numpy(x) for x in (codes, tokens, scales))
        else:
            table = torch.from_numpy(generator.standard_normal((self.entries, self.width))).to(TORCH[self.signal])
            inputs = (table, torch.from_numpy(tokens))
        return Call(embedding_function(signal=self.signal, int4=self.int4), inputs, fed=(1,))

    def expected(self) -> Tensor:
        """Exact."""
        table, tokens, *scales = (x for x in self.call().inputs if x is not None)
        rows = table[tokens.flatten() % self.entries]
        if self.int4:
            codes = torch.stack([rows & 15, rows >> 4], -1).flatten(2).double() - 8
            rows = (codes * scales[0][tokens.flatten() % self.entries, :, None].double()).flatten(1).half()
        return rows.reshape(self.batch, self.time, self.width)


@dataclass(frozen=True)
class Sample:
    """Random rows to draw from, each with settings of its own; logits are multiples of `step`, so some are equal."""

    batch: int = 48
    vocab: int = 100
    step: float = 0.0
    signal: Type = Type.FLOAT
    seed: int = 0

    def call(self) -> Call:
        generator = np.random.default_rng(self.seed)
        logits = 3 * generator.standard_normal((self.batch, 1, self.vocab))
        if self.step:
            logits = np.round(logits / self.step) * self.step
        inputs = (
            torch.from_numpy(logits).to(TORCH[self.signal]),
            torch.from_numpy(generator.random(self.batch, np.float32)),
            torch.from_numpy(generator.choice([0.0, 0.5, 1.0, 3.0], self.batch).astype(np.float32)),
            torch.from_numpy(generator.choice([0, 1, 5, 40, 10**6], self.batch)),
            torch.from_numpy(generator.choice([0.05, 0.5, 0.9, 1.0], self.batch).astype(np.float32)),
        )
        return Call(sample_function(signal=self.signal), inputs, fed=(0, 1, 2, 3, 4))

    def expected(self) -> list[Tensor]:
        """By the runtime's own sampler on the host."""
        logits, *settings = self.call().inputs
        tokens = []
        for row, uniform, *rest in zip(logits, *settings, strict=True):
            sampler = Sampler(*(value.item() for value in rest))
            tokens.append(sampler.choose(row.double().numpy(), [uniform.item()]))
        return [torch.from_numpy(np.stack(tokens))]


def _stopped(state: Tensor, kind: Type) -> Tensor:
    """No larger than float16 holds, where it is one."""
    return state.clamp(-LARGEST_HALF, LARGEST_HALF) if kind == Type.FLOAT16 else state


def _eight(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float8 e4m3, and what a 1 in each of them means."""
    unit = rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448
    return (rows.float() / unit.float()).to(torch.float8_e4m3fn), unit


def _bits(tensor: Tensor) -> np.ndarray:
    """The tensor as numpy; what numpy lacks, as the integers of its bits."""
    integers = {torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.int8}
    tensor = tensor.contiguous()
    return tensor.view(integers.get(tensor.dtype, tensor.dtype)).numpy()


def _to_ort(tensor: Tensor) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(_bits(tensor), ONNX[tensor.dtype])


def _from_ort(value: onnxruntime.OrtValue) -> Tensor:
    size = value.tensor_size_in_bytes()
    data = bytearray(ctypes.string_at(value.data_ptr(), size))
    kind = TORCH[Type(value.element_type())]
    return torch.frombuffer(data, dtype=kind).reshape(value.shape()) if size else torch.zeros(value.shape(), dtype=kind)
