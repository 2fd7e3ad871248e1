"""Safari checkpoints through `load`: what is found, what is assumed, and every message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load import load
from lhcompile.load.lm import AttentionConfig
from lhcompile.load.safari import HyenaLM

Make = Callable[..., HyenaLM]
Save = Callable[..., str]
Write = Callable[[str], Path]
State = dict[str, Tensor]
FREQ = "backbone.layers.0.mixer.filter_fn.implicit_filter.{}.freq"
IDS = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(2))


def same_logits(loaded: torch.nn.Module, model: HyenaLM) -> bool:
    """Equal but for rounding: torch picks other kernels when gradients are recorded."""
    return torch.allclose(loaded(IDS), model(IDS).detach(), rtol=0, atol=1e-5)


def test_everything_is_found_from_the_shapes(tiny: Make, saved: Save) -> None:
    model = tiny(order=3, num_inner_mlps=1, short_filter_order=4)
    loaded = load(saved(model.state_dict()))
    assert same_logits(loaded.module, model)
    assert loaded.family == "safari-hyena"
    assert loaded.context_length == 12
    assert loaded.parameters == sum(p.numel() for p in model.parameters())
    assert not loaded.module.training
    sizes = {"d_model": 6, "n_layer": 2, "d_inner": 10, "vocab_size": 16, "emb_dim": 5, "filter_order": 7}
    sizes |= {"order": 3, "num_inner_mlps": 1, "short_filter_order": 4, "l_max": 12}
    assert sizes.items() <= loaded.config.items()
    (told,) = loaded.notes
    assert told.startswith("assumed, as neither file says otherwise: layer_norm_epsilon 1e-05, w_mod 1.0, modulate")


def test_half_precision_loads_as_float32(state: State, saved: Save) -> None:
    loaded = load(saved({key: value.half() for key, value in state.items()}))
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    assert loaded.module(IDS).dtype == torch.float32


def test_safetensors(tiny: Make, tmp_path: Path) -> None:
    model = tiny()
    safetensors.torch.save_file({k: v.clone() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert same_logits(load(str(tmp_path / "model.safetensors")).module, model)


def test_lightning_wrapper(tiny: Make, saved: Save) -> None:
    model = tiny()
    state = {f"model.{k}": v for k, v in model.state_dict().items()} | {"loss.scale": torch.ones(1)}
    loaded = load(saved({"state_dict": state, "epoch": 3, "pytorch-lightning_version": "1.8"}, "last.ckpt"))
    assert same_logits(loaded.module, model)
    assert "used only 'state_dict' of the file, not epoch, pytorch-lightning_version" in loaded.notes
    assert "skipped keys outside 'model.': loss.scale" in loaded.notes


def test_head_may_be_absent_or_equal_or_untied(tiny: Make, saved: Save, config_file: Write) -> None:
    model = tiny()
    state = dict(model.state_dict())
    del state["lm_head.weight"]
    assert same_logits(load(saved(state)).module, model)
    state["lm_head.weight"] = model.lm_head.weight.detach() + 1
    with pytest.raises(CheckpointError, match=r"'lm_head.weight' differs from the embedding it is tied to; .*tie_word"):
        load(saved(state))
    untied = tiny(tie_word_embeddings=False)
    config = config_file("tie_word_embeddings: false")
    assert same_logits(load(saved(untied.state_dict()), config=config).module, untied)


def test_a_head_outside_the_prefix(tiny: Make, saved: Save, config_file: Write) -> None:
    model = tiny(tie_word_embeddings=False)
    state = {k if k == "lm_head.weight" else f"model.{k}": v for k, v in model.state_dict().items()}
    loaded = load(saved(state), config=config_file("tie_word_embeddings: false"))
    assert same_logits(loaded.module, model)
    assert not any("skipped" in note for note in loaded.notes)


def test_options_that_the_single_file_does_not_read(tiny: Make, saved: Save, config_file: Write) -> None:
    model = tiny(order=3, filter_layout="standalone")
    config = config_file("layer: {filter_layout: standalone, bias: false, normalized: true}")
    loaded = load(saved(model.state_dict()), config=config)
    assert same_logits(loaded.module, model)
    assert sum("does not read it" in note for note in loaded.notes) == 2


def test_a_filter_without_mlp(tiny: Make, saved: Save, config_file: Write) -> None:
    model = tiny(linear_mixer=True)
    loaded = load(saved(model.state_dict()), config=config_file("layer: {linear_mixer: true, filter_order: 16, w: 10}"))
    assert same_logits(loaded.module, model)
    with pytest.raises(ConfigError, match="the option linear_mixer is False, but "):
        load(saved(model.state_dict()), config=config_file("layer: {linear_mixer: false}"))


def test_one_surviving_freq_is_enough(tiny: Make, saved: Save) -> None:
    model = tiny()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith(("1.freq", "5.freq"))}
    assert same_logits(load(saved(state)).module, model)


def test_disagreeing_freqs(state: State, saved: Save) -> None:
    state[FREQ.format(3)] = state[FREQ.format(3)] + 1
    message = f"{FREQ.format(1)!r} and {FREQ.format(3)!r} are one tensor but differ"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(saved(state))


FIRST = "backbone.layers.0.mixer.filter_fn.implicit_filter.0.weight"
BROKEN: dict[str, tuple[str, Any, str]] = {
    "z": ("backbone.layers.1.mixer.filter_fn.pos_emb.z", None,
          "missing key '{key}' of shape [1, 12, 5]; it looked like safari-hyena"),
    "z0": ("backbone.layers.0.mixer.filter_fn.pos_emb.z", None, "missing key '{key}' of shape [1, l_max, emb_dim]"),
    "t": ("backbone.layers.0.mixer.filter_fn.pos_emb.t", None, "missing key '{key}' of shape [1, 12, 1]"),
    "deltas": ("backbone.layers.0.mixer.filter_fn.modulation.deltas", None, "missing key '{key}' of shape [1, 1, 6]"),
    "norm": ("backbone.ln_f.bias", None, "missing key '{key}' of shape [6]"),
    "extra": ("backbone.more", torch.ones(1), "unexpected key '{key}'; it looked like safari-hyena"),
    "shape": ("backbone.layers.1.mlp.fc2.weight", torch.ones(6, 9), "'{key}' has shape [6, 9], expected [6, 10]"),
    "rank": (FIRST, torch.ones(7), "'{key}' has shape [7], expected [filter_order, emb_dim]"),
    "nan": ("backbone.ln_f.weight", torch.full((6,), float("nan")), "'{key}' holds NaN or infinite values"),
    "inf": ("backbone.ln_f.weight", torch.full((6,), float("inf")), "'{key}' holds NaN or infinite values"),
    "complex": ("backbone.ln_f.weight", torch.ones(6) * 1j, "'{key}' is complex, expected torch.float32"),
    "short": ("backbone.layers.0.mixer.filter_fn.pos_emb.z", torch.ones(1, 1, 5), "holds a context length of 1"),
    "rows": ("backbone.layers.0.mixer.in_proj.weight", torch.ones(17, 6), "has 17 rows, expected (order + 1) * 6"),
    "gap": ("backbone.layers.7.norm1.weight", torch.ones(6), "the layers are numbered [0, 1, 7], with gaps"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(state: State, saved: Save, name: str) -> None:
    key, value, message = BROKEN[name]
    state.pop(key, None)
    if value is not None:
        state[key] = value
    with pytest.raises(CheckpointError, match=re.escape(message.format(key=key))) as caught:
        load(saved(state))
    assert "\n" not in str(caught.value)


def test_nan_in_a_tied_embedding(state: State, saved: Save) -> None:
    state["lm_head.weight"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"word_embeddings.weight' holds NaN"):
        load(saved(state))


CONFIGS: dict[str, tuple[str, str]] = {
    "d_model": ("d_model: 8", "the option d_model is 8, but 'backbone.embeddings.word_embeddings.weight' in"),
    "layers": ("model: {n_layer: 3}", "the option n_layer is 3, but 'backbone.layers.1' in the checkpoint makes it 2"),
    "l_max": ("model: {layer: {l_max: 24}}", "the option l_max is 24, but 'backbone.layers.0.mixer.filter_fn.pos"),
    "vocab": ("vocab_size: 17", "the option vocab_size is 17 (pad_vocab_size_multiple 1), but"),
    "vocab type": ("vocab_size: many", "the options vocab_size and pad_vocab_size_multiple must be positive integers"),
    "type": ("layer: {modulate: 3}", "the option modulate cannot be 3"),
    "number": ("layer: {shift: much}", "the option shift cannot be 'much'"),
    "activation": ("layer: {activation: glu}", "the option activation is 'glu', not one of id, "),
    "layout": ("filter_layout: other", "the option filter_layout is 'other', not one of full, standalone"),
    "unknown": ("layer: {modulat: true}", "unknown option 'modulat'"),
    "layer": ("layer: 3", "the option layer is no mapping"),
    "kind": ("layer: {_name_: s4}", "the option layer._name_ is 's4', but the keys are Hyena's"),
    "blocks": ("layer: {num_blocks: 2}", "the option num_blocks = 2 is not supported"),
    "heads": ("layer: {num_heads: 2}", "the option num_heads = 2 is not supported"),
    "outer": ("layer: {outer_mixing: 2}", "the option outer_mixing cannot be 2"),
    "ffn": ("layer: {post_order_ffn: true}", "the option post_order_ffn is True, but"),
    "positions": ("max_position_embeddings: 12", "the option max_position_embeddings is 12, but"),
    "attention": ("attn_layer_idx: [1]", "the option attn_layer_idx is [1], but"),
    "widened": ("layer: {inner_factor: 2}", "the option inner_factor = 2 is not supported"),
    "both ways": ("layer: {bidirectional: true}", "the option bidirectional = True is not supported"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_cannot_be(state: State, saved: Save, config_file: Write, name: str) -> None:
    text, message = CONFIGS[name]
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(saved(state), config=config_file(text))


def test_positions_scales_and_attention_are_seen_in_the_keys(tiny: Make, saved: Save, config_file: Write) -> None:
    """Such a model has none of them left to be told, but the number of heads."""
    attention = AttentionConfig(num_heads=3, rotary_emb_dim=2)
    options = {"max_position_embeddings": 10, "post_order_ffn": True, "attn_layer_idx": (1,), "attention": attention}
    model = tiny(**options)
    path = saved(model.state_dict())
    config = config_file("attn_cfg: {num_heads: 3, rotary_emb_dim: 2}")
    loaded = load(path, config=config)
    config.unlink()
    assert same_logits(loaded.module, model)
    assert loaded.context_length == 10
    message = "layer 1 is attention: no shape says its number of heads; give attn_cfg: {num_heads: …} in --config"
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(path)


def test_heads_are_seen_in_the_shapes(state: State, saved: Save) -> None:
    state["backbone.layers.0.mixer.filter_fn.implicit_filter.6.weight"] = torch.ones(3, 7)
    with pytest.raises(ConfigError, match="the option num_heads > 1 is not supported"):
        load(saved(state))


EXPERIMENT = """
dataset: {max_length: 12}
optimizer: {lr: 0.001}
model:
  _name_: lm
  d_model: 6
  d_inner: ${eval:${.d_model} + 4}
  n_layer: 2
  vocab_size: 13
  pad_vocab_size_multiple: 8
  layer_norm_epsilon: 1e-2
  layer:
    _name_: hyena
    l_max: ${dataset.max_length}
    emb_dim: ${nowhere.to.be.found}
    local_order: 3
    modulate: False
    bias: false
    w: 14
    lr: ${optimizer.lr}
