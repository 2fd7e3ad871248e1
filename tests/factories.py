"""Models for the command line: a random safari Hyena, and modules that users bring as `factories:NAME`."""

from __future__ import annotations

import torch
from models import GivenModal, Hyena, LearnedPositions, RotaryAttention, tiny
from torch import Tensor, nn

from lhcompile.load.safari import HyenaConfig, HyenaLM

__all__ = [
    "HEADS",
    "LENGTH",
    "VOCAB",
    "Centred",
    "Circular",
    "Continuous",
    "Failing",
    "Growing",
    "Language",
    "Tiny",
    "WeightTied",
    "hybrid",
    "hyena",
]

VOCAB, LENGTH, HEADS = 32, 48, 2


def hyena(vocabulary: int = 256, width: int = 16, seed: int = 0, order: int = 2) -> HyenaLM:
    """A random two-layer model of context 64 whose logits are of unit scale."""
    torch.manual_seed(seed)
    config = HyenaConfig(
        d_model=width,
        n_layer=2,
        d_inner=2 * width,
        vocab_size=vocabulary,
        l_max=64,
        order=order,
        emb_dim=5,
        filter_order=16,
        w=3.0,
    )
    model = HyenaLM(config).eval().requires_grad_(False)
    model.backbone.embeddings.word_embeddings.weight.data /= width**0.5
    return model


def hybrid() -> nn.Module:
    """Learned positions, a Hyena, attention and a given modal system; context 32."""
    return tiny(LearnedPositions, Hyena, RotaryAttention, GivenModal).module


class WeightTied(nn.Module):
    """Multi-head long convolution, [batch, time, width] → the same, time ≤ `length`.

    One filter a head convolves the outer products of its keys and values, axes [batch, d1, d2, heads, time].
    """

    def __init__(self, width: int, heads: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        decay = torch.exp(-torch.arange(length) / (4 + 4 * torch.arange(heads)[:, None]))
        self.taps = nn.Parameter(decay * torch.randn(heads, length))
        self.direct = nn.Parameter(torch.randn(heads))
        self.projections = nn.Linear(width, 3 * width)
        self.short = nn.Conv1d(3 * width, 3 * width, 3, groups=3 * width, padding=2)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        if time > self.taps.shape[1]:
            raise ValueError("the sequence is longer than the filters")
        z = self.short(self.projections(x).transpose(1, 2))[..., :time]
        q, k, v = (part.unflatten(1, (self.heads, -1)).transpose(1, 2) for part in z.chunk(3, dim=1))
        kv = k[:, :, None] * v[:, None]
        size = 2 * time
        heard = torch.fft.rfft(self.taps[:, :time], n=size) / size
        y = torch.fft.irfft(torch.fft.rfft(kv, n=size) * heard, n=size, norm="forward")[..., :time]
        y = y + kv * self.direct[:, None]
        return self.out((q[:, :, None] * y).sum(1).transpose(1, 2).flatten(1, 2).transpose(1, 2))


class Language(nn.Module):
    """input_ids [batch, time] → logits [batch, time, VOCAB] of about unit scale."""

    def __init__(self, width: int = 16, layers: int = 2, heads: int = HEADS, length: int = LENGTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.mixers = nn.ModuleList(WeightTied(width, heads, length) for _ in range(layers))
        self.head = nn.Linear(width, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return self.head(x)


class Tiny(nn.Module):
    """One filter a channel, whatever `mix` makes of them; the smallest thing that is a model."""

    def __init__(self, length: int = 32, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l_max = length
        self.embed = nn.Embedding(16, width)
        self.taps = nn.Parameter(torch.randn(width, length) * torch.exp(-torch.arange(length) / 4))
        self.head = nn.Linear(width, 16)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(input_ids).transpose(1, 2)).transpose(1, 2))

    def mix(self, u: Tensor) -> Tensor:
        time = u.shape[-1]
        spectrum = torch.fft.rfft(u, n=2 * time) * torch.fft.rfft(self.taps[:, :time], n=2 * time)
        return torch.fft.irfft(spectrum, n=2 * time)[..., :time]


class Circular(Tiny):
    """Forgets to pad: the end of a sequence wraps around to its beginning."""

    def mix(self, u: Tensor) -> Tensor:
        time = u.shape[-1]
        return torch.fft.irfft(torch.fft.rfft(u) * torch.fft.rfft(self.taps[:, :time]), n=time)


class Centred(Tiny):
    """A short convolution that sees the next token."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def mix(self, u: Tensor) -> Tensor:
        return super().mix(self.conv(u))


class Continuous(nn.Module):
    """features [batch, time, 3] → values [batch, time, 2], by a short and a long convolution."""

    def __init__(self, length: int = 48, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.l_max = length
        self.into = nn.Linear(3, width)
        self.short = nn.Conv1d(width, width, 3, groups=width, padding=2)
        self.taps = nn.Parameter(torch.randn(width, length) * torch.exp(-torch.arange(length) / 4))
        self.out = nn.Linear(width, 2)

    def forward(self, signal: Tensor) -> Tensor:
        time = signal.shape[1]
        u = torch.tanh(self.short(self.into(signal).transpose(1, 2))[..., :time])
        spectrum = torch.fft.rfft(u, n=2 * time) * torch.fft.rfft(self.taps[:, :time], n=2 * time)
        y = torch.fft.irfft(spectrum, n=2 * time)[..., :time]
        return self.out(nn.functional.gelu(y + u).transpose(1, 2))


class Growing(Tiny):
    """Filters that grow by a fifth with every step into the past."""

    def __init__(self, length: int = 32) -> None:
        super().__init__(length)
        self.taps.data = 1e-2 * 1.2 ** torch.arange(length).expand(4, length).clone()


class Failing(Tiny):
    """Fails when it is run."""

    def mix(self, u: Tensor) -> Tensor:
        raise RuntimeError("no kernel for\nthis shape")
