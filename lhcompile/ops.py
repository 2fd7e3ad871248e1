"""The three causal operators a recognized program is made of, with eager reference bodies.

Each maps a signal u [batch, channels, time] and the state of all earlier time to (y, new state), so that a
sequence may be fed whole, in cuts, or token by token. `state` None means zero: the start of a sequence.
Filters are shared between channels: with C filters and `inner` = R, channel n is heard through filter
(n // R) % C, which covers one filter per channel (R = 1, C = channels), filters shared by whole groups
(heads outermost: R = channels / C) and heads innermost (R = 1, C < channels).

Nothing in these bodies depends on how time was cut, except the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lhcompile.ssm import block_powers

__all__ = ["fft_convolve", "fir", "long_conv", "modal_ssm"]


def fft_convolve(u: Tensor, taps: Tensor) -> Tensor:
    """Causal convolution y_t = Σ_{j≤t} taps_j u_{t-j}, cut to u's length.

    u: [..., time]; taps: [..., length], broadcast against u's leading axes → [..., time]
    """
    time = u.shape[-1]
    taps = taps[..., :time]
    size = time + taps.shape[-1] - 1
    spectrum = torch.fft.rfft(u, n=size) * torch.fft.rfft(taps.to(u.dtype), n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :time]


def _grouped(u: Tensor, filters: int, inner: int) -> Tensor:
    """[batch, channels, ...] → [batch, outer, filters, inner, ...]"""
    return u.unflatten(1, (-1, filters, inner))


@torch.library.custom_op("lhc::fir", mutates_args=())
def fir(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """Short causal convolution in torch's layout: weight[..., -1] multiplies the current token.

    u: [batch, channels, time]; weight: [out, channels / groups, taps]; bias: [out] or None
    state: [batch, channels, taps - 1], the latest inputs, newest last → y [batch, out, time], new state
    """
    past = weight.shape[-1] - 1
    if state is None:
        state = u.new_zeros(u.shape[0], u.shape[1], past)
    window = torch.cat([state, u], dim=-1)
    y = torch.nn.functional.conv1d(window, weight, bias, groups=groups)
    return y, window[..., window.shape[-1] - past :].clone()


@fir.register_fake
def _(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    return (
        u.new_empty(u.shape[0], weight.shape[0], u.shape[2]),
        u.new_empty(u.shape[0], u.shape[1], weight.shape[-1] - 1),
    )


@torch.library.custom_op("lhc::long_conv", mutates_args=())
def long_conv(u: Tensor, taps: Tensor, state: Tensor | None, inner: int) -> tuple[Tensor, Tensor]:
    """Long causal convolution with its taps kept whole.

    u: [batch, channels, time]; taps: [filters, length], taps[:, 0] multiplies the current token
    state: [batch, channels, length - 1], the latest inputs, newest last → y like u, new state
    """
    past = taps.shape[-1] - 1
    if state is None:
        y = fft_convolve(_grouped(u, taps.shape[0], inner), taps[:, None, :]).reshape(u.shape)
        window = torch.nn.functional.pad(u, (past, 0))
    else:
        window = torch.cat([state, u], dim=-1)
        grouped = _grouped(window, taps.shape[0], inner)
        if u.shape[-1] == 1:
            y = torch.einsum("bgcrt,ct->bgcr", grouped, taps.flip(-1).to(u.dtype)).reshape(u.shape)
        else:
            y = fft_convolve(grouped, taps[:, None, :]).reshape(window.shape)[..., past:].contiguous()
    return y, window[..., window.shape[-1] - past :].clone()


@long_conv.register_fake
def _(u: Tensor, taps: Tensor, state: Tensor | None, inner: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), u.new_empty(u.shape[0], u.shape[1], taps.shape[-1] - 1)


@torch.library.custom_op("lhc::modal_ssm", mutates_args=())
def modal_ssm(
    u: Tensor, transition: Tensor, readout: Tensor, direct: Tensor, state: Tensor | None, inner: int
) -> tuple[Tensor, Tensor]:
    """A modal state-space system in real block form (`lhcompile.ssm`): the distilled long convolution.

        s_t = A s_{t-1} + (1, 1)ᵀ u_t,   y_t = Σ_slots c·s_t + D u_t

    u: [batch, channels, time]; transition: [filters, 2, 2, slots]; readout: [filters, 2, slots];
    direct: [filters]; state: [batch, channels, 2, slots] → y like u, new state

    Evaluated in closed form (taps by FFT, states by powers of A), in u's dtype with the powers in float64.
    """
    batch, channels, time = u.shape
    filters, slots = transition.shape[0], transition.shape[-1]
    if time == 1:
        return _modal_step(u, transition, readout, direct, state, inner)
    powers = block_powers(transition.double(), time)  # [time + 1, F, 2, 2, N]
    driven = powers.sum(3)  # A^t (1, 1)ᵀ: [time + 1, F, 2, N]
    taps = torch.einsum("tfin,fin->ft", driven[:-1], readout.double())
    taps[:, 0] += direct
    grouped = _grouped(u, filters, inner)
    y = fft_convolve(grouped, taps[:, None, :].to(u.dtype))
    backwards = driven[:-1].flip(0).to(u.dtype)
    last = torch.einsum("bgfrt,tfin->bgfrin", grouped, backwards)
    if state is not None:
        s = state.unflatten(1, (-1, filters, inner))
        heard = torch.einsum("fin,tfijn->tfjn", readout.double(), powers[1:]).to(u.dtype)
        y = y + torch.einsum("tfjn,bgfrjn->bgfrt", heard, s)
        last = last + torch.einsum("fijn,bgfrjn->bgfrin", powers[-1].to(u.dtype), s)
    return y.reshape(u.shape), last.reshape(batch, channels, 2, slots)


def _modal_step(
    u: Tensor, transition: Tensor, readout: Tensor, direct: Tensor, state: Tensor | None, inner: int
) -> tuple[Tensor, Tensor]:
    """One token of `modal_ssm`, as the recurrence is written."""
    batch, channels, _ = u.shape
    filters, slots = transition.shape[0], transition.shape[-1]
    grouped = _grouped(u, filters, inner)  # [B, G, F, R, 1]
    if state is None:
        state = u.new_zeros(batch, channels, 2, slots)
    s = torch.einsum("fijn,bgfrjn->bgfrin", transition.to(u.dtype), _grouped(state, filters, inner))
    s = s + grouped.unsqueeze(-1)
    y = torch.einsum("fin,bgfrin->bgfr", readout.to(u.dtype), s).unsqueeze(-1)
    y = y + direct.to(u.dtype)[:, None, None] * grouped
    return y.reshape(u.shape), s.reshape(batch, channels, 2, slots)


@modal_ssm.register_fake
def _(
    u: Tensor, transition: Tensor, readout: Tensor, direct: Tensor, state: Tensor | None, inner: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), u.new_empty(u.shape[0], u.shape[1], 2, transition.shape[-1])
