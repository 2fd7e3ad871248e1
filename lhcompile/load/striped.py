"""StripedHyena (also Evo-1) and StripedHyena 2 (Evo 2), as modules of the same names.

Blocks of gated convolutions, and blocks of attention between them, each followed by a gated MLP. Of the projected
and short-filtered signal z [batch, 3 · width, time], in this order:

    x_2, x_1, v = z        u = x_1 · v        y = (h * u + D · u) · x_2

and h is one of
    modal  h_t = Re Σ_n R_n p_n^t, complex poles without conjugates     StripedHyena
    hcl    h_t = Σ_n R_n exp(n-th log pole)^t, real                     Evo 2, long
    hcm    taps from the current one on, 128 or more                    Evo 2, medium
    hcs    taps up to the current one, fewer, and no D                  Evo 2, short

Checkpoints hold z's channels and the rows of attention in several orders; here there is one, and
`striped_common.loaded_model` brings the weights into it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lhcompile.load.modal import complex_modes, real_modes
from lhcompile.load.transformer import Attention, GatedMlp, RMSNorm, Rotary

__all__ = ["TIME_ORDERED", "AttentionBlock", "ConvolutionBlock", "StripedConfig", "StripedHyena"]

TIME_ORDERED = 128
"""Explicit filters of so many taps and more begin with the current token's and have a D; shorter ones end with it."""


@dataclass(frozen=True)
class StripedConfig:
    """Sizes and options of the model.

    layers: kind of each block: "attention", "modal", "hcl", "hcm" or "hcs"; activations: of each block's MLP
    hcm, hcs: (groups, taps) of their filters; each serves width / groups channels in a row
    scaling: what positions are divided by; norm_inside: whether eps stands inside the root
    """

    vocab_size: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    context: int
    layers: tuple[str, ...]
    activations: tuple[str, ...]
    eps: float
    norm_inside: bool
    rotary_base: float
    scaling: float
    short_taps: int
    short_bias: bool
    qkv_bias: bool
    attention_out_bias: bool
    tied: bool
    projections_bias: bool = True
    filter_out_bias: bool = True
    states: int = 0
    hcm: tuple[int, int] = (0, 0)
    hcs: tuple[int, int] = (0, 0)


def _depthwise(u: Tensor, weight: Tensor) -> Tensor:
    """Causal convolution of each channel, weight[..., -1] on the current token; u [batch, channels, time] → like u"""
    return F.conv1d(u, weight, padding=weight.shape[-1] - 1, groups=u.shape[1])[..., : u.shape[-1]]


class GatedConvolution(nn.Module, ABC):
    """z [batch, time, 3 · width] → y [batch, time, width]; subclasses have the long filter."""

    def __init__(self, config: StripedConfig) -> None:
        super().__init__()
        channels = 3 * config.width
        self.short_filter_weight = nn.Parameter(torch.zeros(channels, 1, config.short_taps))
        self.short_filter_bias = nn.Parameter(torch.zeros(channels)) if config.short_bias else None

    def forward(self, z: Tensor) -> Tensor:
        z = _depthwise(z.transpose(1, 2), self.short_filter_weight)
        if self.short_filter_bias is not None:
            z = z + self.short_filter_bias.unsqueeze(-1)
        x2, x1, v = z.transpose(1, 2).chunk(3, dim=-1)
        return self.convolve(x1 * v) * x2

    @abstractmethod
    def convolve(self, u: Tensor) -> Tensor:
        """h * u + D · u; [batch, time, width] → like u"""


class ModalFilter(GatedConvolution):
    """poles, residues: [width, states, 1, 2], real and imaginary parts; D: [width]"""

    def __init__(self, config: StripedConfig) -> None:
        super().__init__(config)
        self.poles = nn.Parameter(torch.zeros(config.width, config.states, 1, 2))
        self.residues = nn.Parameter(torch.zeros(config.width, config.states, 1, 2))
        self.D = nn.Parameter(torch.zeros(config.width))

    def convolve(self, u: Tensor) -> Tensor:
        poles, residues = (torch.view_as_complex(table).squeeze(-1) for table in (self.poles, self.residues))
        return complex_modes(u, poles, residues, self.D)


