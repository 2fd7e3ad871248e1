"""What hybrid models share with transformers: RMSNorm, gated MLP, rotary positions, causal attention.

The names of the parameters are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ACTIVATIONS", "Attention", "GatedMlp", "RMSNorm", "Rotary", "rotate"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,  # the exact one
    "identity": lambda x: x,
}


class RMSNorm(nn.Module):
    """scale · x / (rms(x) + eps), or with `inside` scale · x / √(mean(x²) + eps); like x

    scale: [width]
    """

    def __init__(self, width: int, eps: float, inside: bool) -> None:
        super().__init__()
        self.eps, self.inside = eps, inside
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        square = x.square().mean(-1, keepdim=True)
        size = (square + self.eps).sqrt() if self.inside else square.sqrt() + self.eps
        return self.scale * (x / size)


class GatedMlp(nn.Module):
    """l3(activation(l1 x) · l2 x), no biases: [..., width] → [..., width]"""

    def __init__(self, width: int, inner: int, activation: str) -> None:
        super().__init__()
        self.l1 = nn.Linear(width, inner, bias=False)
        self.l2 = nn.Linear(width, inner, bias=False)
        self.l3 = nn.Linear(inner, width, bias=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.l3(self.activation(self.l1(x)) * self.l2(x))


class Rotary(nn.Module):
    """Tables of the angles t / scaling · base^(−2i / dim) for t < context and i < dim / 2.

    cos, sin: [context, dim / 2], made in float64 and rounded once; forward(length) gives their beginnings
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, context: int, dim: int, base: float, scaling: float) -> None:
        super().__init__()
        cpu = torch.device("cpu")  # also where the parameters are on the meta device
        rates = base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=cpu) / dim)
        angles = torch.outer(torch.arange(context, dtype=torch.float64, device=cpu) / scaling, rates)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        return self.cos[:length], self.sin[:length]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn (x_i, x_{i + dim/2}) by angle i of its position; x: [batch, time, heads, dim], cos, sin: [time, dim / 2]"""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    """Causal attention with rotary positions, [batch, time, width] → [batch, time, width].

    Rows of Wqkv: all queries [heads · dim], then keys and values [2 · kv_heads · dim]; query head h reads
    kv head h // (heads / kv_heads).
    """

    def __init__(self, width: int, heads: int, kv_heads: int, qkv_bias: bool, out_bias: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.Wqkv = nn.Linear(width, (heads + 2 * kv_heads) * self.dim, bias=qkv_bias)
        self.out_proj = nn.Linear(width, width, bias=out_bias)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows = [count * self.dim for count in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (part.unflatten(-1, (-1, self.dim)) for part in self.Wqkv(x).split(rows, dim=-1))
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin).transpose(1, 2),
            rotate(k, cos, sin).transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.kv_heads < self.heads,
        )
        return self.out_proj(y.transpose(1, 2).flatten(2))
