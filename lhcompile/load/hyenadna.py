"""HyenaDNA checkpoints: the safari Hyena model over nucleotides, in the forms of Hugging Face and of Lightning.

The two forms differ in their keys' prefixes, and Lightning's training code may put `.layer` into them. The filters'
decay has a floor, `shift` 0.05, that stands in no file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lhcompile.artifacts import LoadedModel
from lhcompile.errors import ConfigError
from lhcompile.load.checkpoint import Checkpoint, without_prefix
from lhcompile.load.lm_checkpoint import EMBEDDING, Reading, settle_lm
from lhcompile.load.options import HUGGING_FACE, given_options
from lhcompile.load.safari import HyenaConfig, HyenaLM
from lhcompile.load.safari_checkpoint import (
    HYENA_IGNORED,
    HYENA_SUPPORTED,
    filled_hyena,
    hyena_shapes,
    no_activation_is_id,
)

__all__ = ["load_hyenadna", "looks_like_hyenadna"]

FAMILY = "hyenadna"
HUGGING_FACE_PREFIX = "hyena.backbone."
CHECKPOINTED = re.compile(r"\.(mixer|mlp)\.layer\.")
LENGTHS = {1026, 32770, 160002, 450002, 1000002}
"""Filter lengths of the published models: the sequence and two special tokens."""
TOKENS = "[CLS] 0, [SEP] 1, [BOS] 2, [MASK] 3, [PAD] 4, [RESERVED] 5, [UNK] 6, A 7, C 8, G 9, T 10, N 11"
IGNORED = HUGGING_FACE | HYENA_IGNORED | {"hyena_dropout", "hyena_filter_dropout", "n_classes", "use_head"}
RENAMED = {"bias": "use_bias", "max_seq_len": "l_max", "hyena_order": "order", "activation_freq": "w"}


@dataclass(frozen=True, kw_only=True)
class HyenaDNAConfig(HyenaConfig):
    """The defaults that differ from safari's; for orders above 2 the published module has the order slowest."""

    shift: float = 0.05
    filter_layout: Literal["full", "standalone"] = "standalone"


def looks_like_hyenadna(checkpoint: Checkpoint) -> bool:
    """By the prefix of Hugging Face, the infix of Lightning's checkpointed layers, or vocabulary and filter length."""
    tensors = checkpoint.tensors
    if any(key.startswith(HUGGING_FACE_PREFIX) for key in tensors):
        return True
    if any(".filter_fn." in key and CHECKPOINTED.search(key) for key in tensors):
        return True
    plain = without_prefix(checkpoint, {EMBEDDING}).tensors
    tables = [value for key, value in plain.items() if key.endswith(".filter_fn.pos_emb.z") and value.ndim == 3]
    vocab = plain[EMBEDDING].shape[:1] if EMBEDDING in plain else ()
    return vocab in ((12,), (16,)) and any(table.shape[1] in LENGTHS for table in tables)


def load_hyenadna(checkpoint: Checkpoint, config: Path | None, context: int | None) -> LoadedModel:
    """The module of a HyenaDNA checkpoint; input_ids [batch, seq ≤ l_max] → logits [batch, seq, vocab].

    Raises CheckpointError for the file's faults, one of which is a missing head that nothing says is the embedding;
    ConfigError for the configuration's.
    """
    given = no_activation_is_id(given_options(checkpoint, config, nested=("layer",), renamed=RENAMED))
    published = any(key.startswith(HUGGING_FACE_PREFIX) for key in checkpoint.tensors)
    reading = Reading(_plain(checkpoint), FAMILY)
    shaped = hyena_shapes(reading)
    taps, key = shaped["short_filter_order"]
    if published and taps != 3:
        raise ConfigError(f"{checkpoint.path}: {key!r} has {taps} taps; the published module is causal with 3 only")
    settled = settle_lm(
        HyenaDNAConfig, reading, given, shaped, context, tied=None, supported=HYENA_SUPPORTED, ignored=IGNORED
    )
    if settled.vocab in (12, 16):
        settled.notes.append(f"tokens are characters: {TOKENS}")
    return filled_hyena(settled, given, HyenaLM)


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with safari's keys."""
    tensors = {key.removeprefix("hyena."): value for key, value in checkpoint.tensors.items()}
    tensors = {CHECKPOINTED.sub(r".\1.", key): value for key, value in tensors.items()}
    return without_prefix(replace(checkpoint, tensors=tensors), {EMBEDDING})
