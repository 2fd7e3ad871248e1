"""HyenaDNA checkpoints against the Hyena equations: both forms, what is read, what must not be, and every message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from lm_checkpoints import Published, hyenadna, write
from lm_reference import HyenaReference, gap

from lhcompile.artifacts import LoadedModel
from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load import lm, load, safari, safari_checkpoint

LENGTH = 40
TOLERANCE = 1e-4  # float32 against float64, in units of the logits' spread
HEAD, EMBEDDING = "lm_head.weight", "hyena.backbone.embeddings.word_embeddings.weight"
FREQ = "hyena.backbone.layers.{}.mixer.filter_fn.implicit_filter.{}.freq"


def folder(published: Published, place: Path) -> str:
    """The form of Hugging Face."""
    place.mkdir(exist_ok=True)
    safetensors.torch.save_file({k: v.contiguous() for k, v in published.state.items()}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(published.options))
    return str(place)


def lightning(published: Published, place: Path) -> tuple[str, Path]:
    """The form of Lightning: the weights and the experiment's configuration."""
    place.mkdir(exist_ok=True)
    content = {"state_dict": published.state, "epoch": 3, "pytorch-lightning_version": "1.8.6", "hyper_parameters": {}}
    torch.save(content, place / "weights.ckpt")
    (place / "experiment.json").write_text(json.dumps({"model": published.options}))
    return str(place / "weights.ckpt"), place / "experiment.json"


def loaded_as(form: str, published: Published, place: Path) -> LoadedModel:
    if form == "hugging face":
        return load(folder(published, place))
    weights, config = lightning(published, place)
    return load(weights, config=config)


@pytest.mark.parametrize("form", ["hugging face", "lightning"])
def test_logits_are_those_of_the_equations(tmp_path: Path, form: str) -> None:
    published = hyenadna(form)
    loaded = loaded_as(form, published, tmp_path)
    assert gap(loaded.module, HyenaReference(published.plain, shift=0.05), LENGTH) < TOLERANCE
    assert (loaded.family, loaded.context_length) == ("hyenadna", LENGTH)
    assert (loaded.config["vocab_size"], loaded.config["vocab_size_padded"]) == (12, 16)
    assert loaded.config["tie_word_embeddings"] == (form == "lightning")
    notes = " | ".join(loaded.notes)
    assert "shift 0.05" in notes
    assert "tokens are characters: [CLS] 0, [SEP] 1, [BOS] 2, [MASK] 3, [PAD] 4, [RESERVED] 5, [UNK] 6, A 7, " in notes
    assert loaded.parameters == sum(parameter.numel() for parameter in loaded.module.parameters())


def test_lightning_without_a_configuration(tmp_path: Path) -> None:
    """Shapes say all but the shift and the modulation, which are the published ones."""
    published = hyenadna("lightning")
    weights, _ = lightning(published, tmp_path)
    assert gap(load(weights).module, HyenaReference(published.plain, shift=0.05), LENGTH) < TOLERANCE


@pytest.mark.parametrize("length", [40, 1026])
def test_plain_keys_are_hyenadnas_at_its_published_lengths(tmp_path: Path, length: int) -> None:
    """Lightning's files without checkpointed layers have safari's own keys."""
    published = hyenadna("lightning", l_max=length)
    torch.save({f"model.{key}": value for key, value in published.plain.items()}, tmp_path / "weights.ckpt")
    loaded = load(str(tmp_path / "weights.ckpt"))
    assert loaded.family == ("hyenadna" if length == 1026 else "safari-hyena")
    shift = 0.05 if length == 1026 else 0.0
    assert gap(loaded.module, HyenaReference(published.plain, shift=shift), LENGTH) < TOLERANCE


@pytest.mark.parametrize("form", ["hugging face", "lightning"])
def test_options_that_the_released_module_does_not_read(tmp_path: Path, form: str) -> None:
    published = hyenadna(form)
    published.options |= {"use_bias" if form == "hugging face" else "bias": False, "normalized": True}
    loaded = loaded_as(form, published, tmp_path)
    assert gap(loaded.module, HyenaReference(published.plain, shift=0.05), LENGTH) < TOLERANCE
    for name in ("use_bias", "normalized"):
        assert f"ignored {name}: the published module in a single file does not read it" in loaded.notes


class HubReference(HyenaReference):
    """Of which layer_norm_epsilon is the last norm's alone."""

    def norm(self, x: Any, key: str) -> Any:
        given = self.options["layer_norm_epsilon"]
        self.options["layer_norm_epsilon"] = given if key.endswith("ln_f") else 1e-5
        try:
            return super().norm(x, key)
        finally:
            self.options["layer_norm_epsilon"] = given


def test_epsilon_is_the_last_norms_in_the_form_of_hugging_face(tmp_path: Path) -> None:
    published = hyenadna()
    published.options["layer_norm_epsilon"] = 0.1
    reference = HubReference(published.plain, shift=0.05, layer_norm_epsilon=0.1)
    assert gap(load(folder(published, tmp_path)).module, reference, LENGTH) < TOLERANCE


