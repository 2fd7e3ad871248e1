"""What a compiled model is held against in torch: one decoder, three mixers.

All share the block (norm, input projection, mixer, output projection, norm, MLP), the tied head and a greedy choice on
the device, so that they differ by the mixer alone:

Attention    keys and values of all the past in a cache of the context's size, the fastest of SDPA's backends
Convolution  Hyena as it was trained: the inputs of its convolutions are kept, a step multiplies all of them with taps
Recurrence   distilled Hyena as a loop in torch, complex poles, states in float32

A step is timed with the cache full to the context: `position` is the last one. Positions are not encoded, and the
Transformer's projections have no bias, except in the MLP: both are in its favour.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.decode_model import Shape, first_tokens
from bench.decode_timing import captured, is_full, seconds
from lhcompile.ssm import RealModal, partners, real_powers

__all__ = ["Attention", "Convolution", "Decoder", "Mixer", "Recurrence", "Weights"]

_BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
SEVERAL = 10


class Weights:
    """A model's matrices, random, and the vectors beside them. The embedding is the head too.

    embedding [vocabulary, width]; of each layer into [3 · width, width], out [width, width], up [inner, width],
    down [width, inner]
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        draw = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.empty(size, device=device, dtype=dtype).normal_(std=size[-1] ** -0.5, generator=draw)

        d, inner = shape.width, shape.inner
        self.shape, self.device, self.dtype = shape, device, dtype
        self.embedding = normal(shape.vocabulary, d)
        self.scale, self.shift = torch.ones(d, device=device, dtype=dtype), torch.zeros(d, device=device, dtype=dtype)
        self.up_bias = torch.zeros(inner, device=device, dtype=dtype)
        sizes = (3 * d, d), (d, d), (inner, d), (d, inner)
        self.layers = [tuple(normal(*size) for size in sizes) for _ in range(shape.layers)]

    @property
    def bytes(self) -> int:
        """Of the matrices."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer) + self.embedding.nbytes


class Mixer(Protocol):
    """What stands between the projections; holds the state of all layers.

    cache_bytes: held; traffic: bytes of state that a step reads and writes; operations: of a step, beside the matrices
    """

    cache_bytes: int
    traffic: int
    operations: int

    def mix(self, layer: int, projected: Tensor) -> Tensor:
        """[batch, 3 · width] → [batch, width]"""

    def settle(self) -> dict[str, Any]:
        """Tries the forms of its operator and keeps the fastest; what was chosen."""


class Attention:
    """Multi-head attention over a static cache [layers, 2, batch, heads, context, channels]."""

    def __init__(self, weights: Weights, batch: int, context: int) -> None:
        shape = weights.shape
        self.heads, self.position, self.backend = shape.heads, context - 1, SDPBackend.MATH
        size = (shape.layers, 2, batch, shape.heads, context, shape.width // shape.heads)
        self.cache = torch.empty(size, device=weights.device, dtype=weights.dtype).normal_()
        self.cache_bytes = self.cache.nbytes
        self.traffic = self.cache.nbytes
        self.operations = 4 * shape.layers * batch * context * shape.width

    def mix(self, layer: int, projected: Tensor) -> Tensor:
        batch = len(projected)
        new = projected.view(batch, 3, self.heads, -1)
        cache = self.cache[layer]
        cache[:, :, :, self.position] = new[:, 1:].transpose(0, 1)
        k, v = cache[..., : self.position + 1, :].unbind(0)
        with sdpa_kernel(self.backend):
            return F.scaled_dot_product_attention(new[:, 0].unsqueeze(2), k, v).reshape(batch, -1)

    def settle(self) -> dict[str, Any]:
        _, _, batch, heads, _, channels = self.cache.shape
        projected = self.cache.new_zeros(batch, 3 * heads * channels)
        cuda = self.cache.is_cuda
        times = {}
        for backend in _BACKENDS if cuda else (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
            self.backend = backend
            try:
                step = partial(self._several, projected)
                times[backend] = seconds(captured(step) if cuda else step, groups=3, least=0.002) / SEVERAL
            except RuntimeError as error:
                if is_full(error):
                    raise
                print(f"    {backend.name}: {str(error).splitlines()[0]}", flush=True)  # it has no kernel for the shape
        self.backend = min(times, key=times.__getitem__)
        return {"sdpa": self.backend.name, "sdpa_us": {one.name: 1e6 * seconds for one, seconds in times.items()}}

    def _several(self, projected: Tensor) -> None:
        for _ in range(SEVERAL):
            self.mix(0, projected)


def _modal(shape: Shape, order: int, device: torch.device, seed: int) -> RealModal:
    """Random systems, a filter for each channel of each layer: tables [layers, order, width]."""
    draw = torch.Generator().manual_seed(seed)
    size = (shape.layers, order // 2, shape.width)
    radius, angle = 0.9 + 0.09 * torch.rand(size, generator=draw), 3 * torch.rand(size, generator=draw)
    real, imaginary = radius * angle.cos(), radius * angle.sin()
    readout = torch.randn(shape.layers, order, shape.width, generator=draw) / order
    direct = torch.randn(shape.layers, shape.width, generator=draw)
    tables = torch.cat([real, real], 1), torch.cat([-imaginary, imaginary], 1), readout, direct
    return RealModal(*(table.to(device) for table in tables))


class _Hyena:
    """The short convolution and the systems that both forms of Hyena have in common.

    before: the last k − 1 outputs of the input projection, [layers, batch, k − 1, 3 · width]
    """

    def __init__(self, weights: Weights, batch: int, order: int, seed: int = 1) -> None:
        shape, device = weights.shape, weights.device
        draw = torch.Generator().manual_seed(seed)
        channels = 3 * shape.width
        self.weight = torch.randn(shape.layers, shape.taps, channels, generator=draw).to(device) / shape.taps
        self.bias = torch.randn(shape.layers, channels, generator=draw).to(device) / 10
        self.modal = _modal(shape, order, device, seed)
        self.partners = torch.tensor(partners(order), device=device)
        self.before = torch.zeros(
            shape.layers, batch, shape.taps - 1, channels, device=device, dtype=weights.dtype
        )

    def parts(self, layer: int, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Short convolution and first gate: (the gate of the output, the input of the system), each [batch, width]."""
        window = torch.cat([self.before[layer], projected.unsqueeze(1)], 1)
        gate, x, v = ((window * self.weight[layer]).sum(1) + self.bias[layer]).chunk(3, 1)
        self.before[layer] = window[:, 1:]
        return gate, x * v


