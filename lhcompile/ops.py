"""The causal operators a recognized program is made of, with eager reference bodies.

The three convolutions map a signal u [batch, time, channels] and the state of all earlier time to (y, new state), so
that a sequence may be fed whole, in cuts, or token by token. `state` None means zero: the start of a sequence. Channels
lie innermost in every tensor, so that a step is elementwise on contiguous memory.

Filters are shared between channels: with F filters and `inner` = R, channel n is heard through filter (n // R) % F,
which covers one filter per channel (R = 1, F = channels), filters shared by whole groups (heads outermost:
R = channels / F) and heads innermost (R = 1, F < channels).

Attention keeps the keys and values of all earlier positions in caches of fixed capacity. What depends on the absolute
position reads it from `position`, the count of tokens that each row has taken; rows may stand at different ones.

Nothing in these bodies depends on how time was cut, except the rounding. Whole sequences have gradients, those of
modal systems with respect to their input alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv1d_input, conv1d_weight

from lhcompile.ssm import RealModal, real_powers, swap

__all__ = ["attention", "fft_convolve", "fir", "long_conv", "modal_ssm", "modal_taps", "per_channel", "position"]


def fft_convolve(u: Tensor, taps: Tensor) -> Tensor:
    """Causal convolution y_t = Σ_{j≤t} taps_j u_{t-j}, cut to u's length.

    u: [..., time]; taps: [..., length], broadcast against u's leading axes → [..., time]
    """
    time = u.shape[-1]
    taps = taps[..., :time]
    size = _fast_size(time + taps.shape[-1] - 1)
    spectrum = torch.fft.rfft(u, n=size) * torch.fft.rfft(taps.to(u.dtype), n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :time]


def _fast_size(least: int) -> int:
    """The smallest 2^n, 3 · 2^n or 5 · 2^n that is not below `least`: other sizes take an FFT several times as long."""
    return min(factor << max(0, (-(-least // factor) - 1).bit_length()) for factor in (1, 3, 5))


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
    u: Tensor,
    own: Tensor,
    other: Tensor,
    readout: Tensor,
    direct: Tensor,
    kept: Tensor | None,
    state: Tensor | None,
    inner: int,
) -> tuple[Tensor, Tensor]:
    """A modal state-space system in real form (`lhcompile.ssm`): the distilled long convolution.

        s_t = own ∘ s_{t-1} + other ∘ swap(s_{t-1}) + u_t,   y_t = Σ_rows readout ∘ s_t + D u_t

    u: [batch, time, channels]; own, other, readout: [order, filters]; direct: [filters]
    kept: int64 [states], ascending, the entries of the flattened [order · filters] tables that are states, where
        filters differ in order (`RealModal.kept`); the tables are zero at all others. None: every entry is.
    state: [batch, order, channels], or packed with `kept`: [batch, 1, outer · states · inner], laid out like the
        channels [outer · filters · inner] → y like u, new state

    Evaluated in closed form (taps by FFT, states by powers of A), in u's dtype with the powers in float64.
    """
    if kept is not None and state is not None:
        state = _unpacked(state, kept, own.shape, u.shape[2], inner)
    evaluate = _modal_step if u.shape[1] == 1 else _modal_whole
    y, last = evaluate(u, own, other, readout, direct, state, inner)
    return y, (last if kept is None else _packed(last, kept, own.shape, inner))


def _modal_whole(
    u: Tensor, own: Tensor, other: Tensor, readout: Tensor, direct: Tensor, state: Tensor | None, inner: int
) -> tuple[Tensor, Tensor]:
    """Any number of tokens of `modal_ssm`, in closed form: T tokens are cut in pieces of about √T, the first padded."""
    time, channels = u.shape[1:]
    near, far = _powers(own, other, time)
    size, count = len(near[0]) - 1, len(far[0])

    def wide(table: Tensor) -> Tensor:
        return per_channel(table.to(u.dtype), channels, inner)

    y = _shared_convolve(u, _factored_taps(near, far, readout, direct, time).to(u.dtype), inner)
    pieces = torch.nn.functional.pad(u, (0, 0, size * count - time, 0)).unflatten(1, (count, size))
    driven = wide((near[0] + near[1])[:-1].flip(0))  # A^t (1, …, 1): [size, order, channels]
    ends = torch.einsum("bakc,knc->banc", pieces, driven)  # of each piece, had it begun with zero
    same, swapped, last = wide(near[0][-1]), wide(near[1][-1]), ends[:, 0]
    for end in ends.unbind(1)[1:]:
        last = _turned(same, swapped, last) + end
    if state is not None:
        starts = _turned(wide(far[0]), wide(far[1]), state.unsqueeze(1))  # what the pieces begin with
        heard = wide(_heard(near, readout)[1:])
        y = y + torch.einsum("knc,banc->bakc", heard, starts).flatten(1, 2)[:, :time]
        rest = time - size * (count - 1)
        last = last + _turned(wide(near[0][rest]), wide(near[1][rest]), starts[:, -1])
    return y.contiguous(), last.contiguous()


Powers = tuple[Tensor, Tensor]
"""Powers of A in the form (own, other), each [powers, order, filters]"""


def _powers(own: Tensor, other: Tensor, time: int) -> tuple[Powers, Powers]:
    """(A^0 … A^K, then A^0, A^K, A^2K, … up to `time` exclusive) in float64, K about √time: all others are products."""
    size = 1 << math.isqrt(time - 1).bit_length()
    near = real_powers(own.double(), other.double(), size)
    return near, real_powers(near[0][-1], near[1][-1], -(-time // size) - 1)


def _turned(own: Tensor, other: Tensor, state: Tensor) -> Tensor:
    """A s, with tables [..., order, channels] and s [..., order, channels] → the same"""
    return own * state + other * swap(state, state.ndim - 2)


def _heard(powers: Powers, readout: Tensor) -> Tensor:
    """readoutᵀ A^t, [powers, order, filters]"""
    readout = readout.double()
    return readout * powers[0] + swap(readout * powers[1], 1)


def _factored_taps(near: Powers, far: Powers, readout: Tensor, direct: Tensor, time: int) -> Tensor:
    """taps readoutᵀ A^(aK + k) (1, …, 1), of both tables of `_powers`: float64 [filters, time]"""
    taps = torch.einsum("knf,anf->fak", _heard(near, readout)[:-1], far[0] + far[1]).flatten(1)[:, :time]
    taps[:, 0] += direct
    return taps


def modal_taps(system: RealModal, length: int) -> Tensor:
    """The impulse response of modal systems, float64 [filters, length]."""
    return _factored_taps(*_powers(system.own, system.other, length), system.readout, system.direct, length)


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


def _unpacked(state: Tensor, kept: Tensor, table: torch.Size, channels: int, inner: int) -> Tensor:
    """[batch, 1, outer · states · inner] → [batch, order, channels], zero where no state is; table: (order, filters)"""
    order, filters = table
    full = state.new_zeros(state.shape[0], channels // (filters * inner), order * filters, inner)
    full[:, :, kept] = state.unflatten(2, (-1, len(kept), inner)).squeeze(1)
    return full.unflatten(2, (order, filters)).transpose(1, 2).flatten(2)


def _packed(state: Tensor, kept: Tensor, table: torch.Size, inner: int) -> Tensor:
    """The inverse of `_unpacked`; what stands where no state is, is dropped."""
    full = state.unflatten(2, (-1, table[1], inner)).transpose(1, 2).flatten(2, 3)  # [batch, outer, entries, inner]
    return full[:, :, kept].flatten(1).unsqueeze(1)


@modal_ssm.register_fake
def _(
    u: Tensor,
    own: Tensor,
    other: Tensor,
    readout: Tensor,
    direct: Tensor,
    kept: Tensor | None,
    state: Tensor | None,
    inner: int,
) -> tuple[Tensor, Tensor]:
    order, filters = own.shape
    shape = (order, u.shape[2]) if kept is None else (1, u.shape[2] // filters * kept.shape[0])
    return u.new_empty(u.shape), u.new_empty(u.shape[0], *shape)


# ---- positions and attention ----------------------------------------------------------------------------------------


@torch.library.custom_op("lhc::position", mutates_args=())
def position(signal: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """The place of every token in its sequence, and the place of the next one.

    signal: [batch, time, …], only its first two sizes are read; start: int64 [batch, 1], the place of the first token
    → positions int64 [batch, time], next int64 [batch, 1]
    """
    batch, time = signal.shape[:2]
    if start is None:
        start = torch.zeros(batch, 1, dtype=torch.int64, device=signal.device)
    return start + torch.arange(time, device=signal.device), start + time


@position.register_fake
def _(signal: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    shape = signal.shape[:2]
    return signal.new_empty(shape, dtype=torch.int64), signal.new_empty((shape[0], 1), dtype=torch.int64)


@torch.library.custom_op("lhc::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, start: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal softmax attention; query head h reads the keys and values of head h // (heads / groups).

        y_t = Σ_{s≤t} w_ts v_s,   w_t = softmax_{s≤t}(scale · q_t·k_s)

    q: [batch, time, heads, width]; k: [batch, time, groups, width]; v: [batch, time, groups, value width]
    keys: [batch, groups, capacity, width]; values: [batch, groups, capacity, value width]; start: int64 [batch, 1]:
        caches of which each row has filled the first `start` places; the new keys and values go to the places behind
    → y [batch, time, heads, value width], the caches with the new entries; without caches, those of k and v alone.
    Raises ValueError when a row would go past the capacity.
    """
    batch, time, _, _ = k.shape
    places = torch.arange(time, device=q.device).expand(batch, time)
    if keys is None or values is None or start is None:
        keys, values = (x.transpose(1, 2).clone(memory_format=torch.contiguous_format) for x in (k, v))
    else:
        places = start + places
        if time and int(places.max()) >= keys.shape[2]:
            raise ValueError(f"position {int(places.max())} is past the {keys.shape[2]} that attention's caches hold")
        keys, values = (_written(cache, new, places) for cache, new in ((keys, k), (values, v)))
    return _attended(q, keys, values, places, scale), keys, values