@pytest.mark.parametrize("options", [{}, {"normalized": True}, {"bias": False}], ids=str)
def test_the_training_codes_module(tmp_path: Path, options: dict[str, Any]) -> None:
    """Its configurations name it; its decay has no floor, and it reads what the released one does not."""
    published = hyenadna("lightning")
    published.options |= {"_name_": "lm", "layer": published.options["layer"] | options}
    weights, config = lightning(published, tmp_path)
    loaded = load(weights, config=config)
    meant = {"use_bias": options.get("bias", True), "normalized": options.get("normalized", False)}
    assert gap(loaded.module, HyenaReference(published.plain, shift=0.0, **meant), LENGTH) < TOLERANCE
    assert (loaded.family, loaded.config["filter_layout"]) == ("hyenadna", "full")
    assert "read as the training code's module, as _name_ says; the released one has shift 0.05" in loaded.notes


@pytest.mark.parametrize("options", [{"vocab_size": 12}, {"model_type": "hyenadna"}, {"return_hidden_state": True}, {}])
def test_plain_keys_are_hyenadnas_where_the_options_are(tmp_path: Path, options: dict[str, Any]) -> None:
    published = hyenadna("lightning")
    told = {"d_model": 6, "pad_vocab_size_multiple": 8, "tie_word_embeddings": True} | options
    weights, config = write(replace(published, state=published.plain, options=told), tmp_path)
    loaded = load(str(weights), config=config)
    assert loaded.family == ("hyenadna" if options else "safari-hyena")
    assert gap(loaded.module, HyenaReference(published.plain, shift=0.05 if options else 0.0), LENGTH) < TOLERANCE


def test_positions_may_be_trained_or_not(tmp_path: Path) -> None:
    """z and t are read as they stand in the file, for the filter at each lag is what was trained."""
    published = hyenadna()
    state = {k: (v + 0.1 if k.endswith("pos_emb.z") else v) for k, v in published.state.items()}
    plain = {k: (v + 0.1 if k.endswith("pos_emb.z") else v) for k, v in published.plain.items()}
    loaded = load(folder(Published(state, published.options, plain), tmp_path))
    assert gap(loaded.module, HyenaReference(plain, shift=0.05), LENGTH) < TOLERANCE


@pytest.mark.parametrize("form", ["hugging face", "lightning"])
def test_a_missing_head(tmp_path: Path, form: str) -> None:
    """Refused, unless the options say that it is the embedding."""
    published = hyenadna(form)
    published.state.pop(HEAD, published.state.pop(f"model.{HEAD}", None))
    with pytest.raises(CheckpointError, match=rf"missing key '{HEAD}' of shape \[16, 6\] \(if it is the embedding,"):
        loaded_as(form, published, tmp_path)
    published.options["tie_word_embeddings"] = True
    loaded = loaded_as(form, published, tmp_path)
    plain = {**published.plain, HEAD: published.plain["backbone.embeddings.word_embeddings.weight"]}
    assert gap(loaded.module, HyenaReference(plain, shift=0.05), LENGTH) < TOLERANCE


# ---- readings of the format that are wrong: none may pass for the right one ----------------------------------------

Mutate = Callable[[Published, pytest.MonkeyPatch], None]


def frequencies_left(_: Published, patch: pytest.MonkeyPatch) -> None:
    """The keys that are not in the file keep their start."""

    def unmerged(reading: Any, inner: int) -> Any:
        for key in [key for key in reading.tensors if key.endswith(".freq")]:
            for i in range(inner + 1):
                start = torch.full_like(reading.tensors[key], 10.0)
                reading.tensors.setdefault(f"{key.rsplit('.', 2)[0]}.{2 * i + 1}.freq", start)
        return reading

    patch.setattr(safari_checkpoint, "with_shared_freq", unmerged)


def freq_of_another_layer(_: Published, patch: pytest.MonkeyPatch) -> None:
    right = safari_checkpoint.with_shared_freq

    def rolled(reading: Any, inner: int) -> Any:
        reading = right(reading, inner)
        old = dict(reading.tensors)
        for key in old:
            if key.endswith(".freq"):
                layer = int(key.split(".")[2])
                reading.tensors[key] = old[key.replace(f"layers.{layer}.", f"layers.{(layer + 1) % 3}.")]
        return reading

    patch.setattr(safari_checkpoint, "with_shared_freq", rolled)


def exact_gelu(_: Published, patch: pytest.MonkeyPatch) -> None:
    right = F.gelu
    patch.setattr(lm.F, "gelu", lambda x, approximate: right(x))


def regenerated(_: Published, patch: pytest.MonkeyPatch) -> None:
    """Position tables made anew, as safari makes them, in place of the file's."""

    def made(self: safari.PositionalEmbedding, length: int) -> Any:
        fresh = safari.PositionalEmbedding(self.z.shape[2], self.z.shape[1])
        return fresh.z[:, :length], fresh.t[:, :length]

    patch.setattr(safari.PositionalEmbedding, "forward", made)