class Convolution(_Hyena):
    """Convolutions that were not distilled: past [layers, batch, context, width], taps [layers, context, width]."""

    def __init__(self, weights: Weights, batch: int, context: int, order: int = 4) -> None:
        super().__init__(weights, batch, order)
        shape, device, dtype = weights.shape, weights.device, weights.dtype
        self.position = context - 1
        self.taps = torch.stack([self._taps(layer, context).flip(0).to(dtype) for layer in range(shape.layers)])
        self.past = torch.empty(shape.layers, batch, context, shape.width, device=device, dtype=dtype).normal_()
        self.cache_bytes = self.past.nbytes + self.before.nbytes
        self.traffic = self.past.nbytes + 2 * self.before.nbytes + self.taps.nbytes
        self.operations = 2 * shape.layers * batch * context * shape.width

    def _taps(self, layer: int, context: int) -> Tensor:
        """The first taps of a layer's systems without their direct term, [context, width]: Σ readout · Aᵗ 1"""
        own, other = real_powers(self.modal.own[layer], self.modal.other[layer], context - 1)
        return (self.modal.readout[layer] * (own + other)).sum(1)

    def mix(self, layer: int, projected: Tensor) -> Tensor:
        past, taps = self.past[layer, :, : self.position + 1], self.taps[layer, -1 - self.position :]
        direct = self.modal.direct[layer]
        if past.is_cuda:
            from bench.decode_kernels import convolve

            return convolve(
                projected, self.before[layer], self.weight[layer], self.bias[layer], past, taps, direct
            )
        gate, u = self.parts(layer, projected)
        past[:, -1] = u
        y = (past * taps).sum(1) + direct * u
        return (gate * y).to(projected.dtype)

    def settle(self) -> dict[str, Any]:
        return {"form": "three Triton kernels" if self.past.is_cuda else "product and sum"}