def _written(cache: Tensor, new: Tensor, places: Tensor) -> Tensor:
    """A cache [batch, groups, capacity, width] with new [batch, time, groups, width] at places [batch, time]."""
    cache = cache.clone()
    cache[torch.arange(len(places), device=places.device)[:, None], :, places] = new.to(cache.dtype)
    return cache


def _attended(q: Tensor, keys: Tensor, values: Tensor, places: Tensor, scale: float) -> Tensor:
    """What queries at places [batch, time] hear of the caches' entries up to their own, [batch, time, heads, width]."""
    grouped = q.unflatten(2, (keys.shape[1], -1))
    scores = torch.einsum("btgrd,bgcd->bgrtc", grouped * scale, keys)
    later = torch.arange(keys.shape[2], device=q.device) > places[:, None, None, :, None]
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("bgrtc,bgce->btgre", weights, values).flatten(2, 3)


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, start: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = q.new_empty((*q.shape[:3], v.shape[3]))
    if keys is None or values is None:
        keys, values = k.transpose(1, 2), v.transpose(1, 2)
    return y, keys.new_empty(keys.shape), values.new_empty(values.shape)


# ---- gradients, of whole sequences only -----------------------------------------------------------------------------


def _save_fir(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, int], output: Any) -> None:
    u, weight, _, state, ctx.groups = inputs
    _whole(state)
    ctx.save_for_backward(u, weight)


