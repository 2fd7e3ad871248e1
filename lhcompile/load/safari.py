"""The Hyena language model of the safari checkpoints, as modules of the same names.

State dicts load by name. Per layer, with gates x_0 … x_{N-1} and value v taken in that order from the
short-filtered projection, and N = `order`:

    v ← h_o * (x_{N-1-o} · v) + b_o · (x_{N-1-o} · v)     for o = 0 … N-2
    y = out_proj(activation(x_0 · v))
    h = MLP(z) · (exp(−t·|deltas|) + shift)               (the second factor only if `modulate`)

z and t are stored tables indexed by lag; a sequence shorter than `l_max` uses their beginning. A longer
one has no defined meaning and is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "FILTER_LAYOUTS", "HyenaConfig", "HyenaLM", "HyenaMixer", "fft_convolution"]

FILTER_LAYOUTS = ("full", "standalone")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
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
}


@dataclass(frozen=True)
class HyenaConfig:
    """Options of the model, under safari's names (`use_bias` is safari's filter option `bias`).

    vocab_size: rows of the embedding, padding included
    filter_layout: how filter channels hold (channel, order): "full" has the order fastest,
        "standalone" slowest; alike for order 2
    """

    d_model: int
    n_layer: int
    d_inner: int
    vocab_size: int
    l_max: int
    order: int = 2
    emb_dim: int = 3
    filter_order: int = 64
    short_filter_order: int = 3
    num_inner_mlps: int = 2
    w: float = 1.0
    modulate: bool = True
    shift: float = 0.0
    normalized: bool = False
    use_bias: bool = True
    activation: str = "id"
    layer_norm_epsilon: float = 1e-5
    filter_layout: str = "full"
    tie_word_embeddings: bool = True


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
    """sin(freq · x), the frequencies trained. freq: [1, width]"""

    def __init__(self, width: int, w: float) -> None:
        super().__init__()
        self.freq = nn.Parameter(w * torch.ones(1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.freq * x)


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
        return h * (torch.exp(-t * self.deltas.abs()) + self.shift)


class HyenaFilter(nn.Module):
    """The implicit filter: an MLP over the lag. One Sin module serves all its layers."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        channels, width = config.d_model * (config.order - 1), config.filter_order
        self.normalized = config.normalized
        self.bias = nn.Parameter(torch.randn(channels))
        self.pos_emb = PositionalEmbedding(config.emb_dim, config.l_max)
        sin = Sin(width, config.w)
        layers: list[nn.Module] = [nn.Linear(config.emb_dim, width), sin]
        for _ in range(config.num_inner_mlps):
            layers += [nn.Linear(width, width), sin]
        layers.append(nn.Linear(width, channels, bias=False))
        self.implicit_filter = nn.Sequential(*layers)
        self.modulation = ExponentialModulation(channels, config.modulate, config.shift)

    def filter(self, length: int) -> Tensor:
        """Filters by lag, [1, length, channels]."""
        z, t = self.pos_emb(length)
        h = self.modulation(t, self.implicit_filter(z))
        if self.normalized:
            h = h / torch.norm(h, dim=-1, p=1, keepdim=True)
        return h


class HyenaMixer(nn.Module):
    """The Hyena operator, [batch, seq, d_model] → [batch, seq, d_model]."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        d, width = config.d_model, config.d_model * (config.order + 1)
        self.d_model, self.order, self.l_max = d, config.order, config.l_max
        self.use_bias, self.filter_layout = config.use_bias, config.filter_layout
        self.in_proj = nn.Linear(d, width)
        self.out_proj = nn.Linear(d, d)
        taps = config.short_filter_order
        self.short_filter = nn.Conv1d(width, width, taps, groups=width, padding=taps - 1)
        self.filter_fn = HyenaFilter(config)
        self.activation = ACTIVATIONS[config.activation]()

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
            v = fft_convolution(v * gate, taps[o], bias[o] if self.use_bias else None)
        return self.out_proj(self.activation((v * gates[0]).transpose(1, 2)))


class Mlp(nn.Module):
    """[..., d_model] → [..., d_model], with the tanh form of GELU."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_inner)
        self.fc2 = nn.Linear(config.d_inner, config.d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """add → norm1 → mixer → add → norm2 → mlp; takes and returns (hidden, residual)."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.mixer = HyenaMixer(config)
        self.norm1 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.mlp = Mlp(config)
        self.norm2 = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden if residual is None else hidden + residual
        residual = self.mixer(self.norm1(residual)) + residual
        return self.mlp(self.norm2(residual)), residual


class Embeddings(nn.Module):
    """[batch, seq] → [batch, seq, d_model]; there is no position table."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.d_model)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids)


class Backbone(nn.Module):
    """[batch, seq] → [batch, seq, d_model]"""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_epsilon)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden, residual = self.embeddings(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        return self.ln_f(hidden if residual is None else hidden + residual)


class HyenaLM(nn.Module):
    """input_ids int64 [batch, seq ≤ l_max] → logits [batch, seq, vocab_size]."""

    def __init__(self, config: HyenaConfig) -> None:
        super().__init__()
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.word_embeddings.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.lm_head(self.backbone(input_ids))
