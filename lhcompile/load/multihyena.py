"""MultiHyena: one long filter a head, shared by the outer products of its keys and values; in safari's language model.

    z_ij = k_i v_j,   y_j = Σ_i q_i (h * z_ij + D z_ij),   out_proj(norm(y))      for each head, h and D its own

q, k, v are the parts x_0, x_1, v of the short-filtered projection. D and the norm are there if the file has them.
A file whose filters are named `filter` is of the operator that has no D and adds its whole input (`skip` 1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lhcompile.artifacts import LoadedModel
from lhcompile.load.checkpoint import Checkpoint
from lhcompile.load.lm import LanguageModel
from lhcompile.load.lm_checkpoint import EMBEDDING, Reading, lm_shapes, settle_lm, with_plain_keys
from lhcompile.load.options import GivenOptions, given_options
from lhcompile.load.safari import HyenaConfig, HyenaFilter, fft_convolution
from lhcompile.load.safari_checkpoint import (
    HYENA_IGNORED,
    HYENA_SUPPORTED,
    filled_hyena,
    filter_shapes,
    hyena_layer,
    looks_like_safari,
)

__all__ = ["MultiHyenaConfig", "MultiHyenaLM", "MultiHyenaMixer", "load_multihyena", "looks_like_multihyena"]

FAMILY = "multihyena"
NAMED_FILTER = ".mixer.filter."
FILTER_OPTIONS = {"d_model": "num_heads", "order": "filter_order", "seq_len": "l_max"}
"""Names in `filter_cfg` that are others outside."""
SUPPORTED: dict[str, tuple[Any, ...]] = {
    **{name: values for name, values in HYENA_SUPPORTED.items() if name != "num_heads"},
    "activation": (None, "id"),
    "outer_mixing": (False,),
    "post_order_ffn": (False,),
    "exp_feat": (False,),
    "norm_t": (False,),
}
IGNORED = HYENA_IGNORED | {"activation", "filter_layout", "outer_mixing", "post_order_ffn"}


@dataclass(frozen=True, kw_only=True)
class MultiHyenaConfig(HyenaConfig):
    """head_layout: channels of the projection are (head, q|k|v, channel) or (q|k|v, head, channel)

    use_norm: RMSNorm of eps `norm_eps` before out_proj; skip: how much of its input the operator adds to its output
    """

    num_heads: int
    head_layout: Literal["heads", "parts"] = "heads"
    use_norm: bool
    norm_eps: float = 1e-6
    skip: float = 0.0


class RMSNorm(nn.Module):
    """weight · x / √(mean(x²) + eps); like x. weight: [d_model]"""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt())


class MultiHyenaMixer(nn.Module):
    """[batch, seq ≤ l_max, d_model] → [batch, seq, d_model]"""

    def __init__(self, config: MultiHyenaConfig) -> None:
        super().__init__()
        d, taps, self.heads = config.d_model, config.short_filter_order, config.num_heads
        self.l_max, self.head_layout, self.skip = config.l_max, config.head_layout, config.skip
        self.direct = config.use_bias
        self.in_proj, self.out_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.short_filter = nn.Conv1d(3 * d, 3 * d, taps, groups=3 * d, padding=taps - 1)
        self.filter_fn = HyenaFilter(config, self.heads, config.use_bias)
        self.norm = RMSNorm(d, config.norm_eps) if config.use_norm else nn.Identity()

    def _parts(self, z: Tensor) -> tuple[Tensor, ...]:
        """q, k, v [batch, heads, channels, seq] of z [batch, 3 · d_model, seq]"""
        if self.head_layout == "heads":
            return z.unflatten(1, (self.heads, -1)).chunk(3, dim=2)
        return tuple(part.unflatten(1, (self.heads, -1)) for part in z.chunk(3, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        torch._check(length <= self.l_max, lambda: f"the sequence is longer than l_max {self.l_max}")
        q, k, v = self._parts(self.short_filter(self.in_proj(x).transpose(1, 2))[..., :length])
        z = k.unsqueeze(3) * v.unsqueeze(2)  # [batch, heads, i, j, seq]
        taps = self.filter_fn.filter(length)[0].T[:, None, None]
        y = fft_convolution(z, taps, self.filter_fn.bias[:, None, None] if self.direct else None)
        y = (q.unsqueeze(3) * y).sum(2).flatten(1, 2).transpose(1, 2)
        y = self.out_proj(self.norm(y))
        return y + self.skip * x if self.skip else y


class MultiHyenaLM(LanguageModel):
    """input_ids int64 [batch, seq ≤ l_max] → logits [batch, seq, vocab_size]."""

    def __init__(self, config: MultiHyenaConfig) -> None:
        super().__init__(config, lambda: MultiHyenaMixer(config), config.l_max)


def looks_like_multihyena(checkpoint: Checkpoint) -> bool:
    """Safari's Hyena keys, or those with the filters named `filter`, and fewer filters than channels."""
    plain = with_plain_keys(_with_safaris_keys(checkpoint))
    embedding = plain.tensors.get(EMBEDDING)
    if not looks_like_safari(plain) or embedding is None or embedding.ndim != 2:
        return False
    deltas = plain.tensors.get(hyena_layer(Reading(plain, FAMILY)) + "filter_fn.modulation.deltas")
    return deltas is not None and deltas.numel() < embedding.shape[1]


