"""A safari Hyena checkpoint: its options from its shapes and the user's configuration, then its module.

What the shapes determine is taken from them; a configuration that says otherwise is an error. What they
cannot determine comes from the configuration, or else from the published defaults, and is noted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lhcompile.artifacts import LoadedModel
from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load.checkpoint import Checkpoint, fill, shape_text, without_prefix
from lhcompile.load.options import read_mapping, resolved
from lhcompile.load.safari import ACTIVATIONS, FILTER_LAYOUTS, HyenaConfig, HyenaLM

__all__ = ["load_safari", "looks_like_safari"]

FAMILY = "safari-hyena"
EMBEDDING, HEAD = "backbone.embeddings.word_embeddings.weight", "lm_head.weight"
MIXER = "backbone.layers.0.mixer."
FILTER = MIXER + "filter_fn."
FREQ = re.compile(r"(.*\.implicit_filter\.)\d+\.freq$")

FREE: dict[str, type | tuple[type, ...]] = {
    "modulate": bool,
    "shift": (int, float),
    "normalized": bool,
    "use_bias": bool,
    "activation": str,
    "layer_norm_epsilon": (int, float),
    "filter_layout": str,
    "tie_word_embeddings": bool,
}
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # option → the values that are supported
    "num_blocks": (1,),
    "num_heads": (1,),
    "inner_factor": (1,),
    "outer_mixing": (False,),
    "post_order_ffn": (False,),
    "filter_cls": ("hyena-filter",),
    "max_position_embeddings": (0,),
    "attn_layer_idx": (None, []),
    "attn_cfg": (None, {}),
    "channels": (1,),
}
KEYS_OF_UNSUPPORTED = {
    "ord_proj_w": "post_order_ffn",
    "position_embeddings": "max_position_embeddings",
    "project_in": "word_embed_proj_dim",
    "Wqkv": "attn_layer_idx",
}
TRAINING_ONLY = {
    "_name_", "dropout", "filter_dropout", "embed_dropout", "resid_dropout", "drop_rate", "lr", "lr_pos_emb",
    "modulation_lr", "wd", "w", "train_freq", "fast_decay_pct", "slow_decay_pct", "target", "initializer_cfg",
    "fused_mlp", "fused_dropout_add_ln", "fused_fft_conv", "fused_bias_fc", "residual_in_fp32", "jit_filter",
    "return_state", "bidirectional", "layer", "pad_vocab_size_multiple", "vocab_size", "local_order", "device",
    "dtype", "process_group", "checkpoint_mixer", "checkpoint_mlp",
}  # fmt: skip


def looks_like_safari(checkpoint: Checkpoint) -> bool:
    keys = without_prefix(checkpoint, {EMBEDDING}).tensors
    return any(".mixer.filter_fn." in key for key in keys)


def load_safari(checkpoint: Checkpoint, config: Path | None, context: int | None) -> LoadedModel:
    """The module of a safari Hyena state dict; input_ids [batch, seq ≤ l_max] → logits [batch, seq, vocab].

    Raises CheckpointError for the file's faults, ConfigError for the configuration's.
    """
    checkpoint = without_prefix(checkpoint, {EMBEDDING})
    _refuse_unsupported_keys(checkpoint)
    given, notes = _given(config) if config else ({}, [])
    shaped = _from_shapes(checkpoint)
    vocab = _compare(given, shaped, config)
    free, assumed = _free(given, config)
    sizes: dict[str, Any] = {name: value for name, (value, _) in shaped.items()}
    options = HyenaConfig(**sizes, **free)
    if assumed:
        notes.append("assumed, as neither file says otherwise: " + ", ".join(assumed))
    if context is not None and not 1 < context <= options.l_max:
        raise ConfigError(f"context {context} is not between 2 and the checkpoint's l_max {options.l_max}")
    tensors = _with_shared_freq(checkpoint, options.num_inner_mlps)
    module = HyenaLM(options)
    fill(module, Checkpoint(checkpoint.path, _with_head(checkpoint, tensors, options)), FAMILY)
    resolved_options = {field.name: getattr(options, field.name) for field in fields(options) if field.name != "w"}
    return LoadedModel(
        module=module.float().eval().requires_grad_(False),
        family=FAMILY,
        context_length=context or options.l_max,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        source=str(checkpoint.path),
        config=resolved_options | {"vocab_size": vocab, "vocab_size_padded": options.vocab_size},
        notes=(*checkpoint.notes, *notes),
    )


def _refuse_unsupported_keys(checkpoint: Checkpoint) -> None:
    for key in checkpoint.tensors:
        for part, option in KEYS_OF_UNSUPPORTED.items():
            if part in key.split("."):
                raise ConfigError(f"{checkpoint.path}: {key!r} needs the option {option}, which is not supported")


def _given(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The configuration's options, those of `layer` among the rest, and notes. Raises ConfigError."""
    root = read_mapping(path)
    model = next((root[name] for name in ("model", "model_config") if isinstance(root.get(name), dict)), root)
    layer = model.get("layer") or {}
    if not isinstance(layer, dict):
        raise ConfigError(f"{path}: the option layer is no mapping")
    if layer.get("_name_", "hyena") != "hyena":
        raise ConfigError(f"{path}: the option layer._name_ is {layer['_name_']!r}, but the keys are Hyena's")
    options, unknown = resolved({k: v for k, v in model.items() if k != "layer"}, root)
    layer_options, layer_unknown = resolved(layer, root)
    options |= layer_options
    if "bias" in options:
        options["use_bias"] = options.pop("bias")
    notes = []
    ignored = [name for name in (*unknown, *layer_unknown) if name not in TRAINING_ONLY]
    if ignored:
        notes.append(f"ignored interpolations in {path.name}: {', '.join(ignored)}")
    if "local_order" in options:
        notes.append(f"ignored local_order in {path.name}: the short filter's length is short_filter_order")
    named = {field.name for field in fields(HyenaConfig)} | set(UNSUPPORTED) | TRAINING_ONLY
    for name, value in options.items():
        if name in UNSUPPORTED and value not in UNSUPPORTED[name]:
            raise ConfigError(f"{path}: the option {name} = {value!r} is not supported")
        if name not in named:
            raise ConfigError(f"{path}: unknown option {name!r}")
    return options, notes


