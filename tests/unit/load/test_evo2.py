"""Evo 2 checkpoints against their equations: what is read, what must not be, and every message."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from striped_checkpoints import Published, published, write
from striped_reference import TOLERANCE, difference
from torch import Tensor

from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load import load, striped, transformer

Change = Callable[[dict[str, Any]], None]

VARIANTS: dict[str, dict[str, Any]] = {
    "7b": {},
    "head by head": {"column_split_hyena": True, "interleave": False},
    "both": {"column_split_hyena": True, "interleave": True},
    "in thirds": {"column_split_hyena": False, "interleave": False},
    "gates exchanged": {"hyena_flip_x1x2": True},
    "queries first": {"column_split": False},
    "shared keys": {"column_split": False, "proj_groups": 2},
    "GELU everywhere": {"evo2_style_activations": False},
    "SiLU": {"mlp_activation": "silu"},
    "eps inside": {"use_flash_rmsnorm": True},
    "untied": {"tie_embeddings": False},
    "all biases": {"qkv_proj_bias": True, "short_filter_bias": True},
    "no biases": {"mha_out_proj_bias": False, "hyena_out_proj_bias": False},
    "a filter a channel": {"hcm_filter_groups": 32, "hcs_filter_groups": 32},
    "longer filters": {"hcm_filter_length": 140, "hcs_filter_length": 9, "short_filter_length": 4},
    "8k": {"use_interpolated_rotary_pos_emb": False, "rotary_emb_base": 1000000},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_equations(tmp_path: Path, variant: str) -> None:
    model = published("evo-2", **VARIANTS[variant])
    weights, config = write(model, tmp_path)
    loaded = load(str(weights), config=config)
    assert difference(loaded.module, model) < TOLERANCE
    assert loaded.family == "evo2"
    assert loaded.context_length == 512
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}


def test_what_is_found_and_what_is_told(tmp_path: Path) -> None:
    weights, config = write(published("evo-2"), tmp_path)
    loaded = load(str(weights), config=config)
    found = {"hcm_filter_groups": 4, "hcm_filter_length": 128, "hcs_filter_groups": 8, "hcs_filter_length": 7}
    found |= {"state_size": 16, "layers": ["hcs", "hcm", "hcl", "attention"], "tie_embeddings": True}
    assert found.items() <= loaded.config.items()
    assert loaded.notes[-1] == "the published model multiplies by its projections in 8 bits, this one does not"
    assert not any("assumed" in note for note in loaded.notes)


def test_what_the_published_code_takes_for_granted(tmp_path: Path) -> None:
    """Options that are not given have its defaults, which are told; what the shapes say needs no option."""
    model = published("evo-2", column_split_hyena=True, interleave=False, evo2_style_activations=False)
    options = {"num_attention_heads": 4, "eps": 0.01, "use_interpolated_rotary_pos_emb": True}
    weights, config = write(Published(model.state, options | {"rotary_emb_scaling_factor": 128}), tmp_path)
    loaded = load(str(weights), config=config)
    right = model.options | {"rotary_emb_base": 1000000}
    assert difference(loaded.module, Published(model.state, right)) < TOLERANCE
    assert "max_seqlen 8192, rotary_emb_base 1000000.0" in loaded.notes[-1]


# ---- readings that the comparison must tell from the right one -----------------------------------------------------

MISREAD_OPTIONS: dict[str, dict[str, Any]] = {
    "in thirds": {"interleave": False},
    "head by head": {"interleave": False, "column_split_hyena": True},
    "head by head too": {"column_split_hyena": True},
    "gates exchanged": {"hyena_flip_x1x2": True},
    "queries first": {"column_split": False},
    "GELU everywhere": {"evo2_style_activations": False},
    "SiLU first": {"mlp_activation": "silu"},
    "eps inside": {"use_flash_rmsnorm": True},
    "rotary base": {"rotary_emb_base": 1000000},
    "positions not scaled": {"use_interpolated_rotary_pos_emb": False},
    "positions scaled otherwise": {"rotary_emb_scaling_factor": 16},
    "heads": {"num_attention_heads": 8},
}


@pytest.mark.parametrize("mutant", MISREAD_OPTIONS)
def test_misread_options_are_heard(tmp_path: Path, mutant: str) -> None:
    model = published("evo-2")
    weights, config = write(Published(model.state, model.options | MISREAD_OPTIONS[mutant]), tmp_path)
    assert difference(load(str(weights), config=config).module, model) > TOLERANCE


def become(key: str, f: Callable[[Tensor], Tensor]) -> Change:
    def change(state: dict[str, Any]) -> None:
        state[key] = f(state[key])

    return change


HCS, HCM, HCL = "blocks.0.filter.", "blocks.1.filter.", "blocks.2.filter."
MISREAD_WEIGHTS: dict[str, tuple[Change, dict[str, Any]]] = {
    "short taps reversed": (become(HCS + "h", lambda h: h.flip(-1)), {}),
    "medium taps reversed": (become(HCM + "h", lambda h: h.flip(-1)), {}),
    "short groups by turns": (become(HCS + "h", lambda h: h.repeat(4, 1, 1)), {"hcs_filter_groups": 32}),
    "medium groups by turns": (become(HCM + "h", lambda h: h.repeat(8, 1, 1)), {"hcm_filter_groups": 32}),
    "no D of the medium": (become(HCM + "D", torch.zeros_like), {}),
    "no D of the long": (become(HCL + "D", torch.zeros_like), {}),
    "factor two": (become(HCL + "residues", lambda x: 2 * x), {}),
    "short filter reversed": (become(HCL + "short_filter_weight", lambda x: x.flip(-1)), {}),
    "no bias": (become("blocks.0.out_filter_dense.bias", torch.zeros_like), {}),
    "no bias of attention": (become("blocks.3.inner_mha_cls.out_proj.bias", torch.zeros_like), {}),
}


@pytest.mark.parametrize("mutant", MISREAD_WEIGHTS)
def test_misread_weights_are_heard(tmp_path: Path, mutant: str) -> None:
    change, changed = MISREAD_WEIGHTS[mutant]
    model = published("evo-2")
    state = dict(model.state)
    change(state)
    weights, config = write(Published(state, model.options | changed), tmp_path)
    assert difference(load(str(weights), config=config).module, model) > TOLERANCE


def logarithms_as_poles(monkeypatch: pytest.MonkeyPatch) -> None:
    right = striped.real_modes
    monkeypatch.setattr(striped, "real_modes", lambda u, p, r, d: right(u, p.log().clamp(-0.9), r, d))


def poles_at_one_step_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """h_t = Σ R p^(t+1)"""
    right = striped.real_modes
    monkeypatch.setattr(striped, "real_modes", lambda u, p, r, d: right(u, p, r * p, d))


def no_first_activation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transformer.ACTIVATIONS, "gelu", lambda x: x)


def threshold_of_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short filters are read in the order of the medium ones."""
    right = striped.ExplicitFilter.convolve

    def wrong(self: striped.ExplicitFilter, u: Tensor) -> Tensor:
        if self.D is None:
            self.h.data = self.h.data.flip(-1)
        return right(self, u)

    monkeypatch.setattr(striped.ExplicitFilter, "convolve", wrong)


