"""A safari Hyena checkpoint: its options from its shapes and the user's configuration, then its module."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lhcompile.artifacts import LoadedModel
from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load.checkpoint import Checkpoint
from lhcompile.load.lm_checkpoint import (
    LM_IGNORED,
    LM_SUPPORTED,
    Reading,
    Settled,
    filled,
    layers_with,
    lm_shapes,
    same,
    settle_lm,
    with_plain_keys,
)
from lhcompile.load.options import GivenOptions, given_options
from lhcompile.load.safari import HyenaConfig, HyenaLM

__all__ = [
    "HYENA_IGNORED",
    "HYENA_SUPPORTED",
    "UNREAD",
    "filled_hyena",
    "filter_shapes",
    "hyena_layer",
    "hyena_shapes",
    "load_safari",
    "looks_like_safari",
    "no_activation_is_id",
    "unread",
    "with_shared_freq",
]

Config = TypeVar("Config", bound=HyenaConfig)

FAMILY = "safari-hyena"
FREQ = re.compile(r"(.*\.implicit_filter\.)\d+\.freq$")

HYENA_SUPPORTED: dict[str, tuple[Any, ...]] = {  # option → the values that are supported
    **LM_SUPPORTED,
    "num_blocks": (1,),
    "num_heads": (1,),  # safari's own code fails for more
    "inner_factor": (1,),
    "filter_cls": ("hyena-filter",),
    "channels": (1,),
    "bidirectional": (False,),
}
HYENA_IGNORED = LM_IGNORED | {
    "drop_rate", "fast_decay_pct", "filter_args", "filter_dropout", "fused_fft_conv", "jit_filter", "layer",
    "local_order", "lr_pos_emb", "modulation_lr", "return_hidden_state", "return_state", "slow_decay_pct", "target",
    "train_freq", "use_flashfftconv", "w",
}  # fmt: skip

UNREAD = {"use_bias": True, "normalized": False}
"""Options that the single-file modules take and do not read → what these do."""


def looks_like_safari(checkpoint: Checkpoint) -> bool:
    keys = with_plain_keys(checkpoint).tensors
    return any(".mixer.filter_fn." in key for key in keys)


def load_safari(checkpoint: Checkpoint, config: Path | None, context: int | None) -> LoadedModel:
    """The module of a safari Hyena state dict; input_ids [batch, seq ≤ l_max] → logits [batch, seq, vocab].

    Raises CheckpointError for the file's faults, ConfigError for the configuration's.
    """
    given = given_options(checkpoint, config, nested=("layer",), renamed={"bias": "use_bias"})
    if given.values.get("_name_", "hyena") not in ("hyena", "lm", "lm_simple"):
        raise given.refuse("layer._name_", f"is {given.values['_name_']!r}, but the keys are Hyena's")
    given = no_activation_is_id(given)
    reading = Reading(with_plain_keys(checkpoint), FAMILY)
    standalone = given.values.get("filter_layout") == "standalone"
    settled = settle_lm(
        HyenaConfig, reading, given, hyena_shapes(reading), context,
        tied=True, supported=HYENA_SUPPORTED, ignored=HYENA_IGNORED | (UNREAD.keys() if standalone else set()),
    )  # fmt: skip
    settled.notes.extend(unread(given) if standalone else ())
    return filled_hyena(settled, given, HyenaLM)


def filled_hyena(settled: Settled[Config], given: GivenOptions, model: Callable[[Config], nn.Module]) -> LoadedModel:
    """The model with implicit filters that the options describe, filled."""
    reading = with_shared_freq(_with_fixed_freq(settled, given), settled.options.num_inner_mlps)
    if "local_order" in given.values:
        settled.notes.append("ignored local_order: the short filter's length is short_filter_order")
    with torch.device("meta"):
        module = model(settled.options)
    return filled(replace(settled, reading=reading), module)


def unread(given: GivenOptions) -> list[str]:
    """Notes on the options of `UNREAD` that are given in vain."""
    changed = [name for name, built_in in UNREAD.items() if given.values.get(name) not in (built_in, None)]
    return [f"ignored {name}: the published module in a single file does not read it" for name in changed]


def no_activation_is_id(given: GivenOptions) -> GivenOptions:
    """`activation: null` means none."""
    if "activation" in given.values and given.values["activation"] is None:
        return replace(given, values={**given.values, "activation": "id"})
    return given


def hyena_layer(reading: Reading) -> str:
    """Prefix of the first layer whose mixer has a Hyena filter."""
    layers = layers_with(reading, "mixer.filter_fn.")
    return f"backbone.layers.{layers[0] if layers else 0}.mixer."


def filter_shapes(reading: Reading) -> tuple[dict[str, tuple[Any, str]], int, str]:
    """(option → (value, key) of the implicit filter, its channels, the key that says so)"""
    prefix = hyena_layer(reading) + "filter_fn."
    mlp = prefix + "implicit_filter."
    linear = reading.numbers(re.escape(mlp) + r"(\d+)\.weight$")
    first, last, z = mlp + "0.weight", f"{mlp}{linear[-1] if linear else 0}.weight", prefix + "pos_emb.z"
    width, emb_dim = reading.shape(first, "[filter_order, emb_dim]")
    l_max = reading.shape(z, "[1, l_max, emb_dim]")[1]
    if l_max < 2:
        raise CheckpointError(
            f"{reading.checkpoint.path}: {z!r} holds a context length of 1; there is nothing to stream"
        )
    shaped: dict[str, tuple[Any, str]] = {
        "l_max": (l_max, z),
        "emb_dim": (emb_dim, first),
        "linear_mixer": (first == last, first),
    }
    if first != last:
        shaped |= {"filter_order": (width, first), "num_inner_mlps": (linear[-1] // 2 - 1, last)}
    return shaped, reading.shape(last, "[channels, filter_order]")[0], last


def hyena_shapes(reading: Reading) -> dict[str, tuple[Any, str]]:
    """option → (value, the key whose shape determines it), for the fields of HyenaConfig that shapes determine."""
    found = lm_shapes(reading)
    mixer, d_model = hyena_layer(reading), found["d_model"][0]
    projection, short, scale = mixer + "in_proj.weight", mixer + "short_filter.weight", mixer + "ord_proj_w"
    rows = reading.shape(projection, "[(order + 1) * d_model, d_model]")[0]
    order = rows // d_model - 1
    if rows % d_model or order < 2:
        raise reading.error(f"{projection!r} has {rows} rows, expected (order + 1) * {d_model} with order ≥ 2")
    shaped, channels, last = filter_shapes(reading)
    if channels != (order - 1) * d_model:
        raise ConfigError(
            f"{reading.checkpoint.path}: {last!r} has {channels} rows, expected (order - 1) * d_model = "
            f"{(order - 1) * d_model}: the option num_heads > 1 is not supported"
        )
    return found | shaped | {
        "order": (order, projection),
        "short_filter_order": (reading.shape(short, "[(order + 1) * d_model, 1, short_filter_order]")[2], short),
        "post_order_ffn": (scale in reading.tensors, scale),
    }


def _with_fixed_freq(settled: Settled[Config], given: GivenOptions) -> Reading:
    """The reading with the frequency `w` for each filter's Sin, where `train_freq: false` kept it out of the file.

    Raises ConfigError when `w`, which then no file holds, is not given.
    """
    reading = settled.reading
    trained = given.values.get("train_freq") is not False or any(FREQ.match(key) for key in reading.tensors)
    if trained or settled.options.linear_mixer:
        return reading
    w = given.values.get("w")
    if isinstance(w, bool) or not isinstance(w, int | float):
        raise given.refuse("train_freq", "is false, so that no key holds the frequency: give it as w")
    first = [key for key in reading.tensors if key.endswith(".implicit_filter.0.weight")]
    freq = torch.full((1, settled.options.filter_order), float(w))
    tensors = {**reading.tensors, **{key.replace(".0.weight", ".1.freq"): freq for key in first}}
    return replace(reading, checkpoint=replace(reading.checkpoint, tensors=tensors))


def with_shared_freq(reading: Reading, inner: int) -> Reading:
    """The reading with every `.freq` key of the one shared Sin module present.

    The module stands between all layers of the MLP; files hold it under any or all of the keys 1, 3, …, 2 inner + 1,
    in each layer of the model another. Raises CheckpointError when two of one layer differ.
    """
    tensors = dict(reading.tensors)
    shared: dict[str, str] = {}
    for key in sorted(reading.tensors):
        if match := FREQ.match(key):
            first = shared.setdefault(match[1], key)
            if not same(tensors[first], tensors[key]):
                raise CheckpointError(f"{reading.checkpoint.path}: {first!r} and {key!r} are one tensor but differ")
    for prefix, key in shared.items():
        tensors |= {f"{prefix}{2 * i + 1}.freq": tensors[key] for i in range(inner + 1)}
    return replace(reading, checkpoint=replace(reading.checkpoint, tensors=tensors))

