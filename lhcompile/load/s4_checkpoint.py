"""A checkpoint of the stacked S4 model: its options from its keys, its shapes and the user's configuration."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lhcompile.artifacts import LoadedModel, Signal
from lhcompile.errors import CheckpointError
from lhcompile.load.checkpoint import Checkpoint, fill, without_prefix
from lhcompile.load.lm_checkpoint import Reading, context_of
from lhcompile.load.options import GivenOptions, given_options, settle
from lhcompile.load.s4 import S4Block, S4Config, S4Model

__all__ = ["load_s4", "looks_like_s4"]

ENCODER, DECODER = "encoder.weight", "decoder.weight"
KERNEL = re.compile(r"s4_layers\.\d+\.(layer\.)?kernel\.")
BACKBONE = (
    (re.compile(r"model\.layers\.(\d+)\.layer\."), r"s4_layers.\1."),
    (re.compile(r"model\.layers\.(\d+)\.norm\.norm\."), r"norms.\1."),
    (re.compile(r"model\.norm\.norm\."), "norm."),
    (re.compile(r"encoder\.\d+\.(weight|bias)$"), r"encoder.\1"),
    (re.compile(r"decoder\.\d+\.output_transform\."), "decoder."),
)
"""Keys of the sequence model of the same repository, which trains it by Lightning → those of the example."""
CACHED = re.compile(r".*\.kernel\.(omega|z)$")
"""What kernels of earlier versions cached beside their parameters."""
TAPS = 2048
"""Taps that a layer without modes keeps, where nobody says how long a sequence gets."""
MODES = {"s4d": ("s4d", "diag"), "diag": ("diag", "s4d"), "dplr": ("dplr", "nplr", "s4")}
"""layer → the values that the option `mode` may have"""
UNREAD: dict[str, frozenset[str]] = {"s4d": frozenset({"l_max"}), "diag": frozenset({"rank"}), "dplr": frozenset()}
"""layer → fields of S4Config that it does not read"""
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "bidirectional": (False, None),
    "n_repeat": (1,),
    "norm": ("layer", {"_name_": "layer"}),
    "pool": (None, {"_name_": "pool", "stride": 1, "expand": None}),
    "residual": ("R", "residual"),
    "bottleneck": (None,),
    "gate": (None,),
    "weight_norm": (False,),
}
"""Options that are no fields of S4Config → the values that are built in."""
IGNORED = frozenset({
    "_name_", "backend", "decoder", "deterministic", "drop_kernel", "dropinp", "dropout", "dt_max", "dt_min", "encoder",
    "gate_act", "init", "init_args", "initializer", "lr", "measure", "tie_dropout", "track_norms", "transposed",
    "verbose", "wd",
})  # fmt: skip
"""Options that matter to training, or to the layout inside the original."""
S4D_ALONE: dict[str, Any] = {
    "channels": 1, "rank": 1, "dt_tie": True, "disc": "zoh", "is_real": False, "dt_fast": False, "dt_transform": "exp",
    "real_transform": "exp", "imag_transform": "none", "bandlimit": None, "swap_channels": False, "activation": "gelu",
    "mult_act": "id", "final_act": "glu",
}  # fmt: skip
"""What s4d.py has built in."""
RENAMED = {"N": "d_state", "kernel": "mode", "postact": "final_act"}


def looks_like_s4(checkpoint: Checkpoint) -> bool:
    keys = _renamed(without_prefix(checkpoint, {ENCODER})).tensors
    return ENCODER in keys and any(KERNEL.match(key) for key in keys)


def load_s4(checkpoint: Checkpoint, config: Path | None, context: int | None) -> LoadedModel:
    """The module of a stacked S4 or S4D model; features [batch, seq, d_input] → values [batch, seq, d_output].

    Raises CheckpointError for the file's faults, ConfigError for the configuration's.
    """
    checkpoint = _renamed(without_prefix(checkpoint, {ENCODER}))
    used = {key: value for key, value in checkpoint.tensors.items() if not CACHED.match(key)}
    checkpoint = replace(checkpoint, tensors=used)
    layer = _layer(checkpoint)
    reading = Reading(checkpoint, f"a stacked S4 model of {layer} layers")
    given = _given(checkpoint, config)
    ignored = IGNORED | UNREAD[layer]
    supported = SUPPORTED | {"mode": (*MODES[layer], None)}
    options, notes = settle(S4Config, given, _shapes(reading, layer), supported=supported, ignored=ignored)
    context = context_of(reading, context, {"l_max": options.l_max})
    module = S4Model(options)
    fill(module, checkpoint, reading.kind)
    if options.swap_channels:
        _unswap(module)
    if options.l_max and options.layer != "s4d":
        notes.append(f"past l_max {options.l_max} the recurrence goes on, where the original cuts its kernel")
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


def _renamed(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the keys of the example."""
    tensors = {}
    for key, value in checkpoint.tensors.items():
        for pattern, replacement in BACKBONE:
            key = pattern.sub(replacement, key) if pattern.match(key) else key
        tensors[key] = value
    return replace(checkpoint, tensors=tensors)


