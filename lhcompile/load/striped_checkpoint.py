"""Checkpoints of StripedHyena and Evo-1."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lhcompile.artifacts import LoadedModel
from lhcompile.load.checkpoint import Checkpoint, shape_text
from lhcompile.load.lm_checkpoint import Reading
from lhcompile.load.options import given_options, settle
from lhcompile.load.striped_common import (
    EMBEDDING,
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
SYSTEMS = (".filter.poles", ".filter.residues")
LISTS = {"attn_layer_idxs": "attention", "hyena_layer_idxs": "modal"}
"""Options that list the blocks of a kind."""
SUPPORTED_HERE: dict[str, tuple[Any, ...]] = {
    "evo2_style_activations": (False, None),
    "hyena_flip_x1x2": (False, None),
    "interleave": (False, None),
}
BIASES = {
    "short_filter_bias": "filter.short_filter_bias",
    "qkv_proj_bias": "inner_mha_cls.Wqkv.bias",
    "mha_out_proj_bias": "inner_mha_cls.out_proj.bias",
}
"""Options that say whether a bias is there, and its key."""


def looks_like_striped(checkpoint: Checkpoint) -> bool:
    return any(key.endswith(SYSTEMS) for key in checkpoint.tensors) and not any(
        key.endswith((".filter.log_poles", ".filter.h")) for key in checkpoint.tensors
    )


def load_striped(checkpoint: Checkpoint, config: Path | None, context: int | None) -> LoadedModel:
    """The module of a StripedHyena or Evo-1 state dict; input_ids [batch, time] → logits [batch, time, vocab].

    Raises CheckpointError for the file's faults, ConfigError for the configuration's.
    """
    reading, groups = _one_system_a_channel(reading_of(checkpoint, FAMILY))
    given = given_options(checkpoint, config)
    layers = layers_of(reading, given, LISTS)
    given, shaped = sizes_of(reading, given, layers, BIASES)
    shaped |= groups
    ignored = IGNORED | LISTS.keys() | {"column_split"}
    options, notes = settle(StripedOptions, given, shaped, supported=SUPPORTED | SUPPORTED_HERE, ignored=ignored)
    model = model_config(options, given, layers, context, activations=(options.mlp_activation,) * len(layers))
    rows = torch.arange(3 * model.width)
    if options.column_split_hyena:
        rows = head_blocks(rows, model.heads)
    return loaded_model(reading, options, model, notes, channels=rows)


def _one_system_a_channel(reading: Reading) -> tuple[Reading, dict[str, tuple[Any, str]]]:
    """(poles and residues with a row for each channel, hyena_filter_groups and the key that determines it).

    A file may hold fewer systems, hidden_size / hyena_filter_groups of them. The published code repeats each as often
    as there are systems, which gives every channel one where there is one system for all, or √hidden_size.
    Raises CheckpointError for another number.
    """
    width = reading.shape(EMBEDDING, "[vocab_size, hidden_size]")[1]
    tensors = dict(reading.tensors)
    groups: dict[str, tuple[Any, str]] = {}
    for key, table in reading.tensors.items():
        if key.endswith(SYSTEMS) and table.ndim == 4 and table.numel():
            systems = len(table)
            if systems not in (1, width) and systems**2 != width:
                shape = shape_text(table.shape)
                raise reading.error(f"{key!r} has shape {shape}, expected [{width}, state_size, 1, 2]")
            tensors[key] = table if systems == width else table.repeat_interleave(width // systems, dim=0)
            groups.setdefault("hyena_filter_groups", (width // systems, key))
    return replace(reading, checkpoint=replace(reading.checkpoint, tensors=tensors)), groups
