"""The logits of StripedHyena, Evo-1 and Evo 2 as their equations say, in float64 and in plain loops.

Written from the description of the formats, to judge the loaders: it shares no code with them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from striped_checkpoints import Published
from torch import nn

__all__ = ["TOLERANCE", "difference", "logits"]

Array = Any
TOLERANCE = 1e-4
"""For logits of size 1."""


def difference(module: nn.Module, model: Published, time: int = 150) -> float:
    """The largest difference of the module's logits from the reference, on two sequences of random tokens."""
    tokens = torch.randint(model.options["vocab_size"], (2, time), generator=torch.Generator().manual_seed(1))
    reference = logits(model, tokens.numpy())
    assert 0.5 < reference.std() < 2
    return float(np.abs(module(tokens).double().numpy() - reference).max())


def logits(model: Published, tokens: Array) -> Array:
    """tokens: int [batch, time] → float64 [batch, time, vocab]"""
    weights = {k: v.double().numpy() for k, v in model.state.items() if not k.endswith(("_extra_state", "inv_freq"))}
    return np.stack([_sequence(weights, model.options, row) for row in tokens])


def _sequence(weights: dict[str, Array], options: dict[str, Any], tokens: Array) -> Array:
    """tokens: [time] → [time, vocab]"""
    x = weights["embedding_layer.weight"][tokens]
    for layer in range(options["num_layers"]):
        block = {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"blocks.{layer}.")}
        normed = _norm(x, block["pre_norm.scale"], options)
        attends = layer in options["attn_layer_idxs"]
        x = x + (_attention(normed, block, options) if attends else _hyena(normed, block, options, layer))
        x = x + _mlp(_norm(x, block["post_norm.scale"], options), block, _activation(options, layer))
    x = _norm(x, weights["norm.scale"], options)
    return x @ weights["embedding_layer.weight" if options["tie_embeddings"] else "unembed.weight"].T


def _norm(x: Array, scale: Array, options: dict[str, Any]) -> Array:
    mean = (x * x).sum(-1, keepdims=True) / x.shape[-1]
    if options["use_flash_rmsnorm"]:
        return x / np.sqrt(mean + options["eps"]) * scale
    return x / (np.sqrt(mean) + options["eps"]) * scale


def _activation(options: dict[str, Any], layer: int) -> str:
    if options.get("evo2_style_activations") and layer > 0:
        return "none"
    return options.get("mlp_activation", "silu")


def _mlp(x: Array, block: dict[str, Array], activation: str) -> Array:
    a, b = x @ block["mlp.l1.weight"].T, x @ block["mlp.l2.weight"].T
    if activation == "gelu":
        a = a * (1 + np.vectorize(math.erf)(a / math.sqrt(2))) / 2
    elif activation == "silu":
        a = a / (1 + np.exp(-a))
    return (a * b) @ block["mlp.l3.weight"].T


# ---- attention -----------------------------------------------------------------------------------------------------


