"""Checkpoints of StripedHyena and Evo-1."""

from __future__ import annotations

from pathlib import Path

import torch

from lhcompile.artifacts import LoadedModel
from lhcompile.load.checkpoint import Checkpoint
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

__all__ = ["load_striped", "looks_like_striped"]

FAMILY = "stripedhyena"
LISTS = {"attn_layer_idxs": "attention", "hyena_layer_idxs": "modal"}
"""Options that list the blocks of a kind."""
BIASES = {
    "short_filter_bias": "filter.short_filter_bias",
    "qkv_proj_bias": "inner_mha_cls.Wqkv.bias",
    "mha_out_proj_bias": "inner_mha_cls.out_proj.bias",
}
"""Options that say whether a bias is there, and its key."""


def looks_like_striped(checkpoint: Checkpoint) -> bool:
    return any(key.endswith((".filter.poles", ".filter.residues")) for key in checkpoint.tensors) and not any(
        key.endswith((".filter.log_poles", ".filter.h")) for key in checkpoint.tensors
    )


def load_striped(checkpoint: Checkpoint, config: Path | None, context: int | None) -> LoadedModel:
    """The module of a StripedHyena or Evo-1 state dict; input_ids [batch, time] → logits [batch, time, vocab].

    Raises CheckpointError for the file's faults, ConfigError for the configuration's.
    """
    reading = reading_of(checkpoint, FAMILY)
    given = given_options(checkpoint, config)
    layers = layers_of(reading, given, LISTS)
    given, shaped = sizes_of(reading, given, layers, BIASES)
    ignored = IGNORED | LISTS.keys() | {"column_split"}
    options, notes = settle(
        StripedOptions, given, shaped, supported=SUPPORTED | {"hyena_filter_groups": (1,)}, ignored=ignored
    )
    model = model_config(options, given, layers, context, activations=(options.mlp_activation,) * len(layers))
    rows = torch.arange(3 * model.width)
    if options.column_split_hyena:
        rows = head_blocks(rows, model.heads)
    return loaded_model(reading, options, model, notes, channels=rows)
