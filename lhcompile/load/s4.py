"""The stacked S4 model: encoder, layers of S4D or S4 with norms, decoder; parameters named as in its checkpoints.

Each layer is a bank of linear systems (`s4_kernels`), whose modes are computed once, by `S4Model.settle`, when the
parameters are in. Then the convolution is the exact recurrence. Systems whose modes cancel each other too much for
single precision keep their taps instead, and are an ordinary long convolution.

    y = final_act(linear(mult_act(activation(h * u + D u))))

of which s4d.py has GELU, none and GLU always; with final_act "none" there is no linear map at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from lhcompile.load.modal import audible, positive, real_form
from lhcompile.load.s4_kernels import (
    DPLR,
    bilinear_modes,
    check_fading,
    real_alone,
    rounded,
    systems_of,
    with_conjugates,
    zoh_modes,
)
from lhcompile.ssm import ModalSSM

__all__ = ["S4Config", "S4Model"]

Activation = Literal["gelu", "id", "identity", "linear", "tanh", "relu", "elu", "swish", "silu", "sigmoid", "softplus"]
FinalActivation = Literal[
    "glu", "none", "gelu", "id", "identity", "linear", "tanh", "relu", "elu", "swish", "silu", "sigmoid", "softplus"
]
Transform = Literal["none", "exp", "relu", "sigmoid", "softplus"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: gelu(x),
    "tanh": torch.tanh,
    "relu": F.relu,
    "elu": F.elu,
    "swish": F.silu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "glu": F.glu,
} | dict.fromkeys(("none", "id", "identity", "linear"), lambda x: x)

CANCELLING = 1e-4
"""Relative error of the worst channel's taps by rounding modes to single precision, above which taps are kept.
HiPPO-LegS moved by 5 % has 4e-6; untouched it has no modes."""


@dataclass(frozen=True)
class S4Config:
    """layer: s4d (s4d.py), or diag and dplr (the modes of s4.py)

    d_state: N, so N / 2 complex states are stored, or with is_real as many real ones; n_ssm: systems that d_model
    channels share; channels: outputs of each system, which with swap_channels lie innermost; rank: of the low-rank
    part of dplr; dt_tie: one step for all states of a channel; dt_fast: their inverse hyperbolic sines are stored
    final_norm: whether a norm stands before the decoder
    *_transform: how a positive number is made of what is stored; bandlimit: modes above this share of twice the
    sampling rate's half are silent, None for no limit
    l_max: longest kernel, None for no limit
    """

    layer: Literal["s4d", "diag", "dplr"]
    d_input: int
    d_model: int
    d_output: int
    n_layers: int
    d_state: int
    n_ssm: int
    channels: int = 1
    rank: int = 1
    dt_tie: bool = True
    prenorm: bool = False
    final_norm: bool = False
    disc: Literal["zoh", "bilinear"] = "zoh"
    is_real: bool = False
    dt_fast: bool = False
    dt_transform: Transform = "exp"
    real_transform: Transform = "exp"
    imag_transform: Transform = "none"
    bandlimit: float | None = None
    swap_channels: bool = False
    activation: Activation = "gelu"
    mult_act: Activation = "id"
    final_act: FinalActivation = "glu"
    l_max: int | None = None


class S4DKernel(nn.Module):
    """A = −exp(log_A_real) + i·A_imag for each channel, zero-order hold, B = 1."""

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        h, n = config.d_model, config.d_state // 2
        self.C = nn.Parameter(torch.zeros(h, n, 2))
        self.log_dt = nn.Parameter(torch.zeros(h))
        self.log_A_real = nn.Parameter(torch.zeros(h, n))
        self.A_imag = nn.Parameter(torch.zeros(h, n))

    def modal(self, direct: Tensor) -> ModalSSM:
        rates = torch.complex(-self.log_A_real.double().exp(), self.A_imag.double())
        return with_conjugates(*zoh_modes(rates, self.log_dt.double().exp()[:, None], _complex(self.C)), direct)


class DiagKernel(nn.Module):
    """A = −real(A_real) − i·imag(A_imag), one of n_ssm for each channel in turn, and B of its own.

    With is_real there is no A_imag, and B and C are real: h_t = 2 Σ B C … over real poles.
    """

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        h, pair = config.d_model, () if config.is_real else (2,)
        n = config.d_state if config.is_real else config.d_state // 2
        self.config = config
        self.discretized = {"zoh": zoh_modes, "bilinear": bilinear_modes}[config.disc]
        self.inv_dt = nn.Parameter(torch.zeros(h, 1 if config.dt_tie else n))
        self.C = nn.Parameter(torch.zeros(config.channels, h, n, *pair))
        self.B = nn.Parameter(torch.zeros(1, config.n_ssm, n, *pair))
        self.A_real = nn.Parameter(torch.zeros(config.n_ssm, n))
        if not config.is_real:
            self.A_imag = nn.Parameter(torch.zeros(config.n_ssm, n))

    @property
    def rates(self) -> Tensor:
        """λ, complex128 [n_ssm, N / 2], or [n_ssm, N] of real ones"""
        real = positive(self.A_real.double(), self.config.real_transform)
        if self.config.is_real:
            return torch.complex(-real, torch.zeros_like(real))
        return torch.complex(-real, -positive(self.A_imag.double(), self.config.imag_transform))

    @property
    def steps(self) -> Tensor:
        """dt, float64 [d_model, 1 or as many as rates]"""
        stored = self.inv_dt.double()
        return positive(stored.sinh() if self.config.dt_fast else stored, self.config.dt_transform)

    def gains(self) -> tuple[Tensor, Tensor]:
        """B [n_ssm, …] and C [channels, d_model, …], complex128, silent modes without a gain"""
        b, c = (x.to(torch.complex128) if self.config.is_real else _complex(x) for x in (self.B, self.C))
        if self.config.bandlimit is not None:
            which = systems_of(c.shape[1], len(self.A_real))
            c = c * audible(self.rates[which], self.steps, self.config.bandlimit)
        return b[0], c

    def modal(self, direct: Tensor) -> ModalSSM | None:
        b, c = self.gains()
        which = systems_of(c.shape[1], len(b))
        poles, residues = self.discretized(self.rates[which], self.steps, b[which] * c)
        whole = real_alone if self.config.is_real else with_conjugates
        return whole(poles.repeat(len(c), 1), residues.flatten(0, 1), direct)


class DPLRKernel(DiagKernel):
    """A less P P*, bilinear; `l_kernel` is the length that the stored C was prepared for."""

    l_kernel: Tensor

    def __init__(self, config: S4Config) -> None:
        super().__init__(config)
        self.P = nn.Parameter(torch.zeros(config.rank, config.n_ssm, config.d_state // 2, 2))
        self.register_buffer("l_kernel", torch.tensor(0))

    def system(self) -> DPLR:
        return DPLR.of(self.rates, _complex(self.P), *self.gains(), self.steps.squeeze(-1), int(self.l_kernel))

    def modal(self, direct: Tensor) -> ModalSSM | None:
        return self.system().modal(direct)


class Convolution(nn.Module):
    """u [batch, seq, d_model] → activation(h * u + D u), [batch, seq, copies · d_model], copies outermost.

    Once settled it has a system in real form, own, other, readout: float32 [order, copies · d_model], or
    taps: float32 [copies · d_model, length].
    """

    own: Tensor
    other: Tensor
    readout: Tensor
    taps: Tensor

    def __init__(self, kernel: S4DKernel | DiagKernel, direct: tuple[int, ...], activation: str = "gelu") -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.D = nn.Parameter(torch.zeros(direct))
        self.kernel = kernel

    @torch.no_grad()
    def settle(self, length: int) -> ModalSSM | None:
        """Makes and returns the system, or makes the taps up to `length` and returns None where modes are no good.

        Raises ValueError naming the modulus of a pole that does not fade in single precision.
        """
        system = self.kernel.modal(self.D.flatten())
        if system is not None:
            check_fading(system)
        if isinstance(self.kernel, DPLRKernel):
            system, error = (None, 1.0) if system is None else rounded(system, length)
            if system is None or error > CANCELLING:
                self.register_buffer("taps", self.kernel.system().taps(length).float(), persistent=False)
                return None
        assert system is not None
        for name in ("own", "other", "readout"):
            self.register_buffer(name, getattr(system.real(), name).float(), persistent=False)
        return system

    def forward(self, u: Tensor) -> Tensor:
        direct = self.D.flatten()
        u = u.repeat(1, 1, len(direct) // u.shape[2])
        if "taps" not in self._buffers:
            return self.activation(real_form(u, self.own, self.other, self.readout, direct))
        time = u.shape[1]
        if time > self.taps.shape[1]:
            raise ValueError(f"a sequence of {time} is longer than the {self.taps.shape[1]} taps")
        spectrum = torch.fft.rfft(self.taps[:, :time], n=2 * time) * torch.fft.rfft(u.transpose(1, 2), n=2 * time)
        y = torch.fft.irfft(spectrum, n=2 * time)[..., :time].transpose(1, 2)
        return self.activation(y + direct * u)


class Pointwise(nn.Conv1d):
    """A convolution of one tap, on channels that lie innermost."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.squeeze(-1), self.bias)