def _given(checkpoint: Checkpoint, config: Path | None) -> GivenOptions:
    """The options, those of a mapping `layer` beside the others; an activation that is null is none."""
    nested = isinstance(given_options(checkpoint, config).values.get("layer"), dict)
    given = given_options(checkpoint, config, nested=("layer",) if nested else (), renamed=RENAMED)
    values = dict(given.values)
    if values.get("layer") == "fftconv":  # the only layer inside the block of s4.py
        del values["layer"]
    values |= {name: "id" for name in ("activation", "mult_act") if values.get(name, "") is None}
    return replace(given, values=values)


def _layer(checkpoint: Checkpoint) -> str:
    """s4d, diag or dplr, by the names of the first layer's parameters."""
    names = {key[match.end() :] for key in checkpoint.tensors if (match := KERNEL.match(key))}
    return "s4d" if "log_A_real" in names else "dplr" if names & {"P", "l_kernel"} else "diag"


def _shapes(reading: Reading, layer: str) -> dict[str, tuple[Any, str]]:
    """option → (value, the key whose shape determines it)"""
    block = "s4_layers.0." if layer == "s4d" else "s4_layers.0.layer."
    d_model, d_input = reading.shape(ENCODER, "[d_model, d_input]")
    layers = reading.numbers(r"s4_layers\.(\d+)\.")
    if layers != list(range(len(layers))):
        raise CheckpointError(f"{reading.checkpoint.path}: the layers are numbered {layers}, with gaps")
    found: dict[str, tuple[Any, str]] = {
        "layer": (layer, f"{block}kernel.*"),
        "d_input": (d_input, ENCODER),
        "d_model": (d_model, ENCODER),
        "d_output": (reading.shape(DECODER, "[d_output, d_model]")[0], DECODER),
        "n_layers": (len(layers), f"s4_layers.{layers[-1]}"),
    }
    if "norm.weight" in reading.tensors:
        found |= {"final_norm": (True, "norm.weight"), "prenorm": (True, "norm.weight")}
    else:
        found |= {"final_norm": (False, "norm.weight")}
    if layer != "s4d":
        return found | _kernel_shapes(reading, layer, d_model) | _linear_shapes(reading, d_model)
    c = block + "kernel.C"
    half = reading.shape(c, "[d_model, d_state / 2, 2]")[1]
    return found | {"d_state": (2 * half, c)} | {name: (value, c) for name, value in S4D_ALONE.items()} | {
        "n_ssm": (d_model, c)
    }


def _kernel_shapes(reading: Reading, layer: str, d_model: int) -> dict[str, tuple[Any, str]]:
    """The same of a kernel of s4.py."""
    prefix = "s4_layers.0.layer."
    a, b, c, d = (prefix + name for name in ("kernel.A_real", "kernel.B", "kernel.C", "D"))
    dt, imag, p = (prefix + name for name in ("kernel.inv_dt", "kernel.A_imag", "kernel.P"))
    n_ssm, modes = reading.shape(a, "[n_ssm, d_state / 2]")
    real = layer == "diag" and imag not in reading.tensors and reading.tensors.get(b, reading.tensors[a]).ndim == 3
    if d_model % n_ssm:
        raise reading.error(f"{a!r} holds {n_ssm} systems, which {d_model} channels cannot share")
    columns = reading.shape(dt, "[d_model, 1 or d_state / 2]")[1]
    channels = reading.shape(d, "[channels, d_model]")[0]
    if c in reading.tensors and reading.tensors[c].shape[:1] == (2 * channels,):
        raise reading.error(f"{c!r} holds two kernels for each in {d!r}: a bidirectional layer cannot be streamed")
    found: dict[str, tuple[Any, str]] = {
        "d_state": (modes if real else 2 * modes, a),
        "n_ssm": (n_ssm, a),
        "channels": (channels, d),
        "dt_tie": (columns == 1, dt),
        "is_real": (real, b),
    }
    if layer == "dplr":
        found |= {"rank": (reading.shape(p, "[rank, n_ssm, d_state / 2, 2]")[0], p), "disc": ("bilinear", p)}
    return found


def _linear_shapes(reading: Reading, d_model: int) -> dict[str, tuple[Any, str]]:
    """Whether there is a linear map behind the kernel, and a GLU behind it."""
    linear = "s4_layers.0.output_linear.0.weight"
    if not any(key.startswith("s4_layers.0.output_linear.") for key in reading.tensors):
        return {"final_act": ("none", "s4_layers.0.output_linear.*")}
    rows = reading.shape(linear, "[d_model or 2 · d_model, channels · d_model]")[0]
    return {"final_act": ("glu", linear)} if rows == 2 * d_model else {}


def _unswap(module: S4Model) -> None:
    for part in module.s4_layers:
        if isinstance(part, S4Block) and part.copies > 1:
            part.unswap()


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
