"""StripedHyena and Evo-1 checkpoints against their equations: what is read, what must not be, and every message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from striped_checkpoints import Published, published, write
from striped_reference import TOLERANCE, difference
from torch import Tensor

from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load import load, striped, striped_checkpoint, transformer

Change = Callable[[dict[str, Any]], None]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sh-7b": ("sh-7b", {}),
    "evo-1": ("evo-1", {}),
    "channels in thirds": ("sh-7b", {"column_split_hyena": False}),
    "eps outside": ("sh-7b", {"use_flash_rmsnorm": False}),
    "eps inside": ("evo-1", {"use_flash_rmsnorm": True}),
    "positions as they are": ("evo-1", {"use_interpolated_rotary_pos_emb": False}),
    "attention first": ("sh-7b", {"attn_layer_idxs": [0, 2], "hyena_layer_idxs": [1]}),
    "no attention": ("evo-1", {"attn_layer_idxs": [], "hyena_layer_idxs": [0, 1, 2]}),
    "other short filters": ("evo-1", {"short_filter_length": 4, "short_filter_bias": False}),
    "one key for all heads": ("sh-7b", {"proj_groups": 8, "qkv_proj_bias": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_equations(tmp_path: Path, variant: str) -> None:
    name, changed = VARIANTS[variant]
    model = published(name, **changed)
    weights, config = write(model, tmp_path)
    loaded = load(str(weights), config=config)
    assert difference(loaded.module, model) < TOLERANCE
    assert loaded.family == "stripedhyena"
    assert loaded.parameters == sum(v.numel() for k, v in model.state.items() if not k.endswith("inv_freq"))
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())
    assert not loaded.module.training


def test_what_is_found_and_what_is_assumed(tmp_path: Path) -> None:
    weights, config = write(published("evo-1"), tmp_path)
    loaded = load(str(weights), config=config)
    found = {"hidden_size": 32, "vocab_size": 32, "state_size": 8, "inner_mlp_size": 96, "tie_embeddings": True}
    found |= {"layers": ["modal", "attention", "modal"], "short_filter_length": 3, "proj_groups": 1}
    assert found.items() <= loaded.config.items()
    told = "assumed, as neither file says otherwise: max_seqlen 8192, rotary_emb_base 10000.0, column_split_hyena True"
    assert loaded.notes == (told,)


def test_the_form_of_hugging_face(tmp_path: Path) -> None:
    """Keys under `backbone.`, no unembedding, options in config.json, where column_split means nothing."""
    model = published("evo-1")
    options = model.options | {"inner_mlp_size": 96, "column_split": False, "column_split_hyena": True}
    options |= {"model_type": "stripedhyena", "torch_dtype": "bfloat16", "auto_map": {}, "max_seqlen": 300}
    (tmp_path / "config.json").write_text(json.dumps(options))
    state = {f"backbone.{key}": value.contiguous() for key, value in model.state.items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    loaded = load(str(tmp_path))
    assert difference(loaded.module, model) < TOLERANCE
    assert loaded.context_length == 300


def test_context(tmp_path: Path) -> None:
    """That of the options, unless another is asked for; the tables of positions are as long."""
    model = published("sh-7b")
    weights, config = write(model, tmp_path)
    assert load(str(weights), config=config).context_length == 256
    loaded = load(str(weights), config=config, context=150)
    assert loaded.context_length == 150
    assert loaded.module.rotary.cos.shape == (150, 2)  # type: ignore[union-attr]
    assert difference(loaded.module, model) < TOLERANCE
    with pytest.raises(RuntimeError, match="longer than the context 150"):
        loaded.module(torch.zeros(1, 151, dtype=torch.int64))


def test_long_contexts_must_be_asked_for(tmp_path: Path) -> None:
    """Keys and values of a million positions would not fit; convolutions have no such limit."""
    model = published("sh-7b", max_seqlen=9000)
    weights, config = write(model, tmp_path)
    loaded = load(str(weights), config=config)
    assert loaded.context_length == 8192
    told = "keys and values are made for 8192 of the max_seqlen 9000; --context N for more"
    assert told in loaded.notes
    assert load(str(weights), config=config, context=9000).context_length == 9000
    weights, config = write(published("sh-7b", max_seqlen=9000, attn_layer_idxs=[]), tmp_path)
    alone = load(str(weights), config=config)
    assert (alone.context_length, told in alone.notes) == (9000, False)


def test_rotary_frequencies_of_another_base(tmp_path: Path) -> None:
    """The options' are used, and the file's told; as they were stored in half precision, they agree."""
    model = published("sh-7b")
    weights, config = write(model, tmp_path)
    assert not any("frequencies" in note for note in load(str(weights), config=config).notes)
    key = "blocks.1.inner_mha_cls.rotary_emb.inv_freq"
    write(Published(model.state | {key: model.state[key] / 2}, model.options), tmp_path)
    loaded = load(str(weights), config=config)
    assert difference(loaded.module, model) < TOLERANCE
    told = f"'{key}' holds other frequencies than those of rotary_emb_base 500000, which are used"
    assert told in loaded.notes


@pytest.mark.parametrize(("width", "groups"), [(32, 32), (64, 8)])
def test_one_system_for_several_channels(tmp_path: Path, width: int, groups: int) -> None:
    """One for all, or each of eight for eight channels in a row."""
    model = published("evo-1", hidden_size=width, num_filters=width)
    shared = dict(model.state)
    for key, value in model.state.items():
        if key.endswith((".poles", ".residues")):
            shared[key] = value[: width // groups].clone()
            model.state[key] = shared[key].repeat_interleave(groups, dim=0)
    weights, config = write(Published(shared, model.options | {"hyena_filter_groups": groups}), tmp_path)
    loaded = load(str(weights), config=config)
    assert difference(loaded.module, model) < TOLERANCE
    shared["blocks.0.filter.poles"] = shared["blocks.0.filter.poles"][:1].expand(3, -1, -1, -1).clone()
    write(Published(shared, model.options), tmp_path)
    with pytest.raises(CheckpointError, match=r"'blocks.0.filter.poles' has shape \[3, 8, 1, 2\], expected"):
        load(str(weights), config=config)


def test_a_tied_file_may_hold_the_embedding_twice(tmp_path: Path) -> None:
    model = published("evo-1")
    twice = model.state | {"unembed.weight": model.state["embedding_layer.weight"].clone()}
    weights, config = write(Published(twice, model.options), tmp_path)
    assert difference(load(str(weights), config=config).module, model) < TOLERANCE
    twice["unembed.weight"] += 1
    write(Published(twice, model.options), tmp_path)
    with pytest.raises(CheckpointError, match=r"'unembed.weight' differs from 'embedding_layer.weight', .*tie_embedd"):
        load(str(weights), config=config)


# ---- readings that the comparison must tell from the right one -----------------------------------------------------

MISREAD_OPTIONS = {
    "channels in thirds": ("sh-7b", {"column_split_hyena": False}),
    "eps outside": ("sh-7b", {"use_flash_rmsnorm": False}),
    "eps inside": ("evo-1", {"use_flash_rmsnorm": True}),
    "another eps": ("evo-1", {"eps": 0.011}),
    "rotary base": ("sh-7b", {"rotary_emb_base": 10000}),
    "rotary base of another": ("evo-1", {"rotary_emb_base": 500000}),
    "positions not scaled": ("evo-1", {"use_interpolated_rotary_pos_emb": False}),
    "positions scaled": ("sh-7b", {"use_interpolated_rotary_pos_emb": True, "rotary_emb_scaling_factor": 16}),
    "GELU": ("sh-7b", {"mlp_activation": "gelu"}),
    "SiLU": ("evo-1", {"mlp_activation": "silu"}),
    "heads": ("sh-7b", {"num_attention_heads": 4}),
}


@pytest.mark.parametrize("mutant", MISREAD_OPTIONS)
def test_misread_options_are_heard(tmp_path: Path, mutant: str) -> None:
    name, changed = MISREAD_OPTIONS[mutant]
    model = published(name)
    weights, config = write(Published(model.state, model.options | changed), tmp_path)
    assert difference(load(str(weights), config=config).module, model) > TOLERANCE


def exchange(one: str, other: str) -> Change:
    def change(state: dict[str, Any]) -> None:
        state[one], state[other] = state[other], state[one]

    return change


def become(key: str, f: Callable[[Tensor], Tensor]) -> Change:
    def change(state: dict[str, Any]) -> None:
        state[key] = f(state[key])

    return change


WQKV = "blocks.1.inner_mha_cls.Wqkv.weight"
MISREAD_WEIGHTS: dict[str, Change] = {
    "MLP branches": exchange("blocks.0.mlp.l1.weight", "blocks.0.mlp.l2.weight"),
    "norms": exchange("blocks.2.pre_norm.scale", "blocks.2.post_norm.scale"),
    "real for imaginary": become("blocks.0.filter.residues", lambda x: x.flip(-1)),
    "conjugate poles": become("blocks.0.filter.poles", lambda x: x * torch.tensor([1, -1])),
    "no D": become("blocks.2.filter.D", torch.zeros_like),
    "no bias of the short filter": become("blocks.0.filter.short_filter_bias", torch.zeros_like),
    "short filter reversed": become("blocks.0.filter.short_filter_weight", lambda x: x.flip(-1)),
    "keys and values by head": become(
        WQKV, lambda x: torch.cat([x[:32], x[32:].reshape(2, 2, 4, 32).transpose(0, 1).reshape(16, 32)])
    ),
    "keys for values": become(WQKV, lambda x: torch.cat([x[:32], x[40:], x[32:40]])),
    "tied": lambda state: state.update({"unembed.weight": state["embedding_layer.weight"]}),
}


@pytest.mark.parametrize("mutant", MISREAD_WEIGHTS)
def test_misread_weights_are_heard(tmp_path: Path, mutant: str) -> None:
    model = published("sh-7b")
    state = dict(model.state)
    MISREAD_WEIGHTS[mutant](state)
    weights, config = write(Published(state, model.options), tmp_path)
    assert difference(load(str(weights), config=config).module, model) > TOLERANCE


def factor_two(monkeypatch: pytest.MonkeyPatch) -> None:
    right = striped.complex_modes
    monkeypatch.setattr(striped, "complex_modes", lambda u, p, r, d: right(u, p, 2 * r, d))


def gates_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    right = striped_checkpoint.head_blocks

    def wrong(rows: Tensor, heads: int) -> Tensor:
        x2, x1, v = right(rows, heads).chunk(3)
        return torch.cat([x1, x2, v])

    monkeypatch.setattr(striped_checkpoint, "head_blocks", wrong)


def rotary_interleaved(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b, cos, sin = x[..., 0::2], x[..., 1::2], cos.unsqueeze(1), sin.unsqueeze(1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)

    monkeypatch.setattr(transformer, "rotate", wrong)


def rotary_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the queries only; turning both the other way is the same to the scores."""
    right, calls = transformer.rotate, iter(range(1000))
    monkeypatch.setattr(transformer, "rotate", lambda x, cos, sin: right(x, cos, -sin if next(calls) % 2 else sin))