def gelu_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(transformer.ACTIVATIONS, "gelu", lambda x: F.gelu(x, approximate="tanh"))


MISTAKES = (logarithms_as_poles, poles_at_one_step_more, no_first_activation, threshold_of_order, gelu_tanh)


@pytest.mark.parametrize("make", MISTAKES)
def test_mistakes_are_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[pytest.MonkeyPatch], None]
) -> None:
    model = published("evo-2")
    make(monkeypatch)
    weights, config = write(model, tmp_path)
    assert difference(load(str(weights), config=config).module, model) > TOLERANCE


# ---- what is refused -----------------------------------------------------------------------------------------------

WQKV = "blocks.3.inner_mha_cls.Wqkv.weight"
BROKEN: dict[str, tuple[str, Any, str]] = {
    "log poles": (HCL + "log_poles", None, "missing key '{key}' of shape [32, 16, 1]; it looked like evo2"),
    "medium": (HCM + "h", None, "missing key '{key}' of shape [4, 1, 128]; it looked like evo2"),
    "short": (HCS + "h", None, "missing key '{key}' of shape [8, 1, 7]; it looked like evo2"),
    "D": (HCM + "D", None, "missing key '{key}' of shape [32]; it looked like evo2"),
    "D of the short": (HCS + "D", torch.zeros(32), "unexpected key '{key}'; it looked like evo2"),
    "queries": (WQKV, None, "missing key '{key}' of shape [96, 32]; it looked like evo2"),
    "bias": ("blocks.2.out_filter_dense.bias", None, "missing key '{key}' of shape [32]"),
    "no bias": ("blocks.2.projections.bias", torch.zeros(96), "unexpected key '{key}'"),
    "residues": (HCL + "residues", torch.zeros(32, 8), "'{key}' has shape [32, 8], expected [32, 16]; it looked like"),
    "groups": (HCM + "h", torch.zeros(5, 1, 128), "'{key}' has shape [5, 1, 128], expected [a divisor of 32, 1, hcm_f"),
    "rank": (HCS + "h", torch.zeros(8, 7), "'{key}' has shape [8, 7], expected [a divisor of 32, 1, hcs_filter_length"),
    "short taps": (HCS + "h", torch.zeros(8, 1, 5), "the option hcs_filter_length is 7, but '{key}' in the checkpoint"),
    "pole of 1": (HCL + "log_poles", torch.full((32, 16, 1), -1e-9), "'{key}' has a pole of modulus 1 in channel 0"),
    "growing": (HCL + "log_poles", torch.full((32, 16, 1), 0.1), "'{key}' has a pole of modulus 1.105171 in channel 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(tmp_path: Path, name: str) -> None:
    key, value, message = BROKEN[name]
    model = published("evo-2")
    state = {k: v for k, v in model.state.items() if k != key} | ({} if value is None else {key: value})
    weights, config = write(Published(state, model.options), tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(message.format(key=key))) as caught:
        load(str(weights), config=config)
    assert "\n" not in str(caught.value)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "kinds": ({"hcl_layer_idxs": [1, 2], "hcm_layer_idxs": []}, "the option hcl_layer_idxs lists layer 1, but "
              "'blocks.1.filter.h' in the checkpoint makes it hcm"),
    "hcl groups": ({"hcl_filter_groups": 4}, "the option hcl_filter_groups is 4, but"),
    "hcm groups": ({"hcm_filter_groups": 8}, "the option hcm_filter_groups is 8, but 'blocks.1.filter.h' in the"),
    "split": ({"proj_groups": 2}, "the option proj_groups is 2, but"),
    "misspelled": ({"interleaves": True, "interleave": None}, "unknown option 'interleaves'; is 'interleave' meant?"),
    "final norm": ({"final_norm": False}, "the option final_norm = False is not supported"),
    "tie": ({"tie_embeddings": False}, "missing key 'unembed.weight' of shape [32, 32]; it looked like evo2"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_options(tmp_path: Path, name: str) -> None:
    changed, message = REFUSED[name]
    model = published("evo-2")
    weights, config = write(Published(model.state, model.options | changed), tmp_path)
    with pytest.raises((CheckpointError, ConfigError), match=re.escape(message)) as caught:
        load(str(weights), config=config)
    assert "\n" not in str(caught.value)


def test_rows_head_by_head_need_as_many_keys_as_queries(tmp_path: Path) -> None:
    weights, config = write(published("evo-2", proj_groups=2), tmp_path)
    with pytest.raises(ConfigError, match="the option column_split is true, which has no meaning with proj_groups 2"):
        load(str(weights), config=config)
