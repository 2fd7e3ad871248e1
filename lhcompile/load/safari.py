"""The Hyena operator and language model of the safari checkpoints, as modules of the same names.

State dicts load by name. Per layer, with gates x_0 … x_{N-1} and value v taken in that order from the
short-filtered projection, and N = `order`:

    u = x_{N-1-o} · v,   v ← h_o * u + b_o · u            for o = 0 … N-2
    y = out_proj(activation(x_0 · v))
    h = MLP(z) · (exp(−t·|deltas|) + shift)               (the second factor only if `modulate`)

With `outer_mixing` u = (Σ_channels x_{N-1-o}) · v; with `post_order_ffn` v is scaled by ord_proj_w[o] after each o.
z and t are stored tables indexed by lag; a sequence shorter than `l_max` uses their beginning. A longer
one has no defined meaning and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lhcompile.load.lm import LanguageModel, LMConfig

__all__ = ["ACTIVATIONS", "HyenaConfig", "HyenaFilter", "HyenaLM", "HyenaMixer", "fft_convolution"]

class SquaredReLU(nn.Module):
    """max(x, 0)²"""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


class Laplace(nn.Module):
    """The distribution function of a normal variable that approximates SquaredReLU: mean √½, variance 1/4π."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


Activation = Literal[
    "id", "identity", "linear", "tanh", "relu", "gelu", "silu", "swish", "sigmoid", "softplus", "sqrelu", "relu2",
    "laplace",
]  # fmt: skip
ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "id": nn.Identity,
    "identity": nn.Identity,
    "linear": nn.Identity,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "softplus": nn.Softplus,
    "sqrelu": SquaredReLU,
    "relu2": SquaredReLU,
    "laplace": Laplace,
}


@dataclass(frozen=True, kw_only=True)
class HyenaConfig(LMConfig):
    """Options of the model, under safari's names (`use_bias` is safari's filter option `bias`).

    w_mod: factor of all the trained frequencies
    linear_mixer: the filter is one linear map of the lag's embedding, without MLP
    filter_layout: how filter channels hold (channel, order): "full" has the order fastest,
        "standalone" slowest; alike for order 2
    """

    l_max: int
    order: int = 2
    emb_dim: int = 3
    filter_order: int = 64
    short_filter_order: int = 3
    num_inner_mlps: int = 2
    linear_mixer: bool = False
    w: float = 1.0
    w_mod: float = 1.0
    modulate: bool = True
    shift: float = 0.0
    normalized: bool = False
    use_bias: bool = True
    activation: Activation = "id"
    outer_mixing: bool = False
    post_order_ffn: bool = False
    filter_layout: Literal["full", "standalone"] = "full"


def fft_convolution(u: Tensor, taps: Tensor, bias: Tensor | None) -> Tensor:
    """Causal convolution h * u + bias · u, computed in the filter's dtype.

    u: [batch, channels, time]; taps: [channels, time]; bias: [channels] or None → like u
    """
    length = u.shape[-1]
    fft_size = 2 * length
    spectrum = torch.fft.rfft(taps, n=fft_size) / fft_size
    heard = torch.fft.rfft(u.to(taps.dtype), n=fft_size)
    y = torch.fft.irfft(heard * spectrum, n=fft_size, norm="forward")[..., :length]
    if bias is not None:
        y = y + u * bias.unsqueeze(-1)
    return y.to(u.dtype)


