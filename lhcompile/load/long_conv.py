"""The long convolution of safari with explicit taps, and the two models it comes in, as modules of the same names.

    k = sign(w) · relu(|w| − lam), with `use_ma_smoothing` after w has been averaged over ma_window_len lags
    y = k_c * u + D_c · u for each of C `channels`;   output_linear(activation(y)), with a GLU if `postact` says so

The causal filter is what is meant: safari itself convolves circularly at lengths below l_max, which wraps late taps
into the first outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lhcompile.load.lm import LanguageModel, LMConfig
from lhcompile.load.safari import ACTIVATIONS, Activation, fft_convolution

__all__ = [
    "LongConvConfig",
    "LongConvLM",
    "LongConvMixer",
    "LongConvSequence",
    "LongConvSequenceConfig",
    "OperatorConfig",
]


@dataclass(frozen=True, kw_only=True)
class OperatorConfig:
    """Options of the operator, under safari's names.

    lam: what each tap is shrunk by; postact: "none" is an operator without output_linear
    """

    d_model: int
    l_max: int
    channels: int = 1
    lam: float = 0.1
    use_ma_smoothing: bool = False
    ma_window_len: int = 7
    activation: Activation = "gelu"
    postact: Activation | Literal["glu", "none"] = "glu"


@dataclass(frozen=True, kw_only=True)
class LongConvConfig(OperatorConfig, LMConfig):
    """Options of safari's language model of such operators."""


@dataclass(frozen=True, kw_only=True)
class LongConvSequenceConfig(OperatorConfig):
    """Options of safari's sequence model of such operators.

    d_input: tokens of the embedding, or `features` of the linear encoder
    norm: "layer", "batch", "scalar" (safari's layer norm when `transposed`) or "none"
    """

    n_layers: int
    d_input: int
    d_output: int
    features: bool
    prenorm: bool = True
    norm: Literal["layer", "batch", "scalar", "none"] = "layer"
    eps: float = 1e-5


class Taps(nn.Module):
    """kernel: [channels, d_model, l_max], as trained"""

    def __init__(self, config: OperatorConfig) -> None:
        super().__init__()
        self.lam, self.window = config.lam, config.ma_window_len if config.use_ma_smoothing else 0
        self.kernel = nn.Parameter(torch.zeros(config.channels, config.d_model, config.l_max))

    def forward(self) -> Tensor:
        """The filter's taps by lag, [channels · d_model, l_max]."""
        k: Tensor = self.kernel
        if self.window:
            k = F.avg_pool1d(k, self.window, stride=1, padding=self.window // 2)
        return (k.sign() * F.relu(k.abs() - self.lam)).flatten(0, 1)


class LongConvMixer(nn.Module):
    """[batch, seq ≤ l_max, d_model] → [batch, seq, d_model]. D: [channels, d_model]"""

    def __init__(self, config: OperatorConfig) -> None:
        super().__init__()
        d, self.channels, self.l_max = config.d_model, config.channels, config.l_max
        self.D = nn.Parameter(torch.zeros(config.channels, d))
        self.kernel = Taps(config)
        self.activation = ACTIVATIONS[config.activation]()
        self.output_linear: nn.Module = nn.Identity()
        if config.postact == "glu":
            self.output_linear = nn.Sequential(nn.Linear(d * self.channels, 2 * d), nn.GLU())
        elif config.postact != "none":
            self.output_linear = nn.Sequential(nn.Linear(d * self.channels, d), ACTIVATIONS[config.postact]())

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        torch._check(length <= self.l_max, lambda: f"the sequence is longer than l_max {self.l_max}")
        u = x.transpose(1, 2)
        u = u if self.channels == 1 else torch.cat([u] * self.channels, dim=1)
        y = fft_convolution(u, self.kernel()[:, :length], self.D.flatten())
        return self.output_linear(self.activation(y.transpose(1, 2)))


class LongConvLM(LanguageModel):
    """input_ids int64 [batch, seq ≤ l_max] → logits [batch, seq, vocab_size]."""

    def __init__(self, config: LongConvConfig) -> None:
        super().__init__(config, lambda: LongConvMixer(config), config.l_max)


class ScalarNorm(nn.Module):
    """s · (x − mean(x) + m) / std(x) over the channels, std biased, without eps; m, s: [1]"""

    def __init__(self) -> None:
        super().__init__()
        self.m, self.s = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return self.s * (centred + self.m) / centred.square().mean(-1, keepdim=True).sqrt()


class BatchNorm(nn.Module):
    """weight · (x − running_mean) / √(running_var + eps) + bias: trained statistics, so pointwise; each [d_model]"""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(d_model)), nn.Parameter(torch.zeros(d_model))
        self.register_buffer("running_mean", torch.zeros(d_model))
        self.register_buffer("running_var", torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) * (self.weight / (self.running_var + self.eps).sqrt()) + self.bias


class Norm(nn.Module):
    """Holds the norm under the name it has in the files."""

    def __init__(self, config: LongConvSequenceConfig) -> None:
        super().__init__()
        kinds: dict[str, Callable[[], nn.Module]] = {
            "layer": lambda: nn.LayerNorm(config.d_model, eps=config.eps),
            "batch": lambda: BatchNorm(config.d_model, config.eps),
            "scalar": ScalarNorm,
            "none": nn.Identity,
        }
        self.norm = kinds[config.norm]()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class ResidualBlock(nn.Module):
    """x + layer(norm(x)), or norm(x + layer(x)) without `prenorm`"""

    def __init__(self, config: LongConvSequenceConfig) -> None:
        super().__init__()
        self.prenorm = config.prenorm
        self.layer, self.norm = LongConvMixer(config), Norm(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x)) if self.prenorm else self.norm(x + self.layer(x))


class Stack(nn.Module):
    """[batch, seq, d_model] → the same"""

    def __init__(self, config: LongConvSequenceConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([ResidualBlock(config) for _ in range(config.n_layers)])
        self.norm = Norm(config) if config.prenorm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Readout(nn.Module):
    """[batch, seq, d_model] → [batch, seq, d_output]"""

    def __init__(self, config: LongConvSequenceConfig) -> None:
        super().__init__()
        self.output_transform = nn.Linear(config.d_model, config.d_output)

    def forward(self, x: Tensor) -> Tensor:
        return self.output_transform(x)


class LongConvSequence(nn.Module):
    """Token ids int64 [batch, seq ≤ l_max], or features [batch, seq, d_input] → [batch, seq, d_output]."""

    def __init__(self, config: LongConvSequenceConfig) -> None:
        super().__init__()
        reader = nn.Linear if config.features else nn.Embedding
        self.encoder = nn.Sequential(reader(config.d_input, config.d_model))
        self.model = Stack(config)
        self.decoder = nn.Sequential(Readout(config))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.decoder(self.model(self.encoder(inputs)))
