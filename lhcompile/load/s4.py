"""The stacked S4 model: encoder, layers of S4D or S4 with norms, decoder; parameters named as in its checkpoints.

Each layer is a bank of linear systems (`s4_kernels`), whose modes are computed once, by `S4Model.settle`, when the
parameters are in. Then the convolution is the exact recurrence. Systems whose modes cancel each other too much for
single precision keep their taps instead, and are an ordinary long convolution.

    y = GELU(h * u + D u) → linear to 2 · d_model → GLU
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from lhcompile.load.modal import real_form
from lhcompile.load.s4_kernels import (
    DPLR,
    bilinear_modes,
    check_fading,
    rounded,
    systems_of,
    with_conjugates,
    zoh_modes,
)
from lhcompile.ssm import ModalSSM

__all__ = ["S4Config", "S4Model"]

CANCELLING = 1e-4
"""Relative error of the worst channel's taps by rounding modes to single precision, above which taps are kept.
HiPPO-LegS moved by 5 % has 4e-6; untouched it has no modes."""


@dataclass(frozen=True)
class S4Config:
    """layer: s4d (s4d.py), or diag and dplr (the modes of s4.py)

    d_state: N, so N / 2 complex states are stored; n_ssm: systems that d_model channels share; channels: outputs of
    each system; rank: of the low-rank part of dplr; dt_tie: one step for all states of a channel
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
    disc: Literal["zoh", "bilinear"] = "zoh"


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
    """A = −exp(A_real) − i·A_imag, one of n_ssm for each channel in turn, and B of its own."""

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        h, n = config.d_model, config.d_state // 2
        self.discretized = {"zoh": zoh_modes, "bilinear": bilinear_modes}[config.disc]
        self.inv_dt = nn.Parameter(torch.zeros(h, 1 if config.dt_tie else n))
        self.C = nn.Parameter(torch.zeros(config.channels, h, n, 2))
        self.B = nn.Parameter(torch.zeros(1, config.n_ssm, n, 2))
        self.A_real = nn.Parameter(torch.zeros(config.n_ssm, n))
        self.A_imag = nn.Parameter(torch.zeros(config.n_ssm, n))

    @property
    def rates(self) -> Tensor:
        """λ, complex128 [n_ssm, N / 2]"""
        return torch.complex(-self.A_real.double().exp(), -self.A_imag.double())

    def modal(self, direct: Tensor) -> ModalSSM | None:
        copies, channels = self.C.shape[:2]
        which = systems_of(channels, len(self.A_real))
        gains = _complex(self.B)[:, which] * _complex(self.C)
        poles, residues = self.discretized(self.rates[which], self.inv_dt.double().exp(), gains)
        return with_conjugates(poles.repeat(copies, 1), residues.flatten(0, 1), direct)


class DPLRKernel(DiagKernel):
    """A less P P*, bilinear; `l_kernel` is the length that the stored C was prepared for."""

    l_kernel: Tensor

    def __init__(self, config: S4Config) -> None:
        super().__init__(config)
        self.P = nn.Parameter(torch.zeros(config.rank, config.n_ssm, config.d_state // 2, 2))
        self.register_buffer("l_kernel", torch.tensor(0))

    def system(self) -> DPLR:
        dt, b, c = self.inv_dt.double().exp()[:, 0], _complex(self.B)[0], _complex(self.C)
        return DPLR.of(self.rates, _complex(self.P), b, c, dt, int(self.l_kernel))

    def modal(self, direct: Tensor) -> ModalSSM | None:
        return self.system().modal(direct)


class Convolution(nn.Module):
    """u [batch, seq, d_model] → GELU(h * u + D u), [batch, seq, copies · d_model], copies outermost.

    Once settled it has a system in real form, own, other, readout: float32 [order, copies · d_model], or
    taps: float32 [copies · d_model, length].
    """

    own: Tensor
    other: Tensor
    readout: Tensor
    taps: Tensor

    def __init__(self, kernel: S4DKernel | DiagKernel, direct: tuple[int, ...]) -> None:
        super().__init__()
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
            return gelu(real_form(u, self.own, self.other, self.readout, direct))
        time = u.shape[1]
        if time > self.taps.shape[1]:
            raise ValueError(f"a sequence of {time} is longer than the {self.taps.shape[1]} taps")
        spectrum = torch.fft.rfft(self.taps[:, :time], n=2 * time) * torch.fft.rfft(u.transpose(1, 2), n=2 * time)
        y = torch.fft.irfft(spectrum, n=2 * time)[..., :time].transpose(1, 2)
        return gelu(y + direct * u)


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
        self.layer = Convolution(kernel, (config.channels, config.d_model))
        wide = config.channels * config.d_model
        self.output_linear = nn.Sequential(nn.Linear(wide, 2 * config.d_model), nn.GLU(dim=-1))

    def forward(self, u: Tensor) -> Tensor:
        return self.output_linear(self.layer(u))


class S4Model(nn.Module):
    """features float32 [batch, seq, d_input] → values [batch, seq, d_output], one for each position.

    A layer is x + layer(norm(x)) with prenorm, norm(x + layer(x)) without.
    """

    def __init__(self, config: S4Config) -> None:
        super().__init__()
        self.prenorm = config.prenorm
        self.encoder = nn.Linear(config.d_input, config.d_model)
        layer = S4D if config.layer == "s4d" else S4Block
        self.s4_layers = nn.ModuleList(layer(config) for _ in range(config.n_layers))
        self.norms = nn.ModuleList(nn.LayerNorm(config.d_model) for _ in range(config.n_layers))
        self.decoder = nn.Linear(config.d_model, config.d_output)

    def convolutions(self) -> list[tuple[str, Convolution]]:
        """The convolution of each layer, by its path."""
        return [(path, part) for path, part in self.named_modules() if isinstance(part, Convolution)]

    def forward(self, features: Tensor) -> Tensor:
        x = self.encoder(features)
        for layer, norm in zip(self.s4_layers, self.norms, strict=True):
            x = x + layer(norm(x)) if self.prenorm else norm(x + layer(x))
        return self.decoder(x)


def _complex(pairs: Tensor) -> Tensor:
    """Real and imaginary parts on the last axis → complex128."""
    return torch.view_as_complex(pairs.double().contiguous())