class Sin(nn.Module):
    """sin(w_mod · freq · x), the frequencies trained. freq: [1, width]"""

    def __init__(self, width: int, w: float, w_mod: float) -> None:
        super().__init__()
        self.w_mod = w_mod
        self.freq = nn.Parameter(w * torch.ones(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w_mod * self.freq.to(x.dtype) * x)


class WideLinear(nn.Linear):
    """A linear layer that works in its input's dtype, float64 for weights of float32."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class PositionalEmbedding(nn.Module):
    """Tables over the lag. z: [1, l_max, emb_dim], trained; t: [1, l_max, 1] from 0 to 1."""

    t: Tensor

    def __init__(self, emb_dim: int, l_max: int) -> None:
        super().__init__()
        t = torch.linspace(0, 1, l_max).reshape(1, l_max, 1)
        bands = (emb_dim - 1) // 2
        angle = 2 * math.pi / l_max * torch.arange(l_max).reshape(1, l_max, 1)
        angle = angle * torch.linspace(1e-4, bands - 1, bands)
        self.z = nn.Parameter(torch.cat([t, angle.cos(), -angle.sin()], dim=-1))
        self.register_buffer("t", t)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        return self.z[:, :length], self.t[:, :length]


class ExponentialModulation(nn.Module):
    """Decay over the lag, one rate per filter channel. deltas: [1, 1, channels]"""

    deltas: Tensor

    def __init__(self, channels: int, modulate: bool, shift: float) -> None:
        super().__init__()
        self.modulate, self.shift = modulate, shift
        slow, fast = math.log(1e-2) / 1.5, math.log(1e-2) / 0.3
        self.register_buffer("deltas", torch.linspace(slow, fast, channels).reshape(1, 1, channels))

    def forward(self, t: Tensor, h: Tensor) -> Tensor:
        if not self.modulate:
            return h
        return h * (torch.exp(-t * self.deltas.abs().to(t.dtype)) + self.shift)


class HyenaFilter(nn.Module):
    """The implicit filter: an MLP over the lag, evaluated in float64. One Sin module serves all its layers.

    Its sines have arguments of hundreds, so that float32 would cost the taps three digits.

    bias: [channels], for the operator to use; not there unless `direct`
    """

    def __init__(self, config: HyenaConfig, channels: int, direct: bool = True) -> None:
        super().__init__()
        self.normalized = config.normalized
        if direct:
            self.bias = nn.Parameter(torch.randn(channels))
        self.pos_emb = PositionalEmbedding(config.emb_dim, config.l_max)
        self.implicit_filter = nn.Sequential(*_filter_layers(config, channels))
        self.modulation = ExponentialModulation(channels, config.modulate, config.shift)

    def filter(self, length: int) -> Tensor:
        """Filters by lag, [1, length, channels]."""
        z, t = self.pos_emb(length)
        h = self.modulation(t.double(), self.implicit_filter(z.double()))
        if self.normalized:
            h = h / torch.norm(h, dim=-1, p=1, keepdim=True)
        return h.to(z.dtype)


def _filter_layers(config: HyenaConfig, channels: int) -> list[nn.Module]:
    width = config.filter_order
    if config.linear_mixer:
        return [WideLinear(config.emb_dim, channels, bias=False)]
    sin = Sin(width, config.w, config.w_mod)
    layers: list[nn.Module] = [WideLinear(config.emb_dim, width), sin]
    for _ in range(config.num_inner_mlps):
        layers += [WideLinear(width, width), sin]
    return [*layers, WideLinear(width, channels, bias=False)]


class HyenaMixer(nn.Module):
    """The Hyena operator, [batch, seq, d_model] → [batch, seq, d_model]."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        d, width = config.d_model, config.d_model * (config.order + 1)
        self.d_model, self.order, self.l_max = d, config.order, config.l_max
        self.use_bias, self.filter_layout = config.use_bias, config.filter_layout
        self.outer_mixing = config.outer_mixing
        self.in_proj = nn.Linear(d, width)
        self.out_proj = nn.Linear(d, d)
        taps = config.short_filter_order
        self.short_filter = nn.Conv1d(width, width, taps, groups=width, padding=taps - 1)
        self.filter_fn = HyenaFilter(config, d * (config.order - 1))
        self.activation = ACTIVATIONS[config.activation]()
        self.scaled = config.post_order_ffn
        if self.scaled:
            self.ord_proj_w = nn.Parameter(torch.ones(config.order, 1, 1))

    def _by_order(self, channels: Tensor) -> Tensor:
        """[..., channels] → [order - 1, d_model, ...]"""
        if self.filter_layout == "full":
            return channels.unflatten(-1, (self.d_model, self.order - 1)).movedim((-1, -2), (0, 1))
        return channels.unflatten(-1, (self.order - 1, self.d_model)).movedim((-2, -1), (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        torch._check(length <= self.l_max, lambda: f"the sequence is longer than l_max {self.l_max}")
        projected = self.in_proj(x).transpose(1, 2)
        *gates, v = self.short_filter(projected)[..., :length].split(self.d_model, dim=1)
        taps = self._by_order(self.filter_fn.filter(length)[0])
        bias = self._by_order(self.filter_fn.bias)
        for o, gate in enumerate(reversed(gates[1:])):
            gate = gate.sum(1, keepdim=True) if self.outer_mixing else gate
            v = fft_convolution(v * gate, taps[o], bias[o] if self.use_bias else None)
            v = v * self.ord_proj_w[o] if self.scaled else v
        return self.out_proj(self.activation((v * gates[0]).transpose(1, 2)))


class HyenaLM(LanguageModel):
    """input_ids int64 [batch, seq ≤ l_max] → logits [batch, seq, vocab_size]."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__(config, lambda: HyenaMixer(config), config.l_max)
