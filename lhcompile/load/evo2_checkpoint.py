"""Checkpoints of Evo 2 (StripedHyena 2).

What differs from StripedHyena: three kinds of filters, projected channels that may alternate, rows of attention that
stand head by head, and MLPs without an activation after the first block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lhcompile.artifacts import LoadedModel
from lhcompile.load.checkpoint import Checkpoint, shape_text
from lhcompile.load.lm_checkpoint import Reading
from lhcompile.load.options import given_options, settle
from lhcompile.load.striped_common import (
    IGNORED,
    SUPPORTED,
    StripedOptions,
    head_blocks,
    layers_of,
    loaded_model,
    model_config,
    reading_of,
    sizes_of,
)

__all__ = ["load_evo2", "looks_like_evo2"]

FAMILY = "evo2"
LISTS = {
    "attn_layer_idxs": "attention",
    "hcl_layer_idxs": "hcl",
    "hcm_layer_idxs": "hcm",
    "hcs_layer_idxs": "hcs",
}
BIASES = {
    "short_filter_bias": "filter.short_filter_bias",
    "qkv_proj_bias": "projections.bias",
    "mha_out_proj_bias": "inner_mha_cls.out_proj.bias",
    "hyena_out_proj_bias": "out_filter_dense.bias",
}
IGNORED_HERE = {
    "ground_truth_activations_path", "hyena_filter_groups", "use_fp8_input_projections",
    "use_hcl_kernel", "use_hcm_kernel", "use_hcs_kernel",
}  # fmt: skip


@dataclass(frozen=True)
class Evo2Options(StripedOptions):
    """The published options of Evo 2 that change the logits.

    qkv_proj_bias: of the convolutions' projections too
    interleave: projected channels alternate between x_2, x_1 and v; hyena_flip_x1x2: x_2 and x_1 change places
    column_split: the rows of Wqkv stand head by head; evo2_style_activations: only the first MLP has an activation
    """

    hyena_out_proj_bias: bool = True
    hcm_filter_groups: int = 1
    hcm_filter_length: int = 128
    hcs_filter_groups: int = 1
    hcs_filter_length: int = 7
    rotary_emb_base: float = 1000000.0
    mlp_activation: Literal["silu", "gelu"] = "gelu"
    evo2_style_activations: bool = False
    interleave: bool = False
    hyena_flip_x1x2: bool = False
    column_split: bool = True


def looks_like_evo2(checkpoint: Checkpoint) -> bool:
    return any(key.endswith((".filter.log_poles", ".filter.h")) for key in checkpoint.tensors)


def load_evo2(checkpoint: Checkpoint, config: Path | None, context: int | None) -> LoadedModel:
    """The module of an Evo 2 state dict; input_ids [batch, time] → logits [batch, time, vocab].

    Raises CheckpointError for the file's faults, ConfigError for the configuration's.
    """
    reading = reading_of(checkpoint, FAMILY)
    given = given_options(checkpoint, config)
    layers = layers_of(reading, given, LISTS)
    given, shaped = sizes_of(reading, given, layers, BIASES)
    shaped |= _filter_sizes(reading, layers, shaped["hidden_size"][0])
    shaped["hcl_filter_groups"] = shaped["hidden_size"]  # each channel has its own poles
    ignored = IGNORED | LISTS.keys() | IGNORED_HERE
    options, notes = settle(Evo2Options, given, shaped, supported=SUPPORTED, ignored=ignored)
    if options.column_split and options.proj_groups > 1:
        raise given.refuse("column_split", f"is true, which has no meaning with proj_groups {options.proj_groups}")
    if given.values.get("use_fp8_input_projections"):
        notes.append("the published model multiplies by its projections in 8 bits, this one does not")
    later = "identity" if options.evo2_style_activations else options.mlp_activation
    model = model_config(
        options,
        given,
        layers,
        context,
        activations=(options.mlp_activation, *(later for _ in layers[1:])),
        projections_bias=options.qkv_proj_bias,
        filter_out_bias=options.hyena_out_proj_bias,
        hcm=(options.hcm_filter_groups, options.hcm_filter_length),
        hcs=(options.hcs_filter_groups, options.hcs_filter_length),
    )
    rows = torch.arange(3 * model.width)
    attention = head_blocks(rows, model.heads) if options.column_split else None
    return loaded_model(reading, options, model, notes, _channels(options), attention)


def _channels(options: Evo2Options) -> Tensor:
    """The file's row of each channel of x_2 | x_1 | v, int64 [3 · hidden_size]"""
    rows = torch.arange(3 * options.hidden_size)
    if options.interleave:
        rows = rows.reshape(-1, 3).T.flatten()
    if options.column_split_hyena:
        rows = head_blocks(rows, options.num_attention_heads)
    if options.hyena_flip_x1x2:
        x2, x1, v = rows.chunk(3)
        rows = torch.cat([x1, x2, v])
    return rows


def _filter_sizes(reading: Reading, layers: tuple[str, ...], width: int) -> dict[str, tuple[Any, str]]:
    """option → (value, the key that determines it), of the explicit filters. Raises CheckpointError."""
    shaped: dict[str, tuple[Any, str]] = {}
    for kind in ("hcm", "hcs"):
        keys = [f"blocks.{number}.filter.h" for number, layer in enumerate(layers) if layer == kind]
        key = next((key for key in keys if key in reading.tensors), None)
        if key is not None:
            shape = reading.tensors[key].shape
            if len(shape) != 3 or shape[1] != 1 or not shape[0] or width % shape[0] or not shape[2]:
                expected = f"[a divisor of {width}, 1, {kind}_filter_length]"
                raise reading.error(f"{key!r} has shape {shape_text(shape)}, expected {expected}")
            shaped |= {f"{kind}_filter_groups": (shape[0], key), f"{kind}_filter_length": (shape[2], key)}
    return shaped
