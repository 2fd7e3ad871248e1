"""A checkpoint of the stacked S4 model: its options from its keys, its shapes and the user's configuration."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lhcompile.artifacts import LoadedModel, Signal
from lhcompile.errors import CheckpointError
from lhcompile.load.checkpoint import Checkpoint, fill, without_prefix
from lhcompile.load.lm_checkpoint import Reading
from lhcompile.load.options import given_options, settle
from lhcompile.load.s4 import S4Config, S4Model

__all__ = ["load_s4", "looks_like_s4"]

ENCODER, DECODER = "encoder.weight", "decoder.weight"
KERNEL = re.compile(r"s4_layers\.\d+\.(layer\.)?kernel\.")
TAPS = 2048
"""Taps that a layer without modes keeps, where nobody says how long a sequence gets."""
MODES = {"s4d": ("s4d", "diag"), "diag": ("diag", "s4d"), "dplr": ("dplr", "nplr", "s4")}
"""layer → the values that the option `mode` may have"""
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation": ("gelu",),
    "bandlimit": (None,),
    "bidirectional": (False,),
    "bottleneck": (None,),
    "dt_fast": (False,),
    "dt_transform": ("exp",),
    "final_act": ("glu",),
    "gate": (None,),
    "imag_transform": ("none",),
    "initializer": (None,),
    "is_real": (False,),
    "kernel": (None,),
    "mult_act": (None,),
    "postact": (None, "glu"),
    "real_transform": ("exp",),
    "swap_channels": (False,),
    "weight_norm": (False,),
}
"""Options that are no fields of S4Config → the values that are built in."""
IGNORED = {
    "backend", "deterministic", "drop_kernel", "dropout", "dt_max", "dt_min", "gate_act", "init", "l_max", "lr",
    "measure", "tie_dropout", "transposed", "verbose", "wd",
}  # fmt: skip
"""Options that matter to training, or to the layout inside the original."""


def looks_like_s4(checkpoint: Checkpoint) -> bool:
    keys = without_prefix(checkpoint, {ENCODER}).tensors
    return ENCODER in keys and any(KERNEL.match(key) for key in keys)


def load_s4(checkpoint: Checkpoint, config: Path | None, context: int | None) -> LoadedModel:
    """The module of a stacked S4 or S4D model; features [batch, seq, d_input] → values [batch, seq, d_output].

    Raises CheckpointError for the file's faults, ConfigError for the configuration's.
    """
    checkpoint = without_prefix(checkpoint, {ENCODER})
    layer = _layer(checkpoint)
    reading = Reading(checkpoint, f"a stacked S4 model of {layer} layers")
    given = given_options(checkpoint, config, renamed={"N": "d_state"})
    supported = SUPPORTED | {"mode": MODES[layer]}
    options, notes = settle(S4Config, given, _shapes(reading, layer), supported=supported, ignored=IGNORED)
    module = S4Model(options)
    fill(module, checkpoint, reading.kind)
    notes.append("each position is decoded; the published example averages over time first")
    kept = _settled(module, checkpoint.path, context or TAPS)
    if kept:
        notes.append(f"kept as {context or TAPS} taps, for their modes cancel: {', '.join(kept)}")
    return LoadedModel(
        module=module.float().eval().requires_grad_(False),
        family="s4d" if layer == "s4d" else f"s4-{layer}",
        context_length=(context or TAPS) if kept else context,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        source=str(checkpoint.path),
        config=asdict(options),
        notes=(*checkpoint.notes, *notes),
        signal=Signal(options.d_input),
    )


def _layer(checkpoint: Checkpoint) -> str:
    """s4d, diag or dplr, by the names of the first layer's parameters."""
    names = {key[match.end() :] for key in checkpoint.tensors if (match := KERNEL.match(key))}
    return "s4d" if "log_A_real" in names else "dplr" if names & {"P", "l_kernel"} else "diag"


def _shapes(reading: Reading, layer: str) -> dict[str, tuple[Any, str]]:
    """option → (value, the key whose shape determines it)"""
    block = "s4_layers.0." if layer == "s4d" else "s4_layers.0.layer."
    d, c, kernel = block + "D", block + "kernel.C", block + "kernel."
    d_model, d_input = reading.shape(ENCODER, "[d_model, d_input]")
    layers = reading.numbers(r"s4_layers\.(\d+)\.")
    if layers != list(range(len(layers))):
        raise CheckpointError(f"{reading.checkpoint.path}: the layers are numbered {layers}, with gaps")
    found: dict[str, tuple[Any, str]] = {
        "layer": (layer, f"{kernel}*"),
        "d_input": (d_input, ENCODER),
        "d_model": (d_model, ENCODER),
        "d_output": (reading.shape(DECODER, "[d_output, d_model]")[0], DECODER),
        "n_layers": (len(layers), f"s4_layers.{layers[-1]}"),
    }
    if layer == "s4d":
        half = reading.shape(c, "[d_model, d_state / 2, 2]")[1]
        alone = {"n_ssm": d_model, "channels": 1, "rank": 1, "dt_tie": True, "disc": "zoh"}
        return found | {"d_state": (2 * half, c)} | {name: (value, c) for name, value in alone.items()}
    a, dt, p = kernel + "A_real", kernel + "inv_dt", kernel + "P"
    n_ssm, half = reading.shape(a, "[n_ssm, d_state / 2]")
    if d_model % n_ssm:
        raise reading.error(f"{a!r} holds {n_ssm} systems, which {d_model} channels cannot share")
    columns = reading.shape(dt, "[d_model, 1 or d_state / 2]")[1]
    found |= {
        "d_state": (2 * half, a),
        "n_ssm": (n_ssm, a),
        "channels": (reading.shape(d, "[channels, d_model]")[0], d),
        "dt_tie": (columns == 1, dt),
        "rank": (1, a),
    }
    if layer == "dplr":
        if columns != 1:
            raise reading.error(f"{dt!r} has {columns} steps for each channel, expected one")
        found |= {"rank": (reading.shape(p, "[rank, n_ssm, d_state / 2, 2]")[0], p), "disc": ("bilinear", p)}
    return found


def _settled(module: S4Model, path: Path, length: int) -> list[str]:
    """Computes every layer's modes; returns the paths of those that keep taps.

    Raises CheckpointError naming layer and modulus for a pole that does not fade in single precision.
    """
    kept = []
    for name, convolution in module.convolutions():
        try:
            system = convolution.settle(length)
        except ValueError as error:
            raise CheckpointError(f"{path}: {name + '.kernel'!r}: {error}: its memory would never fade") from None
        if system is None:
            kept.append(name)
    return kept