class Recurrence(_Hyena):
    """The distilled model as one would write it in torch: states [layers, batch, order, width] in float32."""

    def __init__(self, weights: Weights, batch: int, context: int = 0, order: int = 4) -> None:
        super().__init__(weights, batch, order)
        shape = weights.shape
        self.state = torch.zeros(shape.layers, batch, order, shape.width, device=weights.device)
        self.cache_bytes = self.state.nbytes + self.before.nbytes
        self.traffic = 2 * self.cache_bytes
        self.operations = 6 * order * shape.layers * batch * shape.width

    def mix(self, layer: int, projected: Tensor) -> Tensor:
        gate, u = self.parts(layer, projected)
        modal, state = self.modal, self.state[layer]
        swapped = state.index_select(1, self.partners)
        state.copy_(modal.own[layer] * state + modal.other[layer] * swapped + u[:, None])
        y = (modal.readout[layer] * state).sum(1) + modal.direct[layer] * u
        return (gate * y).to(projected.dtype)

    def settle(self) -> dict[str, Any]:
        return {}


def enter(x: Tensor, scale: Tensor, shift: Tensor, into: Tensor) -> Tensor:
    return F.linear(F.layer_norm(x, scale.shape, scale, shift), into)


def leave(x: Tensor, mixed: Tensor, scale: Tensor, shift: Tensor, bias: Tensor, *matrices: Tensor) -> Tensor:
    """Output projection and MLP for a compiler to fuse."""
    out, up, down = matrices
    x = x + F.linear(mixed, out)
    inner = F.gelu(F.linear(F.layer_norm(x, scale.shape, scale, shift), up, bias), approximate="tanh")
    return x + F.linear(inner, down)


def leave_fused(x: Tensor, mixed: Tensor, scale: Tensor, shift: Tensor, bias: Tensor, *matrices: Tensor) -> Tensor:
    """The same with what the matrix library fuses: residuals by beta = 1 in place, bias and GELU in the epilogue."""
    out, up, down = matrices
    x.addmm_(mixed, out.t())
    normed = F.layer_norm(x, scale.shape, scale, shift)
    inner = torch._addmm_activation(bias, normed, up.t(), use_gelu=True)
    return x.addmm_(inner, down.t())


def choose(x: Tensor, scale: Tensor, shift: Tensor, embedding: Tensor) -> Tensor:
    """The token of the largest logit, [batch]."""
    return F.linear(F.layer_norm(x, scale.shape, scale, shift), embedding).argmax(-1)


class Decoder:
    """Greedy decoding, one token a step for every sequence; tokens [batch] are fed back on the device.

    compiled: the parts beside the mixer go through torch.compile, which pays for a single sequence
    """

    def __init__(self, weights: Weights, mixer: Mixer, batch: int, compiled: bool = False) -> None:
        self.weights, self.mixer, self.batch = weights, mixer, batch
        self.tokens = torch.from_numpy(first_tokens(batch, weights.shape.vocabulary)).to(weights.device)
        self.parts: tuple[Callable[..., Tensor], ...] = (enter, leave_fused, choose)
        if compiled:
            self.parts = _compiled()

    def logits_of(self, x: Tensor) -> Tensor:
        """[batch, width] → [batch, vocabulary]"""
        weights = self.weights
        return F.linear(F.layer_norm(x, weights.scale.shape, weights.scale, weights.shift), weights.embedding)

    def hidden(self) -> Tensor:
        """What the head reads for the present tokens, [batch, width]; the states move on."""
        w = self.weights
        enter_, leave_, _ = self.parts
        x = w.embedding[self.tokens]
        for index, (into, *rest) in enumerate(w.layers):
            mixed = self.mixer.mix(index, enter_(x, w.scale, w.shift, into))
            x = leave_(x, mixed, w.scale, w.shift, w.up_bias, *rest)
        return x

    def step(self) -> None:
        """Feeds the tokens and replaces them with the next ones."""
        w = self.weights
        x = self.hidden()
        self.tokens.copy_(self.parts[2](x, w.scale, w.shift, w.embedding))


_COMPILED: list[Callable[..., Tensor]] = []


def _compiled() -> tuple[Callable[..., Tensor], ...]:
    if not _COMPILED:
        import torch._inductor.config as inductor

        inductor.coordinate_descent_tuning = True
        _COMPILED.extend(torch.compile(part, dynamic=False) for part in (enter, leave, choose))
    return tuple(_COMPILED)