class S4D(Convolution):
    """The layer of s4d.py, [batch, seq, d_model] → the same."""

    def __init__(self, config: S4Config) -> None:
        super().__init__(S4DKernel(config), (config.d_model,))
        self.output_linear = nn.Sequential(Pointwise(config.d_model, 2 * config.d_model, 1), nn.GLU(dim=-1))

    def forward(self, u: Tensor) -> Tensor:
        return self.output_linear(super().forward(u))


class S4Block(nn.Module):
    """The layer of s4.py, [batch, seq, d_model] → the same."""

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        kernel = DPLRKernel(config) if config.layer == "dplr" else DiagKernel(config)
        self.layer = Convolution(kernel, (config.channels, config.d_model), config.activation)
        self.mult_activation, self.final_activation = ACTIVATIONS[config.mult_act], ACTIVATIONS[config.final_act]
        wide, out = config.channels * config.d_model, config.d_model * (2 if config.final_act == "glu" else 1)
        self.copies = config.channels if config.swap_channels else 1
        self.output_linear = nn.Sequential(*[] if config.final_act == "none" else [nn.Linear(wide, out)])

    @torch.no_grad()
    def unswap(self) -> None:
        """Turns a linear map that takes the copies of a channel innermost, to take them outermost."""
        for weight in self.output_linear.parameters():
            if weight.ndim == 2:
                weight.copy_(weight.unflatten(1, (-1, self.copies)).transpose(1, 2).flatten(1))

    def forward(self, u: Tensor) -> Tensor:
        return self.final_activation(self.output_linear(self.mult_activation(self.layer(u))))


