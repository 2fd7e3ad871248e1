"""HyenaDNA checkpoints: the safari Hyena model over nucleotides, in the forms of Hugging Face and of Lightning.

The two forms differ in their keys' prefixes, and Lightning's training code may put `.layer` into them. Two modules were
published, which differ where no file says so: a configuration with `_name_: lm` means the training code's, which is
safari's own; any other means the released one, whose filters' decay has a floor, `shift` 0.05, whose filter channels
have the order slowest, and which adds the filters' bias and never normalizes them, whatever the options say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import nn

from lhcompile.artifacts import LoadedModel
from lhcompile.errors import ConfigError
from lhcompile.load.checkpoint import Checkpoint
from lhcompile.load.lm_checkpoint import EMBEDDING, Reading, settle_lm, with_plain_keys
from lhcompile.load.options import HUGGING_FACE, GivenOptions, given_options
from lhcompile.load.safari import HyenaConfig, HyenaLM
from lhcompile.load.safari_checkpoint import (
    HYENA_IGNORED,
    HYENA_SUPPORTED,
    UNREAD,
    filled_hyena,
    hyena_shapes,
    load_safari,
    looks_like_safari,
    no_activation_is_id,
    unread,
)

__all__ = ["load_hyenadna", "looks_like_hyenadna"]

FAMILY = "hyenadna"
HUGGING_FACE_PREFIX = "hyena.backbone."
CHECKPOINTED = re.compile(r"\.(mixer|mlp)\.layer\.")
LENGTHS = {1026, 32770, 160002, 450002, 1000002}
"""Filter lengths of the published models: the sequence and two special tokens."""
TOKENS = "[CLS] 0, [SEP] 1, [BOS] 2, [MASK] 3, [PAD] 4, [RESERVED] 5, [UNK] 6, A 7, C 8, G 9, T 10, N 11"
IGNORED = HUGGING_FACE | HYENA_IGNORED | {"hyena_dropout", "hyena_filter_dropout", "n_classes", "use_head"}
TRAINING_MODULES = {"lm", "lm_simple", "dna_embedding"}
"""Names of the language models of the training code."""
MARKS = {"return_hidden_state", "checkpoint_mixer", "checkpoint_mlp"}
"""Options that only HyenaDNA's configurations have."""
RENAMED = {"bias": "use_bias", "max_seq_len": "l_max", "hyena_order": "order", "activation_freq": "w"}


@dataclass(frozen=True, kw_only=True)
class HyenaDNAConfig(HyenaConfig):
    """The defaults of the released module that differ from safari's."""

    shift: float = 0.05
    filter_layout: Literal["full", "standalone"] = "standalone"


def looks_like_hyenadna(checkpoint: Checkpoint) -> bool:
    """By keys of its own, or by safari's keys and its vocabulary, with or without padding."""
    plain = with_plain_keys(checkpoint)
    return _has_its_keys(checkpoint) or (looks_like_safari(plain) and _vocabulary(plain) in (12, 16))


def _has_its_keys(checkpoint: Checkpoint) -> bool:
    """The prefix of Hugging Face, or the infix of Lightning's checkpointed layers."""
    return any(
        key.startswith(HUGGING_FACE_PREFIX) or (".filter_fn." in key and CHECKPOINTED.search(key))
        for key in checkpoint.tensors
    )


def _vocabulary(plain: Checkpoint) -> int | None:
    embedding = plain.tensors.get(EMBEDDING)
    return None if embedding is None or not embedding.ndim else int(embedding.shape[0])


def _is_safaris(checkpoint: Checkpoint, given: GivenOptions) -> bool:
    """Whether keys that both have are safari's: neither filter length nor options are HyenaDNA's."""
    tables = [value for key, value in checkpoint.tensors.items() if key.endswith(".filter_fn.pos_emb.z")]
    if _has_its_keys(checkpoint) or any(table.ndim == 3 and table.shape[1] in LENGTHS for table in tables):
        return False
    values = given.values
    return values.get("vocab_size") != 12 and values.get("model_type") != FAMILY and MARKS.isdisjoint(values)


def load_hyenadna(checkpoint: Checkpoint, config: Path | None, context: int | None) -> LoadedModel:
    """The module of a HyenaDNA checkpoint; input_ids [batch, seq ≤ l_max] → logits [batch, seq, vocab].

    Raises CheckpointError for the file's faults, one of which is a missing head that nothing says is the embedding;
    ConfigError for the configuration's.
    """
    given = no_activation_is_id(given_options(checkpoint, config, nested=("layer",), renamed=RENAMED))
    if _is_safaris(checkpoint, given):
        return load_safari(checkpoint, config, context)
    hub = any(key.startswith(HUGGING_FACE_PREFIX) for key in checkpoint.tensors)
    training = given_options(checkpoint, config).values.get("_name_") in TRAINING_MODULES and not hub
    ignored = IGNORED if training else IGNORED | UNREAD.keys()
    reading = Reading(_plain(checkpoint), FAMILY)
    shaped = hyena_shapes(reading)
    taps, key = shaped["short_filter_order"]
    if hub and taps != 3:
        raise ConfigError(f"{checkpoint.path}: {key!r} has {taps} taps; the published module is causal with 3 only")
    settled = settle_lm(
        HyenaConfig if training else HyenaDNAConfig, reading, given, shaped, context,
        tied=True if training else None, supported=HYENA_SUPPORTED, ignored=ignored,
    )  # fmt: skip
    if settled.vocab in (12, 16):
        settled.notes.append(f"tokens are characters: {TOKENS}")
    if training:
        settled.notes.append("read as the training code's module, as _name_ says; the released one has shift 0.05")
    else:
        settled.notes.extend(unread(given))
    return filled_hyena(settled, given, _hub_model if hub else HyenaLM)


def _hub_model(config: HyenaConfig) -> HyenaLM:
    """The form of Hugging Face, in which `layer_norm_epsilon` is the last norm's alone."""
    model = HyenaLM(config)
    for module in model.backbone.layers.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    return model


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with safari's keys."""
    tensors = {key.removeprefix("hyena."): value for key, value in checkpoint.tensors.items()}
    tensors = {CHECKPOINTED.sub(r".\1.", key): value for key, value in tensors.items()}
    return with_plain_keys(replace(checkpoint, tensors=tensors))