def _shape(checkpoint: Checkpoint, key: str, axes: str) -> tuple[int, ...]:
    tensor = checkpoint.tensors.get(key)
    if tensor is None:
        raise CheckpointError(f"{checkpoint.path}: missing key {key!r} of shape {axes}; it looked like {FAMILY}")
    if tensor.ndim != axes.count(",") + 1 or not tensor.numel():
        found = shape_text(tensor.shape)
        raise CheckpointError(f"{checkpoint.path}: {key!r} has shape {found}, expected {axes}; it looked like {FAMILY}")
    return tuple(tensor.shape)


def _from_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, str]]:
    """option → (value, the key whose shape determines it)"""
    last = FILTER + "implicit_filter."
    linear = _numbers(checkpoint, re.escape(last) + r"(\d+)\.weight$")
    layers = _numbers(checkpoint, r"backbone\.layers\.(\d+)\.")
    z, fc1, first = FILTER + "pos_emb.z", "backbone.layers.0.mlp.fc1.weight", last + "0.weight"
    short, projection = MIXER + "short_filter.weight", MIXER + "in_proj.weight"
    vocab, d_model = _shape(checkpoint, EMBEDDING, "[vocab_size, d_model]")
    filter_order, emb_dim = _shape(checkpoint, first, "[filter_order, emb_dim]")
    rows = _shape(checkpoint, projection, "[(order + 1) * d_model, d_model]")[0]
    l_max = _shape(checkpoint, z, "[1, l_max, emb_dim]")[1]
    if layers != list(range(len(layers))):
        raise CheckpointError(f"{checkpoint.path}: the layers are numbered {layers}, with gaps")
    found = {
        "d_model": (d_model, EMBEDDING),
        "vocab_size": (vocab, EMBEDDING),
        "n_layer": (len(layers), f"backbone.layers.{layers[-1]}"),
        "d_inner": (_shape(checkpoint, fc1, "[d_inner, d_model]")[0], fc1),
        "l_max": (l_max, z),
        "order": (rows // d_model - 1, projection),
        "emb_dim": (emb_dim, first),
        "filter_order": (filter_order, first),
        "short_filter_order": (_shape(checkpoint, short, "[(order + 1) * d_model, 1, short_filter_order]")[2], short),
        "num_inner_mlps": (linear[-1] // 2 - 1, f"{last}{linear[-1]}.weight"),
    }
    _check_shapes(checkpoint, found, rows, f"{last}{linear[-1]}.weight")
    return found


def _numbers(checkpoint: Checkpoint, pattern: str) -> list[int]:
    return sorted({int(match[1]) for key in checkpoint.tensors if (match := re.match(pattern, key))})


def _check_shapes(checkpoint: Checkpoint, found: Mapping[str, tuple[int, str]], rows: int, last: str) -> None:
    path, d_model, order = checkpoint.path, found["d_model"][0], found["order"][0]
    if rows % d_model or order < 2:
        raise CheckpointError(
            f"{path}: {MIXER + 'in_proj.weight'!r} has {rows} rows, expected (order + 1) * {d_model} with order ≥ 2"
        )
    if found["l_max"][0] < 2:
        raise CheckpointError(f"{path}: {found['l_max'][1]!r} holds a context length of 1; there is nothing to stream")
    channels = _shape(checkpoint, last, "[(order - 1) * d_model, filter_order]")[0]
    if channels < (order - 1) * d_model and (order - 1) * d_model % channels == 0:
        raise ConfigError(f"{path}: {last!r} has {channels} rows: the option num_heads > 1 is not supported")


def _compare(given: Mapping[str, Any], shaped: Mapping[str, tuple[int, str]], config: Path | None) -> int:
    """Checks the configuration against the shapes; returns the vocabulary without padding."""
    for name, (value, key) in shaped.items():
        if name != "vocab_size" and name in given and given[name] != value:
            raise ConfigError(
                f"{config}: the option {name} is {given[name]}, but {key!r} in the checkpoint makes it {value}"
            )
    rows, key = shaped["vocab_size"]
    vocab, multiple = given.get("vocab_size", rows), given.get("pad_vocab_size_multiple", 1)
    if not all(isinstance(n, int) and n > 0 for n in (vocab, multiple)):
        raise ConfigError(f"{config}: the options vocab_size and pad_vocab_size_multiple must be positive integers")
    if -(-vocab // multiple) * multiple != rows:
        raise ConfigError(
            f"{config}: the option vocab_size is {vocab} (pad_vocab_size_multiple {multiple}), "
            f"but {key!r} in the checkpoint has {rows} rows"
        )
    return vocab


def _free(given: Mapping[str, Any], config: Path | None) -> tuple[dict[str, Any], list[str]]:
    """(options the shapes cannot determine, those of them taken from the defaults as text)"""
    free: dict[str, Any] = {}
    assumed: list[str] = []
    for name, kind in FREE.items():
        default = getattr(HyenaConfig, name)
        value: Any = given.get(name, default)
        if value is None and name == "activation":
            value = "id"
        if isinstance(value, str) and kind == (int, float):  # YAML reads 1e-5 as text
            value = _number(value)
        fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not fits:
            raise ConfigError(f"{config}: the option {name} cannot be {given[name]!r}")
        free[name] = value if isinstance(value, bool | str) else float(value)
        if name not in given:
            assumed.append(f"{name} {default}")
    for name, choices in (("activation", ACTIVATIONS), ("filter_layout", FILTER_LAYOUTS)):
        if free[name] not in choices:
            raise ConfigError(f"{config}: the option {name} is {free[name]!r}, not one of {', '.join(choices)}")
    return free, assumed


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _with_shared_freq(checkpoint: Checkpoint, inner: int) -> dict[str, Tensor]:
    """The tensors with every `.freq` key of the one shared Sin module present and equal."""
    tensors = dict(checkpoint.tensors)
    shared: dict[str, str] = {}
    for key in sorted(checkpoint.tensors):
        if match := FREQ.match(key):
            first = shared.setdefault(match[1], key)
            if not _same(tensors[first], tensors[key]):
                raise CheckpointError(f"{checkpoint.path}: {first!r} and {key!r} are one tensor but differ")
    for prefix, key in shared.items():
        tensors |= {f"{prefix}{2 * i + 1}.freq": tensors[key] for i in range(inner + 1)}
    return tensors


def _with_head(checkpoint: Checkpoint, tensors: dict[str, Tensor], options: HyenaConfig) -> dict[str, Tensor]:
    """The tensors with the head's key present; a tied head must equal the embedding."""
    if not options.tie_word_embeddings:
        return tensors
    head = tensors.get(HEAD)
    if head is not None and head.shape == tensors[EMBEDDING].shape and not _same(head, tensors[EMBEDDING]):
        raise CheckpointError(
            f"{checkpoint.path}: {HEAD!r} differs from the embedding it is tied to; "
            "if it is not tied, set tie_word_embeddings: false in --config"
        )
    return tensors if head is not None else {**tensors, HEAD: tensors[EMBEDDING]}


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal element by element; NaN equals NaN, so that `fill` reports it."""
    return torch.equal(a.nan_to_num(), b.nan_to_num())