class S4Model(nn.Module):
    """features float32 [batch, seq, d_input] → values [batch, seq, d_output], one for each position.

    A layer is x + layer(norm(x)) with prenorm, norm(x + layer(x)) without.
    """

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        self.prenorm, self.final_norm = config.prenorm, config.final_norm
        self.encoder = nn.Linear(config.d_input, config.d_model)
        layer = S4D if config.layer == "s4d" else S4Block
        self.s4_layers = nn.ModuleList(layer(config) for _ in range(config.n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in range(config.n_layers))
        if config.final_norm:
            self.norm = nn.LayerNorm(config.d_model)
        self.decoder = nn.Linear(config.d_model, config.d_output)

    def convolutions(self) -> list[tuple[str, Convolution]]:
        """The convolution of each layer, by its path."""
        return [(path, part) for path, part in self.named_modules() if isinstance(part, Convolution)]

    def forward(self, features: Tensor) -> Tensor:
        x = self.encoder(features)
        for layer, norm in zip(self.s4_layers, self.norms, strict=True):
            x = x + layer(norm(x)) if self.prenorm else norm(x + layer(x))
        return self.decoder(self.norm(x) if self.final_norm else x)


def _complex(pairs: Tensor) -> Tensor:
    """Real and imaginary parts on the last axis → complex128."""
    return torch.view_as_complex(pairs.double().contiguous())
