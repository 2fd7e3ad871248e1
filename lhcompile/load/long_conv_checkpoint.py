"""A safari LongConv checkpoint, of its language model or of its sequence model: options, then module."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lhcompile.artifacts import LoadedModel, Signal
from lhcompile.errors import ConfigError
from lhcompile.load.checkpoint import Checkpoint
from lhcompile.load.lm_checkpoint import (
    EMBEDDING,
    LM_IGNORED,
    LM_SUPPORTED,
    Reading,
    context_of,
    filled,
    filled_as,
    lm_shapes,
    settle_lm,
    with_plain_keys,
)
from lhcompile.load.long_conv import (
    LongConvConfig,
    LongConvLM,
    LongConvSequence,
    LongConvSequenceConfig,
    OperatorConfig,
)
from lhcompile.load.options import GivenOptions, given_options, settle

__all__ = ["load_long_conv", "looks_like_long_conv"]

FAMILY = "safari-long-conv"
KERNEL = re.compile(r"((?:backbone|model)\.layers\.(\d+)\.(?:mixer|layer)\.)kernel\.kernel$")
ENCODER, DECODER = "encoder.0.weight", "decoder.0.output_transform.weight"
NORMS: dict[str, tuple[Any, ...]] = {
    "layer": ("layer",),
    "scalar": ("layer",),
    "batch": ("batch",),
    "none": (None, "none"),
}
"""Kind of norm, as keys tell it → safari's names of it."""
POOL = {"_name_": "pool", "stride": 1, "expand": None}  # which pools nothing

SUPPORTED: dict[str, tuple[Any, ...]] = {
    **LM_SUPPORTED,
    "bidirectional": (False,),
    "causal": (True,),
    "smooth_freq": (False,),
    "block_fft_conv": (False,),
    "weight_norm": (False,),
    "residual": ("R", "residual"),
    "pool": (None, POOL),
    "n_repeat": (1,),
    "mode": ("last",),  # of the decoder; the others mix positions
    "use_lengths": (False,),
}
IGNORED = LM_IGNORED | {
    "block_fft_conv_args", "decoder", "dropinp", "encoder", "initializer", "kernel_dropout", "layer", "learning_rate",
    "tie_dropout", "track_norms", "transposed", "verbose", "weight_init",
}  # fmt: skip


def looks_like_long_conv(checkpoint: Checkpoint) -> bool:
    return any(KERNEL.match(key) for key in with_plain_keys(checkpoint, (EMBEDDING, DECODER)).tensors)


def load_long_conv(checkpoint: Checkpoint, config: Path | None, context: int | None) -> LoadedModel:
    """The module of a LongConv state dict: input_ids [batch, seq ≤ l_max] → logits [batch, seq, vocab], or features
    to values where the sequence model's encoder is linear.

    Raises CheckpointError for the file's faults, ConfigError for the configuration's.
    """
    given = given_options(checkpoint, config, nested=("layer", "decoder"))
    given = replace(given, values={k: _plain(k, v) for k, v in given.values.items()})
    reading = Reading(with_plain_keys(checkpoint, (EMBEDDING, DECODER)), FAMILY)
    notes = ["taps beyond the sequence are cut; safari itself wraps them around at lengths below l_max"]
    load = _load_lm if any(key.startswith("backbone.") for key in reading.tensors) else _load_sequence
    return load(reading, given, context, notes)


def _plain(name: str, value: Any) -> Any:
    """`activation: null` means none, `postact: null` no output_linear."""
    return {"activation": "id", "postact": "none"}.get(name, value) if value is None else value


def _load_lm(reading: Reading, given: GivenOptions, context: int | None, notes: list[str]) -> LoadedModel:
    shaped = lm_shapes(reading)
    shaped |= _operator_shapes(reading, given, shaped["d_model"][0])
    settled = settle_lm(
        LongConvConfig, reading, given, shaped, context, tied=True, supported=SUPPORTED, ignored=IGNORED
    )
    _check_window(given, settled.options)
    with torch.device("meta"):
        module = LongConvLM(settled.options)
    return filled(replace(settled, notes=notes + settled.notes), module)


