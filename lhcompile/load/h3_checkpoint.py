"""An H3 checkpoint: its options from its shapes and the user's configuration, then its module.

Files of before the present order of a block's norms are turned: a norm then stood behind what it now stands before.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lhcompile.artifacts import LoadedModel
from lhcompile.errors import CheckpointError
from lhcompile.load.checkpoint import Checkpoint, without_prefix
from lhcompile.load.h3 import H3LM, H3Config, H3Mixer
from lhcompile.load.lm_checkpoint import (
    EMBEDDING,
    LM_IGNORED,
    LM_SUPPORTED,
    ROTARY_CONTEXT,
    Reading,
    filled,
    layers_with,
    lm_shapes,
    settle_lm,
)
from lhcompile.load.options import given_options

__all__ = ["load_h3", "looks_like_h3"]

FAMILY = "h3"
OLD_EMBEDDING = "embedding.weight"
SUPPORTED: dict[str, tuple[Any, ...]] = {
    **LM_SUPPORTED,
    "mode": ("diag",),
    "channels": (1,),
}
IGNORED = LM_IGNORED | {
    "deterministic", "dt_max", "dt_min", "layer", "measure", "measure_args", "rank", "ssm_cfg", "use_fast_fftconv",
    "verbose",
}  # fmt: skip


def looks_like_h3(checkpoint: Checkpoint) -> bool:
    return any(key.endswith(".mixer.ssm_k_kernel.kernel.B") for key in checkpoint.tensors)


def load_h3(checkpoint: Checkpoint, config: Path | None, context: int | None) -> LoadedModel:
    """The module of an H3 state dict; input_ids [batch, seq] → logits [batch, seq, vocab].

    There is no longest sequence, unless the options have l_max; rotary tables are made for `context`.
    Raises CheckpointError for the file's faults, ConfigError for the configuration's.
    """
    given = given_options(checkpoint, config, nested=("layer", "ssm_cfg"))
    reading = Reading(_renamed(without_prefix(checkpoint, {EMBEDDING, OLD_EMBEDDING})), FAMILY)
    shaped = lm_shapes(reading) | _ssm_shapes(reading)
    settled = settle_lm(
        H3Config, reading, given, shaped, context, tied=True, supported=SUPPORTED, ignored=IGNORED
    )
    if settled.options.attention.rotary_emb_dim and settled.context is None:
        settled = replace(settled, context=ROTARY_CONTEXT)
        settled.notes.append(f"made rotary tables for {ROTARY_CONTEXT} positions; --context sets another length")
    if settled.options.l_max:
        cut = f"past l_max {settled.options.l_max} the recurrence goes on, where the original cuts its kernel"
        settled.notes.append(cut)
    with torch.device("meta"):
        module = H3LM(settled.options, settled.context or ROTARY_CONTEXT)
    loaded = filled(settled, module)
    _check_poles(reading, module)
    return loaded


def _renamed(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the present names and order of norms."""
    tensors: dict[str, Tensor] = {}
    for key, value in checkpoint.tensors.items():
        key = re.sub(r"^s4seq\.encoder\.", "backbone.", key)
        key = re.sub(r"^embedding\.", "backbone.embeddings.word_embeddings.", key)
        tensors[re.sub(r"^backbone\.norm\.", "backbone.ln_0.", key)] = value
    if "backbone.ln_0.weight" not in tensors:
        return replace(checkpoint, tensors=tensors)
    last = max(layers_with(Reading(replace(checkpoint, tensors=tensors), FAMILY), ""), default=0)

    def place(key: str) -> str:
        if key.startswith("backbone.ln_0."):
            return key.replace("ln_0", "layers.0.norm1")
        match = re.fullmatch(r"backbone\.layers\.(\d+)\.norm([12])\.(\w+)", key)
        if match is None:
            return key
        layer, norm, part = int(match[1]), match[2], match[3]
        if norm == "1":
            return f"backbone.layers.{layer}.norm2.{part}"
        return f"backbone.ln_f.{part}" if layer == last else f"backbone.layers.{layer + 1}.norm1.{part}"

    note = "the file has the old order of norms: they were moved to the layers they now stand in"
    return replace(
        checkpoint, tensors={place(key): value for key, value in tensors.items()}, notes=(*checkpoint.notes, note)
    )


def _ssm_shapes(reading: Reading) -> dict[str, tuple[int, str]]:
    """option → (value, key) of the state-space models, from the first layer that has them."""
    layers = layers_with(reading, "mixer.ssm_k_kernel.")
    mixer = f"backbone.layers.{layers[0] if layers else 0}.mixer."
    shift, rates, direct = mixer + "ssm_k_kernel.kernel.B", mixer + "kernel.kernel.inv_A_real", mixer + "D"
    d_model, states = reading.shape(shift, "[d_model, d_state]")
    (heads,) = reading.shape(direct, "[d_model / head_dim]")
    copies, modes = reading.shape(rates, "[n_ssm, d_state / 2]")
    if d_model % heads:
        raise reading.error(f"{direct!r} has {heads} entries, which do not divide d_model {d_model}")
    if 2 * modes != states or heads % copies:
        raise reading.error(f"{rates!r} has shape [{copies}, {modes}], expected [n_ssm, {states // 2}] with n_ssm "
                            f"dividing {heads}")
    return {"d_state": (states, shift), "head_dim": (d_model // heads, direct), "n_ssm": (copies, rates)}


def _check_poles(reading: Reading, module: H3LM) -> None:
    """Raises CheckpointError for a pole that does not decay, once rounded as it will run."""
    for name, part in module.named_modules():
        if isinstance(part, H3Mixer):
            modulus = part.kernel.kernel()[0].to(torch.complex64).abs()
            if not bool((modulus < 1).all()):
                head = int((modulus.max(1).values >= 1).nonzero()[0])
                raise CheckpointError(
                    f"{reading.checkpoint.path}: {name + '.kernel.kernel.inv_A_real'!r} gives head {head} a pole of "
                    f"modulus {float(modulus[head].max())}, not below 1"
                )
