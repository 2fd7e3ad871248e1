"""The operators that fusion makes of several, as torch.library operators with eager reference bodies.

lhc::hyena_mixer   everything between a block's input and output projection: short convolution, gates, modal system
lhc::linear        a projection with the norm before it, and the activation and the residual behind it

A fused program stays runnable in torch; in ONNX both are operators of the project's own (`lower.functions`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ACTIVATIONS", "NORMS", "hyena_mixer", "linear"]

NORMS = ("none", "layer", "rms")
ACTIVATIONS = ("none", "gelu", "gelu_tanh")
lhc = torch.ops.lhc


@torch.library.custom_op("lhc::hyena_mixer", mutates_args=())
def hyena_mixer(
    projected: Tensor,
    conv_state: Tensor,
    recurrent_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    own: Tensor,
    other: Tensor | None,
    readout: Tensor,
    direct: Tensor,
    index: Tensor | None,
    outer: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = z_outer ∘ modal(z_a ∘ z_b) for z = fir(projected), whose three parts lie one behind the other.

    projected: [batch, time, 3 · D]; conv_state: [batch, k − 1, 3 · D]; recurrent_state: [batch, order, D], or packed
        [batch, 1, states] with `index`
    conv_weight: [k, 3 · D], oldest tap first; conv_bias: [3 · D]; own, other, readout: [order, D]; direct: [D]
    index: int32 [order, D], the place of each state in the packed ones, −1 where there is none
    other None: it is zero. → mixed [batch, time, D], new states
    """
    filtered, conv = lhc.fir(projected, conv_weight.T.unsqueeze(1), conv_bias, conv_state, conv_weight.shape[1])
    parts = list(filtered.chunk(3, dim=-1))
    gate = parts.pop(outer)
    before = recurrent_state
    if index is not None:
        spread = before[:, 0, index.long().clamp(min=0).flatten()].unflatten(-1, index.shape)
        before = torch.where(index >= 0, spread, 0.0)
    other = torch.zeros_like(own) if other is None else other
    y, after = lhc.modal_ssm(parts[0] * parts[1], own, other, readout, direct, None, before, 1)
    if index is not None:
        kept = (index >= 0).flatten()
        after = torch.zeros_like(recurrent_state).index_copy(
            2, index.flatten()[kept].long(), after.flatten(1)[:, None, kept]
        )
    return gate * y, conv, after


@hyena_mixer.register_fake
def _(projected: Tensor, conv_state: Tensor, recurrent_state: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, channels = projected.shape
    mixed = projected.new_empty(batch, time, channels // 3)
    return mixed, conv_state.new_empty(conv_state.shape), recurrent_state.new_empty(recurrent_state.shape)


@torch.library.custom_op("lhc::linear", mutates_args=())
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_scale: Tensor | None,
    norm_bias: Tensor | None,
    norm: str,
    epsilon: float,
    activation: str,
) -> Tensor:
    """residual + activation(norm(x) Wᵀ + bias)

    x: [batch, time, K]; weight: [N, K]; bias: [N]; residual: [batch, time, N]; norm_scale, norm_bias: [K]
    norm: one of NORMS, "rms" is x / √(mean(x²) + ε); activation: one of ACTIVATIONS → [batch, time, N]
    """
    if norm == "layer":
        x = F.layer_norm(x, x.shape[-1:], norm_scale, norm_bias, epsilon)
    elif norm == "rms":
        x = F.rms_norm(x, x.shape[-1:], norm_scale, epsilon)
    y = F.linear(x, weight, bias)
    if activation != "none":
        y = F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if residual is None else residual + y


@linear.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])