class RealModalFilter(GatedConvolution):
    """log_poles: [width, states, 1]; residues: [width, states]; D: [width]"""

    def __init__(self, config: StripedConfig) -> None:
        super().__init__(config)
        self.log_poles = nn.Parameter(torch.zeros(config.width, config.states, 1))
        self.residues = nn.Parameter(torch.zeros(config.width, config.states))
        self.D = nn.Parameter(torch.zeros(config.width))

    def convolve(self, u: Tensor) -> Tensor:
        return real_modes(u, self.log_poles.squeeze(-1).double().exp(), self.residues, self.D)


class ExplicitFilter(GatedConvolution):
    """h: [groups, 1, taps]; D: [width], or None where there are fewer than TIME_ORDERED taps"""

    def __init__(self, config: StripedConfig, groups: int, taps: int) -> None:
        super().__init__(config)
        self.h = nn.Parameter(torch.zeros(groups, 1, taps))
        self.D = nn.Parameter(torch.zeros(config.width)) if taps >= TIME_ORDERED else None

    def convolve(self, u: Tensor) -> Tensor:
        ordered = self.h if self.D is None else self.h.flip(-1)
        weight = ordered.repeat_interleave(u.shape[-1] // len(self.h), dim=0)
        y = _depthwise(u.transpose(1, 2), weight).transpose(1, 2)
        return y if self.D is None else y + self.D * u


def _filter(config: StripedConfig, kind: str) -> GatedConvolution:
    if kind == "modal":
        return ModalFilter(config)
    if kind == "hcl":
        return RealModalFilter(config)
    return ExplicitFilter(config, *(config.hcm if kind == "hcm" else config.hcs))


class Block(nn.Module, ABC):
    """x ← x + mix(pre_norm x); x ← x + mlp(post_norm x); subclasses mix."""

    def __init__(self, config: StripedConfig, activation: str) -> None:
        super().__init__()
        self.pre_norm = RMSNorm(config.width, config.eps, config.norm_inside)
        self.post_norm = RMSNorm(config.width, config.eps, config.norm_inside)
        self.mlp = GatedMlp(config.width, config.inner, activation)

    @abstractmethod
    def mix(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[batch, time, width] → like x; cos, sin: [time, dim / 2]"""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = self.mix(self.pre_norm(x), cos, sin) + x
        return self.mlp(self.post_norm(x)) + x


class AttentionBlock(Block):
    def __init__(self, config: StripedConfig, activation: str) -> None:
        super().__init__(config, activation)
        self.inner_mha_cls = Attention(
            config.width, config.heads, config.kv_heads, config.qkv_bias, config.attention_out_bias
        )

    def mix(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.inner_mha_cls(x, cos, sin)


class ConvolutionBlock(Block):
    def __init__(self, config: StripedConfig, kind: str, activation: str) -> None:
        super().__init__(config, activation)
        self.projections = nn.Linear(config.width, 3 * config.width, bias=config.projections_bias)
        self.filter = _filter(config, kind)
        self.out_filter_dense = nn.Linear(config.width, config.width, bias=config.filter_out_bias)

    def mix(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return self.out_filter_dense(self.filter(self.projections(x)))


class StripedHyena(nn.Module):
    """input_ids int64 [batch, time ≤ context] → logits [batch, time, vocab_size]."""

    def __init__(self, config: StripedConfig) -> None:
        super().__init__()
        self.context = config.context
        self.embedding_layer = nn.Embedding(config.vocab_size, config.width)
        self.rotary = Rotary(config.context, config.width // config.heads, config.rotary_base, config.scaling)
        self.blocks = nn.ModuleList(
            AttentionBlock(config, activation) if kind == "attention" else ConvolutionBlock(config, kind, activation)
            for kind, activation in zip(config.layers, config.activations, strict=True)
        )
        self.norm = RMSNorm(config.width, config.eps, config.norm_inside)
        self.unembed = None if config.tied else nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        torch._check(length <= self.context, lambda: f"the sequence is longer than the context {self.context}")
        x = self.embedding_layer(input_ids)
        angles = self.rotary(length)
        for block in self.blocks:
            x = block(x, *angles)
        x = self.norm(x)
        return F.linear(x, self.embedding_layer.weight) if self.unembed is None else self.unembed(x)
