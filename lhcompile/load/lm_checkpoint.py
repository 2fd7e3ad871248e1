"""What the checkpoints of safari, H3 and their kin have in common: keys, shapes, head, attention layers, options."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from lhcompile.artifacts import LoadedModel
from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load.checkpoint import Checkpoint, fill, shape_text, without_prefix
from lhcompile.load.lm import AttentionConfig, LMConfig
from lhcompile.load.options import GivenOptions, settle, unpadded_vocabulary

__all__ = [
    "EMBEDDING",
    "LM_IGNORED",
    "LM_SUPPORTED",
    "ROTARY_CONTEXT",
    "Reading",
    "Settled",
    "context_of",
    "filled",
    "filled_as",
    "layers_with",
    "lm_shapes",
    "same",
    "settle_lm",
    "with_plain_keys",
]

Config = TypeVar("Config", bound=LMConfig)

EMBEDDING, HEAD = "backbone.embeddings.word_embeddings.weight", "lm_head.weight"
POSITIONS = "backbone.embeddings.position_embeddings.weight"
ROTARY_CONTEXT = 2048
"""Positions for which rotary tables are made when nobody says how long a sequence gets."""

LM_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "word_embed_proj_dim": (None,),
    "glu_act": (False,),
}
"""Options of every such model that are no fields → the values that are built in."""
LM_IGNORED = frozenset({
    "_name_", "attention", "attn_cfg", "checkpoint_mixer", "checkpoint_mlp", "device", "dropout", "dropout_cls",
    "dtype", "embed_dropout", "fused_bias_fc", "fused_dropout_add_ln", "fused_mlp", "initializer_cfg",
    "initializer_range", "layer_idx", "lr", "pad_vocab_size_multiple", "process_group", "resid_dropout",
    "residual_in_fp32", "sequence_parallel", "vocab_size", "wd",
})  # fmt: skip
"""Options of every such model that change no logits, and fields that are settled apart."""
ATTENTION_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "causal": (True,),
    "bias": (True,),
    "qkv_proj_bias": (True,),
    "out_proj_bias": (True,),
    "cross_attn": (False,),
    "softmax_scale": (None,),
    "dwconv": (False,),
    "rotary_emb_interleaved": (False,),
    "rotary_emb_scale_base": (0, None, False),
    "num_heads_kv": (None,),
    "head_dim": (None,),
}
ATTENTION_IGNORED = {"dropout", "fused_bias_fc", "use_flash_attn", "return_residual", "checkpointing", "layer_idx"}


@dataclass(frozen=True)
class Reading:
    """A checkpoint of a family in the making; `kind` says in errors what the keys looked like."""

    checkpoint: Checkpoint
    kind: str

    @property
    def tensors(self) -> dict[str, Tensor]:
        return self.checkpoint.tensors

    def error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.checkpoint.path}: {text}; it looked like {self.kind}")

    def shape(self, key: str, axes: str) -> tuple[int, ...]:
        """The shape of a tensor with the axes named. Raises CheckpointError when it is missing or of another rank."""
        tensor = self.tensors.get(key)
        if tensor is None:
            raise self.error(f"missing key {key!r} of shape {axes}")
        if tensor.ndim != axes.count(",") + 1 or not tensor.numel():
            raise self.error(f"{key!r} has shape {shape_text(tensor.shape)}, expected {axes}")
        return tuple(tensor.shape)

    def numbers(self, pattern: str) -> list[int]:
        """The numbers that stand for the pattern's group in the keys, ascending."""
        return sorted({int(match[1]) for key in self.tensors if (match := re.match(pattern, key))})


def with_plain_keys(checkpoint: Checkpoint, known: Collection[str] = (EMBEDDING,)) -> Checkpoint:
    """`without_prefix`, which keeps a head outside the prefix, where Hugging Face's wrappers put it."""
    prefix = next((key.removesuffix(EMBEDDING) for key in checkpoint.tensors if key.endswith(EMBEDDING)), "")
    if HEAD in checkpoint.tensors:
        tensors = {prefix + key if key == HEAD else key: value for key, value in checkpoint.tensors.items()}
        checkpoint = replace(checkpoint, tensors=tensors)
    return without_prefix(checkpoint, known)


