"""The three causal operators a recognized program is made of, with eager reference bodies.

Each maps a signal u [batch, time, channels] and the state of all earlier time to (y, new state), so that a sequence
may be fed whole, in cuts, or token by token. `state` None means zero: the start of a sequence. Channels lie innermost
in every tensor, so that a step is elementwise on contiguous memory.

Filters are shared between channels: with F filters and `inner` = R, channel n is heard through filter (n // R) % F,
which covers one filter per channel (R = 1, F = channels), filters shared by whole groups (heads outermost:
R = channels / F) and heads innermost (R = 1, F < channels).

Nothing in these bodies depends on how time was cut, except the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lhcompile.ssm import real_powers, swap

__all__ = ["fft_convolve", "fir", "long_conv", "modal_ssm", "per_channel"]


def fft_convolve(u: Tensor, taps: Tensor) -> Tensor:
    """Causal convolution y_t = Σ_{j≤t} taps_j u_{t-j}, cut to u's length.

    u: [..., time]; taps: [..., length], broadcast against u's leading axes → [..., time]
    """
    time = u.shape[-1]
    taps = taps[..., :time]
    size = time + taps.shape[-1] - 1
    spectrum = torch.fft.rfft(u, n=size) * torch.fft.rfft(taps.to(u.dtype), n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :time]


def per_channel(table: Tensor, channels: int, inner: int) -> Tensor:
    """One column per channel from one per filter: [..., filters] → [..., channels]"""
    if table.shape[-1] == channels:
        return table
    outer = channels // (table.shape[-1] * inner)
    repeated = table.repeat_interleave(inner, -1)
    return repeated.repeat(*[1] * (table.ndim - 1), outer)


def _shared_convolve(u: Tensor, taps: Tensor, inner: int) -> Tensor:
    """Convolve each channel with its filter; u [batch, time, channels], taps [filters, length] → like u"""
    grouped = u.transpose(1, 2).unflatten(1, (-1, taps.shape[0], inner))
    return fft_convolve(grouped, taps[:, None, :]).flatten(1, 3).transpose(1, 2)


@torch.library.custom_op("lhc::fir", mutates_args=())
def fir(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    """Short causal convolution; the weight in torch's order, weight[..., -1] multiplies the current token.

    u: [batch, time, channels]; weight: [out, channels / groups, taps]; bias: [out] or None
    state: [batch, taps - 1, channels], the latest inputs, newest last → y [batch, time, out], new state
    """
    past = weight.shape[-1] - 1
    if state is None:
        state = u.new_zeros(u.shape[0], past, u.shape[2])
    window = torch.cat([state, u], dim=1)
    y = torch.nn.functional.conv1d(window.transpose(1, 2), weight, bias, groups=groups)
    return y.transpose(1, 2).contiguous(), window[:, window.shape[1] - past :].clone()


@fir.register_fake
def _(u: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, groups: int) -> tuple[Tensor, Tensor]:
    return (
        u.new_empty(u.shape[0], u.shape[1], weight.shape[0]),
        u.new_empty(u.shape[0], weight.shape[-1] - 1, u.shape[2]),
    )


@torch.library.custom_op("lhc::long_conv", mutates_args=())
def long_conv(u: Tensor, taps: Tensor, state: Tensor | None, inner: int) -> tuple[Tensor, Tensor]:
    """Long causal convolution with its taps kept whole.

    u: [batch, time, channels]; taps: [filters, length], taps[:, 0] multiplies the current token
    state: [batch, length - 1, channels], the latest inputs, newest last → y like u, new state
    """
    past = taps.shape[-1] - 1
    if state is None:
        y = _shared_convolve(u, taps, inner)
        window = torch.nn.functional.pad(u, (0, 0, past, 0))
    else:
        window = torch.cat([state, u], dim=1)
        if u.shape[1] == 1:
            heard = per_channel(taps.flip(-1).T.to(u.dtype), u.shape[2], inner)
            y = torch.einsum("btc,tc->bc", window, heard).unsqueeze(1)
        else:
            y = _shared_convolve(window, taps, inner)[:, past:]
    return y.contiguous(), window[:, window.shape[1] - past :].clone()


@long_conv.register_fake
def _(u: Tensor, taps: Tensor, state: Tensor | None, inner: int) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape[0], taps.shape[-1] - 1, u.shape[2])


@torch.library.custom_op("lhc::modal_ssm", mutates_args=())
def modal_ssm(
    u: Tensor, own: Tensor, other: Tensor, readout: Tensor, direct: Tensor, state: Tensor | None, inner: int
) -> tuple[Tensor, Tensor]:
    """A modal state-space system in real form (`lhcompile.ssm`): the distilled long convolution.

        s_t = own ∘ s_{t-1} + other ∘ swap(s_{t-1}) + u_t,   y_t = Σ_rows readout ∘ s_t + D u_t

    u: [batch, time, channels]; own, other, readout: [order, filters]; direct: [filters]
    state: [batch, order, channels] → y like u, new state

    Evaluated in closed form (taps by FFT, states by powers of A), in u's dtype with the powers in float64.
    """
    channels = u.shape[2]
    if u.shape[1] == 1:
        return _modal_step(u, own, other, readout, direct, state, inner)
    owns, others = real_powers(own.double(), other.double(), u.shape[1])
    driven = owns[:-1] + others[:-1]  # A^t (1, …, 1): [time, order, filters]
    taps = (driven * readout.double()).sum(1).T
    taps[:, 0] += direct
    y = _shared_convolve(u, taps.to(u.dtype), inner)
    left = per_channel(driven.flip(0).to(u.dtype), channels, inner)
    last = torch.einsum("btc,tnc->bnc", u, left)
    if state is not None:
        heard = readout.double() * owns[1:] + swap(readout.double() * others[1:], 1)
        y = y + torch.einsum("tnc,bnc->btc", per_channel(heard.to(u.dtype), channels, inner), state)
        p, q = (per_channel(x[-1].to(u.dtype), channels, inner) for x in (owns, others))
        last = last + p * state + q * swap(state, 1)
    return y.contiguous(), last.contiguous()


def _modal_step(
    u: Tensor, own: Tensor, other: Tensor, readout: Tensor, direct: Tensor, state: Tensor | None, inner: int
) -> tuple[Tensor, Tensor]:
    """One token of `modal_ssm`, as the recurrence is written."""
    channels = u.shape[2]
    if state is None:
        state = u.new_zeros(u.shape[0], own.shape[0], channels)
    p, q, c, d = (per_channel(x.to(u.dtype), channels, inner) for x in (own, other, readout, direct))
    s = p * state + q * swap(state, 1) + u
    return (c * s).sum(1, keepdim=True) + d * u, s


@modal_ssm.register_fake
def _(
    u: Tensor, own: Tensor, other: Tensor, readout: Tensor, direct: Tensor, state: Tensor | None, inner: int
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(u.shape[0], own.shape[0], u.shape[2])