def _attention(x: Array, block: dict[str, Array], options: dict[str, Any]) -> Array:
    heads = options["num_attention_heads"]
    head, kv = x.shape[1] // heads, heads // options["proj_groups"]
    z = x @ block["inner_mha_cls.Wqkv.weight"].T + block.get("inner_mha_cls.Wqkv.bias", 0.0)
    if "hcl_layer_idxs" in options and options.get("column_split", True):
        q, k, v = ([z[:, (3 * h + part) * head :][:, :head] for h in range(heads)] for part in range(3))
    else:
        q = [z[:, h * head :][:, :head] for h in range(heads)]
        k = [z[:, (heads + h) * head :][:, :head] for h in range(kv)]
        v = [z[:, (heads + kv + h) * head :][:, :head] for h in range(kv)]
    y = np.zeros_like(x)
    for h in range(heads):
        keys, values = _turned(k[h // options["proj_groups"]], options), v[h // options["proj_groups"]]
        queries = _turned(q[h], options)
        for t in range(len(x)):
            score = np.exp(keys[: t + 1] @ queries[t] / math.sqrt(head))
            y[t, h * head : (h + 1) * head] = score @ values[: t + 1] / score.sum()
    return y @ block["inner_mha_cls.out_proj.weight"].T + block.get("inner_mha_cls.out_proj.bias", 0.0)


def _turned(x: Array, options: dict[str, Any]) -> Array:
    """x: [time, dim]; the pair (i, i + dim / 2) is a plane"""
    dim = x.shape[1]
    scaling = options["rotary_emb_scaling_factor"] if options.get("use_interpolated_rotary_pos_emb") else 1
    turned = np.empty_like(x)
    for t in range(len(x)):
        for i in range(dim // 2):
            angle = t / scaling / options.get("rotary_emb_base", 10000) ** (2 * i / dim)
            plane = complex(x[t, i], x[t, i + dim // 2]) * complex(math.cos(angle), math.sin(angle))
            turned[t, i], turned[t, i + dim // 2] = plane.real, plane.imag
    return turned


# ---- convolutions --------------------------------------------------------------------------------------------------


def _hyena(x: Array, block: dict[str, Array], options: dict[str, Any], layer: int) -> Array:
    z = x @ block["projections.weight"].T + block.get("projections.bias", 0.0)
    z = _sum_of_lags(z, block["filter.short_filter_weight"][:, 0, ::-1]) + block.get("filter.short_filter_bias", 0.0)
    after, before, v = _channels(z, options)
    u = before * v
    if layer in options.get("hcs_layer_idxs", []):
        y = _sum_of_lags(u, _expanded(block["filter.h"], u)[:, ::-1])
    elif layer in options.get("hcm_layer_idxs", []):
        y = _sum_of_lags(u, _expanded(block["filter.h"], u)) + block["filter.D"] * u
    elif layer in options.get("hcl_layer_idxs", []):
        y = _recurrence(u, np.exp(block["filter.log_poles"][..., 0]), block["filter.residues"]) + block["filter.D"] * u
    else:
        pole, residue = (block[f"filter.{name}"][:, :, 0] @ np.array([1, 1j]) for name in ("poles", "residues"))
        y = _recurrence(u, pole, residue) + block["filter.D"] * u
    return (y * after) @ block["out_filter_dense.weight"].T + block.get("out_filter_dense.bias", 0.0)


def _channels(z: Array, options: dict[str, Any]) -> tuple[Array, Array, Array]:
    """(gate after, gate before, value) of z [time, 3 · width]"""
    width = z.shape[1] // 3
    if options.get("interleave"):
        z = np.concatenate([z[:, 0::3], z[:, 1::3], z[:, 2::3]], axis=1)
    if options.get("column_split_hyena", True):
        head = width // options["num_attention_heads"]
        place = [[c // head * 3 * head + part * head + c % head for c in range(width)] for part in range(3)]
        x2, x1, v = (z[:, columns] for columns in place)
    else:
        x2, x1, v = z[:, :width], z[:, width : 2 * width], z[:, 2 * width :]
    return (x1, x2, v) if options.get("hyena_flip_x1x2") else (x2, x1, v)


def _expanded(h: Array, u: Array) -> Array:
    """[groups, 1, taps] → [width, taps]: neighbours share a filter"""
    size = u.shape[1] // len(h)
    return np.stack([h[c // size, 0] for c in range(u.shape[1])])


def _sum_of_lags(u: Array, taps: Array) -> Array:
    """Σ_j taps_j u_{t-j}; u [time, channels], taps [channels, length], the current token's first"""
    y = np.zeros_like(u)
    for lag in range(min(taps.shape[1], len(u))):
        y[lag:] += taps[:, lag] * u[: len(u) - lag]
    return y


def _recurrence(u: Array, poles: Array, residues: Array) -> Array:
    """s ← p s + u, then y = Re Σ R s; u [time, channels], poles and residues [channels, states]"""
    s, y = np.zeros_like(poles), np.empty_like(u)
    for t in range(len(u)):
        s = poles * s + u[t][:, None]
        y[t] = (residues * s).sum(1).real
    return y