def layers_with(reading: Reading, part: str) -> list[int]:
    """Numbers of the layers that have keys `backbone.layers.{i}.{part}`."""
    return reading.numbers(rf"backbone\.layers\.(\d+)\.{re.escape(part)}")


def lm_shapes(reading: Reading) -> dict[str, tuple[Any, str]]:
    """option → (value, the key whose shape determines it), for the fields of LMConfig that shapes determine."""
    vocab, d_model = reading.shape(EMBEDDING, "[vocab_size, d_model]")
    layers = layers_with(reading, "")
    if layers != list(range(len(layers))):
        raise CheckpointError(f"{reading.checkpoint.path}: the layers are numbered {layers}, with gaps")
    fc1 = "backbone.layers.0.mlp.fc1.weight"
    positions = reading.shape(POSITIONS, "[max_position_embeddings, d_model]")[0] if POSITIONS in reading.tensors else 0
    attention = layers_with(reading, "mixer.Wqkv.")
    return {
        "d_model": (d_model, EMBEDDING),
        "vocab_size": (vocab, EMBEDDING),
        "n_layer": (len(layers), f"backbone.layers.{layers[-1]}" if layers else "backbone.layers"),
        "d_inner": (reading.shape(fc1, "[d_inner, d_model]")[0], fc1),
        "attn_layer_idx": (tuple(attention), f"backbone.layers.{attention[0] if attention else '*'}.mixer.Wqkv.weight"),
        "max_position_embeddings": (positions, POSITIONS),
    }


@dataclass(frozen=True)
class Settled(Generic[Config]):
    """What a loader needs to make its module: see `settle_lm`. vocab: without padding"""

    reading: Reading
    options: Config
    vocab: int
    context: int | None
    notes: list[str]


def settle_lm(
    kind: type[Config],
    reading: Reading,
    given: GivenOptions,
    shaped: Mapping[str, tuple[Any, str]],
    context: int | None,
    *,
    tied: bool | None,
    supported: Mapping[str, tuple[Any, ...]],
    ignored: Collection[str],
) -> Settled[Config]:
    """`settle`, with what language models have in common: attention layers, the head, vocabulary and context.

    tied: what an absent head means, None if that must be said. Raises ConfigError, CheckpointError.
    """
    reading, attention, notes = attention_of(reading, given, shaped["d_model"][0])
    reading, is_tied = with_head(reading, given, tied)
    shaped = {**shaped, "tie_word_embeddings": (is_tied, HEAD)}
    options, assumed = settle(kind, given, shaped, supported=supported, ignored=ignored)
    options = replace(options, attention=attention)
    limits = {"l_max": getattr(options, "l_max", None), "max_position_embeddings": options.max_position_embeddings}
    vocab = unpadded_vocabulary(given, options.vocab_size, EMBEDDING)
    return Settled(reading, options, vocab, context_of(reading, context, limits), notes + assumed)


def attention_of(reading: Reading, given: GivenOptions, d_model: int) -> tuple[Reading, AttentionConfig, list[str]]:
    """(the reading without rotary frequencies, the options in `attn_cfg`, notes) of a model's attention layers.

    Raises ConfigError when the number of heads, which no shape says, is not given, or does not divide the width.
    """
    layers = layers_with(reading, "mixer.Wqkv.")
    if not layers:
        return reading, AttentionConfig(num_heads=1), []
    path, inner, shaped = reading.checkpoint.path, given.inside("attn_cfg"), {}
    if "num_heads" not in inner.values:
        raise ConfigError(
            f"{path}: layer {layers[0]} is attention: no shape says its number of heads; "
            "give attn_cfg: {num_heads: …} in --config"
        )
    frequencies = {key: value for key, value in reading.tensors.items() if key.endswith(".rotary_emb.inv_freq")}
    for key, value in frequencies.items():
        shaped["rotary_emb_dim"] = (2 * value.numel(), key)
    config, notes = settle(
        AttentionConfig, inner, shaped, supported=ATTENTION_SUPPORTED, ignored=ATTENTION_IGNORED
    )
    width = d_model // max(config.num_heads, 1)
    if config.num_heads < 1 or d_model % config.num_heads or not 0 <= config.rotary_emb_dim <= width:
        raise ConfigError(
            f"{path}: d_model {d_model} has no {config.num_heads} heads of {config.rotary_emb_dim} rotary channels"
        )
    if config.rotary_emb_dim % 2:
        raise inner.refuse("rotary_emb_dim", f"is {config.rotary_emb_dim}, an odd number")
    for key, value in frequencies.items():
        rates = config.rotary_emb_base ** (-torch.arange(0, config.rotary_emb_dim, 2) / config.rotary_emb_dim)
        if not torch.allclose(value.float(), rates, rtol=1e-2, atol=0):
            raise reading.error(f"{key!r} is not that of rotary_emb_base {config.rotary_emb_base}")
    if not config.rotary_emb_dim:
        given_none = "rotary_emb_dim" in inner.values
        notes = [] if given_none else ["assumed that attention knows no positions, as attn_cfg gives no rotary_emb_dim"]
    kept = {key: value for key, value in reading.tensors.items() if key not in frequencies}
    return replace(reading, checkpoint=replace(reading.checkpoint, tensors=kept)), config, notes


