"""The H3 operator, as a module of the published names. Both of its state-space models are run exactly.

    k ← shift * k + ssm_k_D · k;    y = (diag * (k · v) + D · k · v) · q;    output_linear(y)

shift: an FIR filter of d_state taps, shift_t = Σ_n B_n C_{n+t}, one per channel
diag:  diag_t = 2 Re Σ_n R_n p_n^t over d_state/2 complex modes, with A = −r + i A_imag, dt = exp(log_dt), and r by
    real_type of inv_A_real: exp, softplus, sigmoid, relu (plus 1e-4) or none, the value itself:
    bilinear  p = (1 + dt A/2) / (1 − dt A/2),   R = C B dt / (1 − dt A/2)
    zoh       p = exp(dt A),                     R = C B (exp(dt A) − 1) / A
With head_dim > 1, k · v is the outer product of the channels of a head, all convolved alike, and · q sums over k's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lhcompile.load.lm import LanguageModel, LMConfig
from lhcompile.load.modal import audible, complex_modes, positive

__all__ = ["H3LM", "H3Config", "H3Mixer"]


@dataclass(frozen=True, kw_only=True)
class H3Config(LMConfig):
    """Options of the model, under H3's names, those of `ssm_cfg` beside the others.

    d_state: states of each state-space model; n_ssm: how many (A, B) there are, head h has number h % n_ssm
    l_max: longest kernel, None for no limit; force_real: A has no imaginary part; bandlimit: modes that turn by half of
    this, or more, of a full turn in a step are silent, None for no limit
    """

    d_state: int = 64
    head_dim: int = 1
    n_ssm: int
    l_max: int | None = None
    disc: Literal["bilinear", "zoh"] = "bilinear"
    real_type: Literal["none", "exp", "relu", "sigmoid", "softplus"] = "exp"
    force_real: bool = False
    bandlimit: float | None = None


class ShiftKernel(nn.Module):
    """B: [d_model, d_state]; C: [1, d_model, d_state]"""

    def __init__(self, config: H3Config) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.zeros(config.d_model, config.d_state))
        self.C = nn.Parameter(torch.zeros(1, config.d_model, config.d_state))

    def forward(self) -> Tensor:
        """Taps by lag, float64 [d_model, d_state]."""
        states = self.B.shape[1]
        ahead = F.pad(self.C[0].double(), (0, states - 1)).unfold(-1, states, 1)  # [d_model, t, n]: C_{n+t}
        return (ahead * self.B.double().unsqueeze(1)).sum(-1)


class DiagonalKernel(nn.Module):
    """C: [1, heads, modes, 2]; B: [n_ssm, modes, 2] (real, imaginary); log_dt: [heads]; the A's: [n_ssm, modes]"""

    def __init__(self, config: H3Config) -> None:
        super().__init__()
        heads, modes = config.d_model // config.head_dim, config.d_state // 2
        self.copies, self.config = heads // config.n_ssm, config
        self.C = nn.Parameter(torch.zeros(1, heads, modes, 2))
        self.B = nn.Parameter(torch.zeros(config.n_ssm, modes, 2))
        self.log_dt = nn.Parameter(torch.zeros(heads))
        self.inv_A_real = nn.Parameter(torch.zeros(config.n_ssm, modes))
        self.A_imag = nn.Parameter(torch.zeros(config.n_ssm, modes))

    def forward(self) -> tuple[Tensor, Tensor]:
        """(p, 2 R), complex128 [heads, modes] both, so that the kernel is Re Σ 2 R p^t."""
        turning = self.A_imag.double() * (not self.config.force_real)
        rates = torch.complex(-positive(self.inv_A_real.double(), self.config.real_type), turning)
        rates = rates.repeat(self.copies, 1)
        drive = torch.view_as_complex(self.B.double()).repeat(self.copies, 1)
        gain = torch.view_as_complex(self.C[0].double()) * drive
        dt = self.log_dt.double().exp().unsqueeze(1)
        if self.config.bandlimit is not None:
            gain = gain * audible(rates, dt, self.config.bandlimit)
        if self.config.disc == "zoh":
            poles = (dt * rates).exp()
            return poles, 2 * gain * (poles - 1) / rates
        below = 1 - dt * rates / 2
        return (1 + dt * rates / 2) / below, 2 * gain * dt / below


class Kernel(nn.Module):
    """Holds a kernel under the name it has in the files."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel


class H3Mixer(nn.Module):
    """[batch, seq, d_model] → [batch, seq, d_model]; channels are (head, channel of the head)"""

    def __init__(self, config: H3Config) -> None:
        super().__init__()
        d = config.d_model
        self.split = (d // config.head_dim, config.head_dim)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.ssm_k_kernel = Kernel(ShiftKernel(config))
        self.ssm_k_D = nn.Parameter(torch.zeros(d))
        self.kernel = Kernel(DiagonalKernel(config))
        self.D = nn.Parameter(torch.zeros(d // config.head_dim))
        self.output_linear = nn.Linear(d, d)

    def forward(self, u: Tensor) -> Tensor:
        q, k, v = self.q_proj(u), self._shifted(self.k_proj(u)), self.v_proj(u)
        heads, width = self.split
        if width == 1:
            return self.output_linear(self._diagonal(k * v) * q)
        q, k, v = (x.unflatten(-1, self.split).transpose(-1, -2) for x in (q, k, v))  # [batch, seq, channel, head]
        y = self._diagonal((k.unsqueeze(3) * v.unsqueeze(2)).flatten(2)).unflatten(2, (width, width, heads))
        return self.output_linear((y * q.unsqueeze(3)).sum(2).flatten(2))

    def _shifted(self, k: Tensor) -> Tensor:
        """The shift filter and its skip: a short convolution."""
        taps = self.ssm_k_kernel.kernel()
        taps = torch.cat([taps[:, :1] + self.ssm_k_D.double().unsqueeze(1), taps[:, 1:]], dim=1)
        weight = taps.flip(-1).unsqueeze(1).to(k.dtype)
        time, past = k.shape[1], taps.shape[1] - 1
        return F.conv1d(k.transpose(1, 2), weight, padding=past, groups=taps.shape[0])[..., :time].transpose(1, 2)

    def _diagonal(self, u: Tensor) -> Tensor:
        """The modal system of each head and its skip; u: [batch, seq, channels], the head fastest"""
        poles, residues = self.kernel.kernel()
        return complex_modes(u, poles, residues, self.D)


class H3LM(LanguageModel):
    """input_ids int64 [batch, seq] → logits [batch, seq, vocab_size]."""

    def __init__(self, config: H3Config, context: int) -> None:
        super().__init__(config, lambda: H3Mixer(config), context)