"""


def test_an_experiment_file(tiny: Make, saved: Save, config_file: Write) -> None:
    model = tiny(modulate=False, use_bias=False, layer_norm_epsilon=1e-2)
    loaded = load(saved(model.state_dict()), config=config_file(EXPERIMENT))
    assert same_logits(loaded.module, model)
    assert (loaded.config["vocab_size"], loaded.config["vocab_size_padded"]) == (13, 16)
    assert "ignored interpolations: emb_dim" in loaded.notes
    assert any(note.startswith("ignored local_order") for note in loaded.notes)


def test_an_experiment_file_that_disagrees_by_arithmetic(state: State, saved: Save, config_file: Write) -> None:
    with pytest.raises(ConfigError, match="the option d_inner is 12, but"):
        load(saved(state), config=config_file("model: {d_model: 6, d_inner: '${eval:2*${.d_model}}'}"))


def test_json_and_model_config(tiny: Make, saved: Save, config_file: Write) -> None:
    model = tiny(order=3, filter_layout="standalone")
    config = config_file(json.dumps({"model_config": {"d_model": 6, "layer": {"filter_layout": "standalone"}}}))
    assert same_logits(load(saved(model.state_dict()), config=config).module, model)
    config.unlink()
    assert not same_logits(load(saved(model.state_dict())).module, model)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "not valid YAML or JSON at line"), ("3", "no mapping of options"), (None, "cannot be read")],
)
def test_unreadable_configurations(
    state: State, saved: Save, config_file: Write, tmp_path: Path, text: str | None, message: str
) -> None:
    config = config_file(text) if text else tmp_path / "none.yaml"
    with pytest.raises(ConfigError, match=message):
        load(saved(state), config=config)


def test_context(state: State, saved: Save) -> None:
    assert load(saved(state), context=8).context_length == 8
    with pytest.raises(ConfigError, match="context 13 is not between 2 and the checkpoint's l_max 12"):
        load(saved(state), context=13)
    with pytest.raises(ConfigError, match="context 1: a sequence of at least 2 is needed"):
        load(saved(state), context=1)


def test_another_family(saved: Save) -> None:
    with pytest.raises(CheckpointError, match=r"the keys \('a', …\) are of no known family; give package.module:fac"):
        load(saved({"a": torch.ones(1)}))