def every(published: Published, end: str, change: Any) -> None:
    published.state |= {key: change(value) for key, value in published.state.items() if key.endswith(end)}


MUTANTS: dict[str, Mutate] = {
    "shift 0": lambda p, m: p.options.update(shift=0.0),
    "not modulated": lambda p, m: p.options.update(modulate=False),
    "eps": lambda p, m: p.options.update(layer_norm_epsilon=1e-1),
    "frequencies not merged": frequencies_left,
    "frequencies of the next layer": freq_of_another_layer,
    "exact gelu": exact_gelu,
    "positions made anew": regenerated,
    "short filter reversed": lambda p, m: every(p, "short_filter.weight", lambda w: w.flip(-1)),
    "gate for value": lambda p, m: [every(p, f"mixer.{end}", lambda w: torch.cat(w.chunk(3)[::-1]))
                                    for end in ("in_proj.weight", "in_proj.bias", "short_filter.weight",
                                                "short_filter.bias")] and None,
    "tied head": lambda p, m: p.state.update({HEAD: p.state[EMBEDDING].clone()}),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_reading_moves_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    truth, published = hyenadna(), hyenadna()
    MUTANTS[name](published, monkeypatch)
    loaded = load(folder(published, tmp_path))
    assert gap(loaded.module, HyenaReference(truth.plain, shift=0.05), LENGTH) > 3 * TOLERANCE


# ---- messages ------------------------------------------------------------------------------------------------------


def test_frequencies_that_differ(tmp_path: Path) -> None:
    published = hyenadna()
    published.state[FREQ.format(0, 3)] = published.state[FREQ.format(0, 1)] + 1
    plain = FREQ.removeprefix("hyena.")
    message = f"{plain.format(0, 1)!r} and {plain.format(0, 3)!r} are one tensor but differ"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(folder(published, tmp_path))


def test_a_layer_without_a_frequency(tmp_path: Path) -> None:
    published = hyenadna()
    del published.state[FREQ.format(1, 3)]
    message = f"missing key {FREQ.removeprefix('hyena.').format(1, 1)!r} of shape [1, 8] and 2 more; it looked like hy"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(folder(published, tmp_path))


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"max_seq_len": 50}, "config.json: the option l_max is 50, but 'backbone.layers.0.mixer.filter_fn.pos"),
    "order": ({"hyena_order": 3}, "the option order is 3, but 'backbone.layers.0.mixer.in_proj.weight' in the"),
    "tied": ({"tie_word_embeddings": True}, "'lm_head.weight' differs from the embedding it is tied to"),
    "vocab": ({"vocab_size": 5}, "the option vocab_size is 5 (pad_vocab_size_multiple 8), but"),
    "unknown": ({"shifts": 0.1}, "unknown option 'shifts'; is 'shift' meant?"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_cannot_be(tmp_path: Path, name: str) -> None:
    changed, message = CONFIGS[name]
    published = hyenadna()
    published.options |= changed
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(message)) as caught:
        load(folder(published, tmp_path))
    assert "\n" not in str(caught.value)


def test_short_filters_the_published_module_does_not_run_causally(tmp_path: Path) -> None:
    published = hyenadna()
    every(published, "short_filter.weight", lambda w: torch.cat([w, w[..., :1]], -1))
    published.options["short_filter_order"] = 4
    with pytest.raises(ConfigError, match=r"short_filter.weight' has 4 taps; the published module is causal with 3"):
        load(folder(published, tmp_path))


def test_the_context(tmp_path: Path) -> None:
    weights, config = write(hyenadna("lightning"), tmp_path)
    assert load(str(weights), config=config, context=20).context_length == 20
    with pytest.raises(ConfigError, match="context 41 is not between 2 and the checkpoint's l_max 40"):
        load(str(weights), config=config, context=41)


@pytest.mark.parametrize("form", ["hugging face", "lightning"])
def test_a_frequency_that_was_not_trained_stands_in_the_options(tmp_path: Path, form: str) -> None:
    published = hyenadna(form)
    fixed = {key: 3.0 * torch.ones_like(value) if key.endswith(".freq") else value
             for key, value in published.state.items()}  # fmt: skip
    kept = loaded_as(form, replace(published, state=fixed), tmp_path / "kept").module
    state = {key: value for key, value in published.state.items() if not key.endswith(".freq")}
    options = json.loads(json.dumps(published.options))
    inner = options.get("layer", options)
    inner |= {"train_freq": False, "activation_freq" if form == "hugging face" else "w": 3}
    left_out = replace(published, state=state, options=options)
    ids = torch.arange(2 * LENGTH).reshape(2, LENGTH) % 12
    torch.testing.assert_close(loaded_as(form, left_out, tmp_path / "left").module(ids), kept(ids), rtol=0, atol=0)
    for name in ("activation_freq", "w"):
        inner.pop(name, None)
    with pytest.raises(ConfigError, match="train_freq is false, so that no key holds the frequency: give it as w"):
        loaded_as(form, left_out, tmp_path / "unsaid")