def context_of(reading: Reading, context: int | None, limits: Mapping[str, int | None]) -> int | None:
    """The longest sequence: `context` if it is within all limits, else the smallest of them.

    limits: name → most positions, None or 0 for no limit. Raises ConfigError naming the limit that is exceeded.
    """
    bounds = {name: limit for name, limit in limits.items() if limit}
    name = min(bounds, key=lambda name: bounds[name], default=None)
    if name is None:
        return context
    limit = bounds[name]
    if limit < 2:
        raise CheckpointError(f"{reading.checkpoint.path}: a context length of {limit}; there is nothing to stream")
    if context is not None and not 1 < context <= limit:
        raise ConfigError(f"context {context} is not between 2 and the checkpoint's {name} {limit}")
    return context or limit


def with_head(reading: Reading, given: GivenOptions, tied: bool | None) -> tuple[Reading, bool]:
    """(the reading with the head's key present, whether it is the embedding).

    tied: what the family takes an absent head to mean, None if nothing. `tie_word_embeddings` of the options wins.
    Raises CheckpointError when a tied head differs from the embedding or an untied one is absent.
    """
    said = given.values.get("tie_word_embeddings", tied)
    head, embedding = reading.tensors.get(HEAD), reading.tensors[EMBEDDING]
    if head is None:
        if not said:
            raise reading.error(
                f"missing key {HEAD!r} of shape {shape_text(embedding.shape)} "
                "(if it is the embedding, set tie_word_embeddings: true in --config)"
            )
        tensors = {**reading.tensors, HEAD: embedding}
        return replace(reading, checkpoint=replace(reading.checkpoint, tensors=tensors)), True
    tied_indeed = head.shape == embedding.shape and same(head, embedding)
    if said and not tied_indeed and head.shape == embedding.shape:
        raise CheckpointError(
            f"{reading.checkpoint.path}: {HEAD!r} differs from the embedding it is tied to; "
            "if it is not tied, set tie_word_embeddings: false in --config"
        )
    return reading, bool(tied_indeed if said is None else said)


def filled(settled: Settled[Config], module: nn.Module) -> LoadedModel:
    """The module, made on the meta device, with the checkpoint's tensors."""
    options = settled.options
    shown = asdict(options) | {"vocab_size": settled.vocab, "vocab_size_padded": options.vocab_size}
    for name in {"w"} if options.attn_layer_idx else {"w", "attention"}:
        shown.pop(name, None)
    return filled_as(module, settled.reading, shown, settled.context, settled.notes)


def filled_as(
    module: nn.Module, reading: Reading, shown: dict[str, Any], context: int | None, notes: list[str]
) -> LoadedModel:
    """The same for a module of any kind; shown: its options, for the report."""
    fill(module, reading.checkpoint, reading.kind)
    return LoadedModel(
        module=module.eval().requires_grad_(False),
        family=reading.kind,
        context_length=context,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        source=str(reading.checkpoint.path),
        config=shown,
        notes=(*reading.checkpoint.notes, *notes),
    )


def same(a: Tensor, b: Tensor) -> bool:
    """Equal element by element; NaN equals NaN, so that `fill` reports it."""
    return torch.equal(a.nan_to_num(), b.nan_to_num())