def load_multihyena(checkpoint: Checkpoint, config: Path | None, context: int | None) -> LoadedModel:
    """The module of a MultiHyena state dict; input_ids [batch, seq ≤ l_max] → logits [batch, seq, vocab].

    Raises CheckpointError for the file's faults, ConfigError for the configuration's.
    """
    given = given_options(checkpoint, config, nested=("layer",), renamed={"bias": "use_bias"})
    given = _with_filter_options(given)
    if any(NAMED_FILTER in key for key in checkpoint.tensors):
        given = replace(given, values={"skip": 1.0} | given.values)
    reading = Reading(with_plain_keys(_with_safaris_keys(checkpoint)), FAMILY)
    shaped = lm_shapes(reading)
    shaped |= _operator_shapes(reading, shaped["d_model"][0])
    settled = settle_lm(
        MultiHyenaConfig, reading, given, shaped, context, tied=True, supported=SUPPORTED, ignored=IGNORED
    )
    return filled_hyena(settled, given, MultiHyenaLM)


def _with_safaris_keys(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with `filter` renamed, without the bias that its operator does not use."""
    named = [key for key in checkpoint.tensors if NAMED_FILTER in key]
    if not named:
        return checkpoint
    unused = f"{NAMED_FILTER}bias"
    kept = {key: value for key, value in checkpoint.tensors.items() if not key.endswith(unused)}
    tensors = {key.replace(NAMED_FILTER, ".mixer.filter_fn."): value for key, value in kept.items()}
    notes = (f"skipped *{unused}, which the operator does not use",) if len(kept) < len(checkpoint.tensors) else ()
    return replace(checkpoint, tensors=tensors, notes=checkpoint.notes + notes)


def _with_filter_options(given: GivenOptions) -> GivenOptions:
    """The options with those of the mapping `filter_cfg` beside them; the same option outside wins."""
    if "filter_cfg" not in given.values:
        return given
    inner = {
        FILTER_OPTIONS.get(name, name): value
        for name, value in given.inside("filter_cfg").values.items()
        if name not in ("_name_", "bias")
    }
    outside = {name: value for name, value in given.values.items() if name != "filter_cfg"}
    files = dict.fromkeys(inner, given.files["filter_cfg"]) | given.files
    return replace(given, values=inner | outside, files=files)


def _operator_shapes(reading: Reading, d_model: int) -> dict[str, tuple[Any, str]]:
    """option → (value, key) of the first layer's operator. Raises CheckpointError."""
    mixer = hyena_layer(reading)
    projection, short = mixer + "in_proj.weight", mixer + "short_filter.weight"
    direct, norm = mixer + "filter_fn.bias", mixer + "norm.weight"
    rows = reading.shape(projection, "[3 * d_model, d_model]")[0]
    if rows != 3 * d_model:
        raise reading.error(f"{projection!r} has {rows} rows, expected {3 * d_model}")
    shaped, heads, last = filter_shapes(reading)
    if d_model % heads:
        raise reading.error(f"{last!r} has {heads} rows, expected a number of heads that divides d_model {d_model}")
    return shaped | {
        "num_heads": (heads, last),
        "order": (2, projection),
        "short_filter_order": (reading.shape(short, "[3 * d_model, 1, short_filter_order]")[2], short),
        "use_bias": (direct in reading.tensors, direct),
        "use_norm": (norm in reading.tensors, norm),
    }