def _load_sequence(reading: Reading, given: GivenOptions, context: int | None, notes: list[str]) -> LoadedModel:
    outputs, d_model = reading.shape(DECODER, "[d_output, d_model]")
    shaped = _operator_shapes(reading, given, d_model)
    features = ENCODER.replace("weight", "bias") in reading.tensors
    rows, columns = reading.shape(ENCODER, "[d_model, d_input]" if features else "[n_tokens, d_model]")
    layers = reading.numbers(r"model\.layers\.(\d+)\.")
    shaped |= {
        "d_model": (d_model, DECODER),
        "d_output": (outputs, DECODER),
        "d_input": (columns if features else rows, ENCODER),
        "features": (features, ENCODER),
        "n_layers": (len(layers), f"model.layers.{layers[-1]}"),
        **_norm_shapes(reading),
    }
    given = _with_norm(given, shaped["norm"][0])
    options, assumed = settle(LongConvSequenceConfig, given, shaped, supported=SUPPORTED, ignored=IGNORED)
    context = context_of(reading, context, {"l_max": options.l_max})
    _check_window(given, options)
    notes = [*notes, *assumed, "every position is read out, as safari's decoder does step by step"]
    with torch.device("meta"):
        module = LongConvSequence(options)
    kept = {key: value for key, value in reading.tensors.items() if not key.endswith(".num_batches_tracked")}
    reading = replace(reading, checkpoint=replace(reading.checkpoint, tensors=kept))
    shown = asdict(options) if features else asdict(options) | {"vocab_size": outputs}
    loaded = filled_as(module, reading, shown, context, notes)
    return replace(loaded, signal=Signal(options.d_input)) if features else loaded


def _with_norm(given: GivenOptions, kind: str) -> GivenOptions:
    """The options with the norm's own eps, and without its name. Raises ConfigError when that is none of the keys'.

    kind: what the keys say, one of `NORMS`. safari's option is a name, or a mapping of a name and more.
    """
    norm = given.values.get("norm")
    if "norm" not in given.values:
        return given
    inner = given.inside("norm").values if isinstance(norm, dict) else {"_name_": norm}
    name = inner.get("_name_", "layer")
    if name not in NORMS[kind]:
        raise given.refuse("norm", f"is {name!r}, but the keys of the checkpoint make it {kind}")
    values = {key: value for key, value in given.values.items() if key != "norm"}
    eps = {"eps": inner["eps"]} if "eps" in inner else {}
    return replace(given, values=values | eps, files=given.files | dict.fromkeys(eps, given.files["norm"]))


def _operator_shapes(reading: Reading, given: GivenOptions, d_model: int) -> dict[str, tuple[Any, str]]:
    """option → (value, key) of the first layer's operator. Raises ConfigError when its last activation is not said."""
    key = min(key for key in reading.tensors if KERNEL.match(key))
    prefix = key.removesuffix("kernel.kernel")
    channels, _, l_max = reading.shape(key, "[channels, d_model, l_max]")
    direct = reading.shape(prefix + "D", "[channels, d_model]")[0]
    if channels == 2 * direct:
        raise ConfigError(f"{reading.checkpoint.path}: {key!r} has two kernels a channel: bidirectional is not causal")
    found: dict[str, tuple[Any, str]] = {"channels": (channels, key), "l_max": (l_max, key)}
    linear = prefix + "output_linear.0.weight"
    if linear not in reading.tensors:
        return found | {"postact": ("none", prefix + "output_linear")}
    rows = reading.shape(linear, "[d_model or 2 * d_model, channels * d_model]")[0]
    if rows == 2 * d_model:
        return found | {"postact": ("glu", linear)}
    if given.values.get("postact", "glu") == "glu":
        raise ConfigError(f"{reading.checkpoint.path}: {linear!r} has {rows} rows, no GLU: give postact in --config")
    return found


def _norm_shapes(reading: Reading) -> dict[str, tuple[Any, str]]:
    """The kind and place of the sequence model's norms, by their keys."""
    prefix = "model.layers.0.norm.norm."
    kinds = {"running_mean": "batch", "m": "scalar", "weight": "layer"}
    norm = next((kind for part, kind in kinds.items() if prefix + part in reading.tensors), "none")
    found: dict[str, tuple[Any, str]] = {"norm": (norm, prefix + "*")}
    if norm != "none":
        found["prenorm"] = (any(key.startswith("model.norm.norm.") for key in reading.tensors), "model.norm.norm.*")
    return found


def _check_window(given: GivenOptions, options: OperatorConfig) -> None:
    if options.use_ma_smoothing and (options.ma_window_len < 1 or options.ma_window_len % 2 == 0):
        raise given.refuse("ma_window_len", f"is {options.ma_window_len}, not odd and positive")
