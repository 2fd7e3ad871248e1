"""LongConv checkpoints against their sums: both models, what is read, what must not be, and every message."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lm_checkpoints import Published, long_conv, long_conv_sequence, write
from lm_reference import LongConvReference, gap
from torch import Tensor

from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load import load
from lhcompile.load import long_conv as modules

LENGTH = 40
TOLERANCE = 1e-4  # float32 against float64, in units of the logits' spread

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # of the file, the options, the sums
    "published": ({}, {}, {}),
    "two channels": ({"channels": 2}, {}, {}),
    "no glu": ({"glu": False}, {}, {"postact": "silu"}),
    "shrunk by little": ({}, {"lam": 0.003}, {"lam": 0.003}),
    "smoothed": ({}, {"use_ma_smoothing": True}, {"window": 7}),
    "smoothed by three": ({"channels": 2}, {"use_ma_smoothing": True, "ma_window_len": 3}, {"window": 3}),
    "activation": ({}, {"activation": "tanh"}, {"activation": "tanh"}),
}


def distance(published: Published, folder: Path, truth: Published, length: int = LENGTH, **options: Any) -> float:
    weights, config = write(published, folder)
    return gap(load(str(weights), config=config).module, LongConvReference(truth.plain, **options), length)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_equations(tmp_path: Path, name: str) -> None:
    form, options, sums = VARIANTS[name]
    published = long_conv(**form)
    published.options["layer"] |= options
    assert distance(published, tmp_path, published, **sums) < TOLERANCE


def test_shorter_sequences_hear_the_causal_filter(tmp_path: Path) -> None:
    assert distance(long_conv(), tmp_path, long_conv(), length=9) < TOLERANCE


def test_what_is_found_and_what_is_assumed(tmp_path: Path) -> None:
    weights, config = write(long_conv(channels=2), tmp_path)
    config.unlink()
    loaded = load(str(weights))
    assert (loaded.family, loaded.context_length, loaded.signal.features) == ("safari-long-conv", 40, None)
    assert {"channels": 2, "l_max": 40, "postact": "glu", "vocab_size": 16}.items() <= loaded.config.items()
    cut, told = loaded.notes
    assert cut == "taps beyond the sequence are cut; safari itself wraps them around at lengths below l_max"
    assert told.endswith("lam 0.1, use_ma_smoothing False, ma_window_len 7, activation gelu")


def sequence(published: Published, prenorm: bool) -> Callable[[list[int]], Any]:
    reference = LongConvReference(published.plain)
    return lambda ids: reference.sequence(np.array(ids), prenorm)


@pytest.mark.parametrize("prenorm", [True, False])
@pytest.mark.parametrize("norm", ["layer", "batch", "scalar"])
def test_the_sequence_model(tmp_path: Path, norm: str, prenorm: bool) -> None:
    published = long_conv_sequence(norm, prenorm)
    parallel = {f"module.{key}": value for key, value in published.state.items()}
    write(published, tmp_path)
    for content in (published.state, {"state_dict": published.state, "epoch": 1}, parallel):
        torch.save(content, tmp_path / "model.pt")
        loaded = load(str(tmp_path / "model.pt"), config=tmp_path / "config.json")
        assert gap(loaded.module, sequence(published, prenorm), LENGTH) < TOLERANCE
        assert (loaded.config["norm"], loaded.config["prenorm"]) == (norm, prenorm)
        assert loaded.parameters == sum(
            value.numel() for key, value in published.state.items() if "running" not in key and "batches" not in key
        )


def test_the_sequence_model_of_features(tmp_path: Path) -> None:
    published = long_conv_sequence(features=True)
    weights, config = write(published, tmp_path)
    loaded = load(str(weights), config=config)
    assert loaded.signal.features == 3
    inputs = torch.randn(2, LENGTH, 3, generator=torch.Generator().manual_seed(3))
    reference = LongConvReference(published.plain)
    wanted = np.stack([reference.sequence(row.double().numpy(), True) for row in inputs])
    assert np.abs(loaded.module(inputs).numpy() - wanted).max() < TOLERANCE * wanted.std()


def test_a_norm_with_options_of_its_own(tmp_path: Path) -> None:
    published = long_conv_sequence()
    published.options["model"]["norm"] = {"_name_": "layer", "eps": 0.1}
    weights, config = write(published, tmp_path)
    reference = LongConvReference(published.plain, layer_norm_epsilon=0.1)
    loaded = load(str(weights), config=config)
    assert gap(loaded.module, lambda ids: reference.sequence(np.array(ids), True), LENGTH) < TOLERANCE


@pytest.mark.parametrize("name", ["instance", "group", "batch", None])
def test_norms_that_the_keys_are_not(tmp_path: Path, name: str | None) -> None:
    published = long_conv_sequence()
    published.options["model"]["norm"] = name
    weights, config = write(published, tmp_path)
    message = f"the option norm is {name!r}, but the keys of the checkpoint make it layer"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(str(weights), config=config)


def test_a_decoder_that_the_model_leaves_to_the_experiment(tmp_path: Path) -> None:
    published = long_conv_sequence()
    published.options["model"]["decoder"] = None
    published.options["decoder"] = {"_name_": "sequence", "mode": "pool"}
    weights, config = write(published, tmp_path)
    with pytest.raises(ConfigError, match="the option mode = 'pool' is not supported"):
        load(str(weights), config=config)


# ---- readings of the format that are wrong: none may pass for the right one ----------------------------------------


def taps(change: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def mutate(_: Any, patch: pytest.MonkeyPatch) -> None:
        right = modules.Taps.forward
        patch.setattr(modules.Taps, "forward", lambda self: change(self, right(self)))

    return mutate


def every(published: Published, end: str, change: Any) -> None:
    published.state |= {key: change(value) for key, value in published.state.items() if key.endswith(end)}


def gelu_of_tanh(_: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(modules.ACTIVATIONS, "gelu", lambda: torch.nn.GELU(approximate="tanh"))


def gelu_of_erf(_: Any, patch: pytest.MonkeyPatch) -> None:
    right = F.gelu
    patch.setattr(F, "gelu", lambda x, approximate="none": right(x))


def wrapped(_: Any, patch: pytest.MonkeyPatch) -> None:
    """The kernel whole at a shorter length, as safari convolves it."""

    def circular(u: Tensor, h: Tensor, bias: Tensor) -> Tensor:
        size = u.shape[-1] + 7
        spectrum = torch.fft.rfft(F.pad(h, (0, 7)), n=size) * torch.fft.rfft(u, n=size)
        return torch.fft.irfft(spectrum, n=size)[..., : u.shape[-1]] + u * bias[:, None]

    patch.setattr(modules, "fft_convolution", circular)


MUTANTS: dict[str, Callable[[Published, pytest.MonkeyPatch], Any]] = {
    "not shrunk": lambda p, m: p.options["layer"].update(lam=0.0),
    "cut, not shrunk": taps(lambda self, k: torch.where(k != 0, self.kernel.flatten(0, 1), 0.0)),
    "sign lost": taps(lambda self, k: k.abs()),
    "taps reversed": taps(lambda self, k: k.flip(-1)),
    "smoothed": lambda p, m: p.options["layer"].update(use_ma_smoothing=True),
    "channels exchanged": taps(lambda self, k: torch.cat(k.chunk(2)[::-1])),
    "channels inside": taps(lambda self, k: k.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)),
    "D left out": lambda p, m: every(p, "mixer.D", torch.zeros_like),
    "tanh gelu in the operator": gelu_of_tanh,
    "exact gelu in the mlp": gelu_of_erf,
    "halves of the glu": lambda p, m: [every(p, f"output_linear.0.{end}", lambda w: torch.cat(w.chunk(2)[::-1]))
                                      for end in ("weight", "bias")],
    "no activation": lambda p, m: p.options["layer"].update(activation=None),
    "eps": lambda p, m: p.options.update(layer_norm_epsilon=1e-6),
    "wrapped around": wrapped,
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_reading_moves_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    truth, published = long_conv(channels=2), long_conv(channels=2)
    MUTANTS[name](published, monkeypatch)
    assert distance(published, tmp_path, truth) > 3 * TOLERANCE


SEQUENCE_MUTANTS: dict[str, tuple[str, Callable[[Published], Any]]] = {
    "std of one less": ("scalar", lambda p: every(p, "norm.s", lambda s: s * (5 / 6) ** 0.5)),
    "shift before scale": ("scalar", lambda p: every(p, "norm.m", torch.neg)),
    "batch's own mean": ("batch", lambda p: every(p, "running_mean", torch.zeros_like)),
    "norm last": ("layer", lambda p: [p.state.pop(k) for k in list(p.state) if k.startswith("model.norm.")]
                  and p.options["model"].update(prenorm=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", SEQUENCE_MUTANTS)
def test_a_wrong_reading_of_the_sequence_model(tmp_path: Path, name: str) -> None:
    norm, mutate = SEQUENCE_MUTANTS[name]
    truth, published = long_conv_sequence(norm), long_conv_sequence(norm)
    mutate(published)
    weights, config = write(published, tmp_path)
    assert gap(load(str(weights), config=config).module, sequence(truth, True), LENGTH) > 3 * TOLERANCE


# ---- messages ------------------------------------------------------------------------------------------------------

MIXER = "backbone.layers.0.mixer."


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("D", torch.ones(6), "'{key}' has shape [6], expected [channels, d_model]; it looked like safari-long-conv"),
        ("kernel.kernel", torch.ones(1, 6, 30), "'backbone.layers.1.mixer.kernel.kernel' has shape [1, 6, 40], ex"),
        ("kernel.kernel", torch.ones(1, 6, 1), "a context length of 1; there is nothing to stream"),
        ("output_linear.0.bias", None, "missing key '{key}' of shape [12]"),
    ],
)
def test_broken_checkpoints(tmp_path: Path, key: str, value: Any, message: str) -> None:
    published = long_conv()
    published.state.pop(MIXER + key)
    if value is not None:
        published.state[MIXER + key] = value
    published.options["layer"].pop("l_max")
    weights, config = write(published, tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(message.format(key=MIXER + key))):
        load(str(weights), config=config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"l_max": 50}, "the option l_max is 50, but 'backbone.layers.0.mixer.kernel.kernel' in the"),
        ({"bidirectional": True}, "the option bidirectional = True is not supported"),
        ({"smooth_freq": True}, "the option smooth_freq = True is not supported"),
        ({"use_ma_smoothing": True, "ma_window_len": 4}, "the option ma_window_len is 4, not odd and positive"),
        ({"ma_window_length": 7}, "unknown option 'ma_window_length'; is 'ma_window_len' meant?"),
    ],
)
def test_configurations_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    published = long_conv()
    published.options["layer"] |= options
    weights, config = write(published, tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(str(weights), config=config)


def test_kernels_of_both_directions(tmp_path: Path) -> None:
    published = long_conv()
    every(published, "kernel.kernel", lambda k: torch.cat([k, k]))
    weights, _ = write(published, tmp_path)
    with pytest.raises(ConfigError, match="has two kernels a channel: bidirectional is not causal"):
        load(str(weights))


def test_an_activation_that_no_shape_says(tmp_path: Path) -> None:
    weights, config = write(long_conv(glu=False), tmp_path)
    config.unlink()
    with pytest.raises(ConfigError, match=r"output_linear.0.weight' has 6 rows, no GLU: give postact in --config"):
        load(str(weights))


@pytest.mark.parametrize(("name", "value"), [("mode", "pool"), ("use_lengths", True)])
@pytest.mark.parametrize("flat", [False, True])
def test_decoders_that_mix_positions(tmp_path: Path, name: str, value: Any, flat: bool) -> None:
    published = long_conv_sequence()
    published.options["decoder"] = {name: value}
    if flat:
        published.options |= published.options.pop("model")
    weights, config = write(published, tmp_path)
    with pytest.raises(ConfigError, match=f"the option {name} = {value!r} is not supported"):
        load(str(weights), config=config)