def _fir_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """y = conv1d of u padded in front; grad [batch, time, out]."""
    u, weight = ctx.saved_tensors
    past, grad = weight.shape[-1] - 1, grad.transpose(1, 2)
    window = torch.nn.functional.pad(u.transpose(1, 2), (past, 0))
    by_window = conv1d_input(window.shape, weight, grad, groups=ctx.groups)
    by_weight = conv1d_weight(window, weight.shape, grad, groups=ctx.groups) if ctx.needs_input_grad[1] else None
    by_bias = grad.sum((0, 2)) if ctx.needs_input_grad[2] else None
    return by_window[..., past:].transpose(1, 2), by_weight, by_bias, None, None


def _save_long_conv(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, int], output: Any) -> None:
    u, taps, state, ctx.inner = inputs
    _whole(state)
    ctx.save_for_backward(u, taps)


def _long_conv_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """Both are correlations: ∂u_s = Σ_t g_t h_{t-s}, ∂h_k = Σ_t g_t u_{t-k}, summed over the channels of a filter."""
    u, taps = ctx.saved_tensors
    grouped = (1, (-1, taps.shape[0], ctx.inner))
    heard, felt = u.transpose(1, 2).unflatten(*grouped), grad.transpose(1, 2).unflatten(*grouped)
    by_u = _correlated(grad, taps, ctx.inner)
    by_taps = None
    if ctx.needs_input_grad[1]:
        size = 2 * u.shape[1]
        spectrum = (torch.fft.rfft(felt, n=size) * torch.fft.rfft(heard, n=size).conj()).sum((0, 1, 3))
        found = torch.fft.irfft(spectrum, n=size)[:, : min(u.shape[1], taps.shape[1])]
        by_taps = torch.nn.functional.pad(found, (0, taps.shape[1] - found.shape[1])).to(taps.dtype)
    return by_u, by_taps, None, None


def _correlated(grad: Tensor, taps: Tensor, inner: int) -> Tensor:
    """Σ_t g_t h_{t-s}: grad [batch, time, channels], taps [filters, length] → like grad"""
    return _shared_convolve(grad.flip(1), taps, inner).flip(1)


def _save_modal(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, *tables, _, state, ctx.inner = inputs
    _whole(state)
    if any(ctx.needs_input_grad[1:5]):
        raise NotImplementedError("a modal system has no gradients with respect to its poles and residues")
    ctx.save_for_backward(*tables)


def _modal_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    taps = modal_taps(RealModal(*ctx.saved_tensors), grad.shape[1])
    return _correlated(grad, taps, ctx.inner), *[None] * 7


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, keys, _, _, ctx.scale = inputs
    _whole(keys)
    ctx.save_for_backward(q, k, v)


def _attention_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """The attention is computed again, so that no matrix of weights is kept."""
    q, k, v = (x.detach().requires_grad_() for x in ctx.saved_tensors)
    places = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
    with torch.enable_grad():
        y = _attended(q, k.transpose(1, 2), v.transpose(1, 2), places, ctx.scale)
    return *torch.autograd.grad(y, (q, k, v), grad), None, None, None, None


def _whole(state: Tensor | None) -> None:
    if state is not None:
        raise NotImplementedError("gradients are of whole sequences: the operator has a state")


fir.register_autograd(_fir_backward, setup_context=_save_fir)
long_conv.register_autograd(_long_conv_backward, setup_context=_save_long_conv)
modal_ssm.register_autograd(_modal_backward, setup_context=_save_modal)
attention.register_autograd(_attention_backward, setup_context=_save_attention)