def keys_by_remainder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Query head h reads kv head h % kv_heads."""
    right = F.scaled_dot_product_attention

    def wrong(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, enable_gqa: bool) -> Tensor:
        assert enable_gqa
        times = q.shape[1] // k.shape[1]
        return right(q, k.repeat(1, times, 1, 1), v.repeat(1, times, 1, 1), is_causal=is_causal)

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)


def attention_looks_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, k, v, is_causal, enable_gqa: right(q, k, v, enable_gqa=enable_gqa)
    )


def gelu_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transformer.ACTIVATIONS, "gelu", lambda x: F.gelu(x, approximate="tanh"))


MISTAKES = {
    "factor two": ("sh-7b", factor_two),
    "factor two of eight": ("evo-1", factor_two),
    "gates exchanged": ("sh-7b", gates_exchanged),
    "rotary interleaved": ("evo-1", rotary_interleaved),
    "rotary backwards": ("evo-1", rotary_backwards),
    "keys by remainder": ("sh-7b", keys_by_remainder),
    "attention looks ahead": ("evo-1", attention_looks_ahead),
    "GELU of tanh": ("evo-1", gelu_tanh),
}


@pytest.mark.parametrize("mutant", MISTAKES)
def test_mistakes_are_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    name, make = MISTAKES[mutant]
    model = published(name)
    make(monkeypatch)
    weights, config = write(model, tmp_path)
    assert difference(load(str(weights), config=config).module, model) > TOLERANCE


# ---- what is refused -----------------------------------------------------------------------------------------------

POLES = "blocks.2.filter.poles"
BROKEN: dict[str, tuple[str, Any, str]] = {
    "poles": (POLES, None, "missing key '{key}' of shape [32, 2, 1, 2]; it looked like stripedhyena"),
    "residues": ("blocks.0.filter.residues", None, "missing key '{key}' of shape [32, 2, 1, 2]"),
    "embedding": ("embedding_layer.weight", None, "missing key '{key}' of shape [vocab_size, hidden_size]; it looked"),
    "MLP": ("blocks.0.mlp.l1.weight", None, "missing key '{key}' of shape [inner_mlp_size, hidden_size]"),
    "head": ("unembed.weight", None, "missing key '{key}' of shape [40, 32]"),
    "bias": ("blocks.0.filter.short_filter_bias", None, "missing key '{key}' of shape [96]"),
    "queries": (WQKV, None, "missing key '{key}' of shape [48, 32]"),
    "extra": ("blocks.0.filter.h_0", torch.ones(1), "unexpected key '{key}'; it looked like stripedhyena"),
    "states": (POLES, torch.zeros(32, 3, 1, 2), "'{key}' has shape [32, 3, 1, 2], expected [32, 2, 1, 2]; it looked"),
    "rank": ("blocks.0.filter.poles", torch.zeros(32, 2, 2), "has shape [32, 2, 2], expected [hidden_size, state_size"),
    "rows": (WQKV, torch.zeros(70, 32), "'{key}' has 70 rows, expected 32 + 2 * 32 / proj_groups; it looked like"),
    "kv rows": (WQKV, torch.zeros(96, 32), "the option proj_groups is 4, but '{key}' in the checkpoint makes it 1"),
    "gap": ("blocks.5.pre_norm.scale", torch.ones(32), "the blocks are numbered [0, 1, 2, 5], with gaps"),
    "nan": ("norm.scale", torch.full((32,), float("nan")), "'{key}' holds NaN or infinite values"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(tmp_path: Path, name: str) -> None:
    key, value, message = BROKEN[name]
    model = published("sh-7b")
    state = {k: v for k, v in model.state.items() if k != key} | ({} if value is None else {key: value})
    weights, config = write(Published(state, model.options), tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(message.format(key=key))) as caught:
        load(str(weights), config=config)
    assert "\n" not in str(caught.value)


def test_poles_on_the_circle_are_refused(tmp_path: Path) -> None:
    model = published("sh-7b")
    model.state[POLES][7, 1, 0] = torch.tensor([0.6, -0.8])
    weights, config = write(model, tmp_path)
    with pytest.raises(CheckpointError, match=rf"'{POLES}' has a pole of modulus 1 in channel 7; with 1 and more"):
        load(str(weights), config=config)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "list": ({"attn_layer_idxs": [0, 1]}, "the option attn_layer_idxs lists layer 0, but 'blocks.0.filter.poles' in the"
                                          " checkpoint makes it modal"),
    "no list": ({"hyena_layer_idxs": 3}, "the option hyena_layer_idxs is 3, not a list of layers"),
    "width": ({"hidden_size": 64}, "the option hidden_size is 64, but 'embedding_layer.weight' in the checkpoint"),
    "layers": ({"num_layers": 32}, "the option num_layers is 32, but 'blocks.2' in the checkpoint makes it 3"),
    "inner": ({"inner_mlp_size": None}, "the option inner_mlp_size is null, which with inner_size_multiple_of 64 is "
                                        "128, but 'blocks.0.mlp.l1.weight' in the checkpoint makes it 56"),
    "multiple": ({"inner_mlp_size": None, "inner_size_multiple_of": 0}, "inner_size_multiple_of cannot be 0"),
    "heads": ({"num_attention_heads": 6}, "the option num_attention_heads is 6, which does not cut hidden_size 32"),
    "odd heads": ({"num_attention_heads": 32}, "the option num_attention_heads is 32, which does not cut"),
    "groups": ({"num_attention_heads": 2}, "in groups of proj_groups 4"),
    "base": ({"rotary_emb_base": 0}, "the option rotary_emb_base is 0.0, not above 0"),
    "seqlen": ({"max_seqlen": 1}, "the option max_seqlen is 1, less than 2"),
    "activation": ({"mlp_activation": "relu"}, "the option mlp_activation is 'relu', not one of silu, gelu"),
    "final norm": ({"final_norm": False}, "the option final_norm = False is not supported"),
    "smeared": ({"smeared_gqa": True}, "the option smeared_gqa = True is not supported"),
    "filter groups": ({"hyena_filter_groups": 8}, "the option hyena_filter_groups is 8, but 'blocks.0.filter."),
    "of Evo 2": ({"interleave": True}, "the option interleave = True is not supported"),
    "misspelled": ({"mlp_activations": "gelu"}, "unknown option 'mlp_activations'; is 'mlp_activation' meant?"),
    "short bias": ({"short_filter_bias": False}, "unexpected key 'blocks.0.filter.short_filter_bias' and 1 more"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options(tmp_path: Path, name: str) -> None:
    changed, message = REFUSED[name]
    model = published("sh-7b")
    weights, config = write(Published(model.state, model.options | changed), tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(message)) as caught:
        load(str(weights), config=config)
    assert "\n" not in str(caught.value)


def test_the_number_of_heads_must_be_given(tmp_path: Path) -> None:
    weights, config = write(published("sh-7b"), tmp_path)
    config.unlink()
    with pytest.raises(ConfigError, match="the option num_attention_heads must be given in --config"):
        load(str(weights))
