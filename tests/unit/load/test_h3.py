"""H3 checkpoints against their recurrences: what is read, what must not be, and every message."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lm_checkpoints import Published, h3, old_norms, write
from lm_reference import H3Reference, gap
from torch import Tensor

from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load import h3 as modules
from lhcompile.load import h3_checkpoint, lm, load

LENGTH = 100  # beyond the 64 taps of the shift
TOLERANCE = 1e-4  # float32 against float64, in units of the logits' spread
State = dict[str, Tensor]
Mutate = Callable[[Published, pytest.MonkeyPatch], None]


def distance(published: Published, folder: Path, truth: Published | None = None, **options: Any) -> float:
    """Of the loaded module from the equations; truth: whose weights the equations take, if others."""
    weights, config = write(published, folder)
    inner = (truth or published).options.get("attn_cfg", {})
    reference = H3Reference((truth or published).plain, **{"num_heads": 2, **inner, **options})
    return gap(load(str(weights), config=config).module, reference, LENGTH)


VARIANTS: dict[str, dict[str, Any]] = {
    "attention": {},
    "rotary": {"d": 16, "rotary": 4},
    "rotary of the whole head": {"rotary": 4},
    "no attention": {"attention": ()},
    "attention first": {"attention": (0, 2)},
    "heads of two channels": {"head_dim": 2},
    "shared systems": {"n_ssm": 4, "attention": ()},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_the_equations(tmp_path: Path, name: str) -> None:
    assert distance(h3(**VARIANTS[name]), tmp_path) < TOLERANCE


def test_what_is_found_and_what_is_assumed(tmp_path: Path) -> None:
    published = h3()
    weights, config = write(published, tmp_path)
    loaded = load(str(weights), config=config)
    assert (loaded.family, loaded.context_length) == ("h3", None)
    assert loaded.parameters == sum(value.numel() for value in published.state.values())
    found = {"d_state": 64, "head_dim": 1, "n_ssm": 8, "attn_layer_idx": (1,), "tie_word_embeddings": True}
    assert found.items() <= loaded.config.items()
    assert (loaded.config["vocab_size"], loaded.config["vocab_size_padded"]) == (13, 16)
    assert loaded.config["attention"]["num_heads"] == 2
    assert loaded.notes == (
        "assumed, as neither file says otherwise: layer_norm_epsilon 1e-05, l_max None, disc bilinear, "
        "real_type exp, force_real False, bandlimit None",
    )


def test_without_attention_no_configuration_is_needed(tmp_path: Path) -> None:
    published = h3(attention=())
    weights, _ = write(published, tmp_path)
    assert gap(load(str(weights)).module, H3Reference(published.plain), LENGTH) < TOLERANCE


def test_the_form_of_lightning(tmp_path: Path) -> None:
    published = h3()
    state = {f"model.{key}": value for key, value in published.state.items()} | {"loss.weight": torch.ones(1)}
    write(published, tmp_path)
    torch.save({"state_dict": state, "pytorch-lightning_version": "1.8.6", "epoch": 1}, tmp_path / "last.ckpt")
    loaded = load(str(tmp_path / "last.ckpt"), config=tmp_path / "config.json")
    assert gap(loaded.module, H3Reference(published.plain, num_heads=2), LENGTH) < TOLERANCE
    assert "skipped keys outside 'model.': loss.weight" in loaded.notes


def renamed_as_of_old(state: State) -> State:
    """Names of before the embedding and the backbone got theirs."""
    old = {key.replace("backbone.embeddings.word_embeddings", "embedding"): value for key, value in state.items()}
    return {re.sub(r"^backbone\.", "s4seq.encoder.", key): value for key, value in old.items()}


@pytest.mark.parametrize("rename", [dict, renamed_as_of_old], ids=["norms", "names too"])
def test_old_norms_are_moved(tmp_path: Path, rename: Callable[[State], State]) -> None:
    published = h3()
    old = Published(rename(old_norms(published)), published.options, published.plain)
    assert distance(old, tmp_path) < TOLERANCE
    notes = load(str(tmp_path / "model.pt"), config=tmp_path / "config.json").notes
    assert any(note.startswith("the file has the old order of norms") for note in notes)


def test_half_precision(tmp_path: Path) -> None:
    published = h3(attention=())
    half = {key: value.half() for key, value in published.state.items()}
    weights, config = write(Published(half, published.options), tmp_path)
    loaded = load(str(weights), config=config)
    rounded = {key: value.float() for key, value in half.items()}
    assert gap(loaded.module, H3Reference(Published(rounded).plain), LENGTH) < TOLERANCE


@pytest.mark.parametrize("real_type", ["none", "relu", "sigmoid", "softplus"])
def test_other_forms_of_the_real_part(tmp_path: Path, real_type: str) -> None:
    """The same rates stored otherwise are the same model."""
    published, truth = h3(attention=()), h3(attention=())
    rates = {
        "none": torch.clone, "relu": lambda a: a - 1e-4,
        "sigmoid": torch.logit, "softplus": lambda a: a.expm1().log(),
    }
    for each in (published, truth):
        every(each, "inv_A_real", lambda a: -1 + 0.4 * a)  # a sigmoid has rates below 1
    truth = Published(truth.state)
    every(published, "inv_A_real", lambda a: rates[real_type](a.double().exp()).float())
    published.options["ssm_cfg"]["real_type"] = real_type
    assert distance(published, tmp_path, truth) < TOLERANCE


@pytest.mark.parametrize(
    ("options", "end", "change"),
    [
        ({"force_real": True}, ".mixer.kernel.kernel.A_imag", torch.zeros_like),
        ({"bandlimit": 0.0}, ".mixer.kernel.kernel.C", torch.zeros_like),
    ],
)
def test_modes_that_do_not_turn_or_are_silent(tmp_path: Path, options: dict[str, Any], end: str, change: Any) -> None:
    published, truth = h3(attention=()), h3(attention=())
    every(truth, end, change)
    published.options["ssm_cfg"] |= options
    assert distance(published, tmp_path, Published(truth.state)) < TOLERANCE


# ---- readings of the format that are wrong: none may pass for the right one ----------------------------------------


def kernel(monkeypatch: pytest.MonkeyPatch, part: type, change: Callable[[Any, Any], Any]) -> None:
    right = part.forward
    monkeypatch.setattr(part, "forward", lambda self: change(self, right(self)))


def every(published: Published, end: str, change: Callable[[Tensor], Tensor]) -> None:
    """Changes the tensors whose keys end so, for the loader only."""
    for key, value in published.state.items():
        if key.endswith(end):
            published.state[key] = change(value)


def swapped(published: Published, one: str, two: str) -> None:
    for key in list(published.state):
        if f".{one}." in key:
            other = key.replace(one, two)
            published.state[key], published.state[other] = published.state[other], published.state[key]


def half_turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary of neighbouring pairs."""
    a, b = x[..., ::2], x[..., 1::2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def gelu_of_erf(_: Published, patch: pytest.MonkeyPatch) -> None:
    right = F.gelu
    patch.setattr(lm.F, "gelu", lambda x, approximate: right(x))


def norms_in_place(published: Published, patch: pytest.MonkeyPatch) -> None:
    """Old norms, only the first and the last renamed."""
    last = "backbone.layers.2.norm2."
    old = {k.replace("backbone.norm.", "backbone.ln_f."): v for k, v in old_norms(published).items()}
    published.state |= old | {k: v for k, v in published.state.items() if k.startswith(last)}


def wrong_base(_: Published, patch: pytest.MonkeyPatch) -> None:
    right = lm.Rotary
    patch.setattr(lm, "Rotary", lambda context, dim, base, scaling: right(context, dim, 2 * base, scaling))


def turn_last(self: lm.Attention, x: Tensor) -> Tensor:
    return torch.cat(
        [x[..., : -self.turning], lm.rotate(x[..., -self.turning :], *self.rotary(x.shape[1]))], dim=-1
    )


ROTARY, WIDE = {"d": 16, "rotary": 4}, {"head_dim": 2, "attention": ()}
MUTANTS: dict[str, tuple[dict[str, Any], Mutate]] = {
    "factor 2": ({}, lambda _, m: kernel(m, modules.DiagonalKernel, lambda s, y: (y[0], y[1] / 2))),
    "taps reversed": ({}, lambda _, m: kernel(m, modules.ShiftKernel, lambda s, y: y.flip(-1))),
    "B is e_1": ({}, lambda _, m: kernel(m, modules.ShiftKernel, lambda s, y: s.C[0].double())),
    "convolution for correlation": ({}, lambda p, m: every(p, "ssm_k_kernel.kernel.B", lambda b: b.flip(-1))),
    "shift's D": ({}, lambda p, m: every(p, "ssm_k_D", torch.zeros_like)),
    "D": ({}, lambda p, m: every(p, "mixer.D", torch.zeros_like)),
    "sign of the frequency": ({}, lambda p, m: every(p, "A_imag", torch.neg)),
    "zero-order hold": ({}, lambda p, m: p.options["ssm_cfg"].update(disc="zoh")),
    "pole for residue": ({}, lambda _, m: kernel(m, modules.DiagonalKernel, lambda s, y: (y[0], y[1] * y[0]))),
    "q for k": ({}, lambda p, m: swapped(p, "q_proj", "k_proj")),
    "k for v": ({}, lambda p, m: swapped(p, "k_proj", "v_proj")),
    "exact gelu": ({}, gelu_of_erf),
    "eps": ({}, lambda p, m: p.options.update(layer_norm_epsilon=1e-6)),
    "old norms left": ({}, norms_in_place),
    "rows of Wqkv by head": ({}, lambda p, m: every(p, "Wqkv.weight", lambda w: w.unflatten(0, (2, 3, -1)).transpose(
        0, 1).flatten(0, 2))),
    "heads of attention": ({}, lambda p, m: p.options["attn_cfg"].update(num_heads=4)),
    "rotary of pairs": (ROTARY, lambda _, m: m.setattr(lm, "rotate", half_turned)),
    "rotary of the last channels": (ROTARY, lambda _, m: m.setattr(lm.Attention, "_turned", turn_last)),
    "rotary left out": (ROTARY, lambda p, m: p.options["attn_cfg"].update(rotary_emb_dim=0)),
    "rotary of too many": (ROTARY, lambda p, m: p.options["attn_cfg"].update(rotary_emb_dim=8)),
    "rotary base": (ROTARY, wrong_base),
    "output by head": (WIDE, lambda p, m: every(p, "output_linear.weight", lambda w: w.unflatten(1, (2, 4)).transpose(
        1, 2).flatten(1))),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_reading_moves_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    variant, mutate = MUTANTS[name]
    truth, published = h3(**variant), h3(**variant)
    mutate(published, monkeypatch)
    assert distance(published, tmp_path, truth, **truth.options.get("attn_cfg", {})) > 3 * TOLERANCE


def test_shared_systems_are_tiled_not_repeated(tmp_path: Path) -> None:
    """Head h has system h % n_ssm, so that a file with all systems written out in that order is the same model."""
    shared = h3(n_ssm=4, attention=())
    for name, spread in (("tiled", lambda x: torch.cat([x, x])), ("repeated", lambda x: x.repeat_interleave(2, 0))):
        full = replace(shared, state=dict(shared.state))
        for end in ("kernel.kernel.B", "inv_A_real", "A_imag"):
            every(full, f".mixer.kernel.{end.removeprefix('kernel.')}" if "B" in end else end, spread)
        assert (distance(full, tmp_path / name, shared) < TOLERANCE) == (name == "tiled")


# ---- messages ------------------------------------------------------------------------------------------------------


def test_rotary_frequencies_in_the_file(tmp_path: Path) -> None:
    """They say how many channels turn; that they are those of the base is checked."""
    published = h3(d=16, rotary=4)
    key = "backbone.layers.1.mixer.rotary_emb.inv_freq"
    del published.options["attn_cfg"]["rotary_emb_dim"]
    published.state[key] = torch.tensor([1.0, 0.01])
    assert distance(published, tmp_path, h3(d=16, rotary=4)) < TOLERANCE
    published.state[key] = torch.tensor([1.0, 0.5])
    weights, config = write(published, tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(f"{key!r} is not that of rotary_emb_base 10000.0")):
        load(str(weights), config=config)


def test_context(tmp_path: Path) -> None:
    """None at all without rotary, that of the tables with it; an l_max of the options bounds it."""
    published = h3(d=16, rotary=4)
    weights, config = write(published, tmp_path)
    loaded = load(str(weights), config=config)
    assert loaded.context_length == 2048
    assert "made rotary tables for 2048 positions; --context sets another length" in loaded.notes
    assert load(str(weights), config=config, context=150).context_length == 150
    published.options["ssm_cfg"]["l_max"] = 128
    write(published, tmp_path)
    assert load(str(weights), config=config).context_length == 128
    with pytest.raises(ConfigError, match="context 150 is not between 2 and the checkpoint's l_max 128"):
        load(str(weights), config=config, context=150)


MIXER = "backbone.layers.0.mixer."
BROKEN: dict[str, tuple[str, Tensor | None, str]] = {
    "missing": (MIXER + "kernel.kernel.C", None, "missing key '{key}' of shape [1, 8, 32, 2]; it looked like h3"),
    "shape": (MIXER + "ssm_k_kernel.kernel.C", torch.ones(8, 64), "'{key}' has shape [8, 64], expected [1, 8, 64]"),
    "modes": (MIXER + "kernel.kernel.inv_A_real", torch.ones(8, 31), "'{key}' has shape [8, 31], expected [n_ssm, 32]"),
    "rank": (MIXER + "D", torch.ones(8, 1), "'{key}' has shape [8, 1], expected [d_model / head_dim]"),
    "heads": (MIXER + "D", torch.ones(3), "'{key}' has 3 entries, which do not divide d_model 8"),
    "pole": (MIXER + "kernel.kernel.inv_A_real", torch.full((8, 32), -90.0), "'{key}' gives head 0 a pole of modul"),
    "extra": (MIXER + "more", torch.ones(1), "unexpected key '{key}'; it looked like h3"),
    "head": ("lm_head.weight", torch.ones(16, 8), "'{key}' differs from the embedding it is tied to"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(tmp_path: Path, name: str) -> None:
    key, value, message = BROKEN[name]
    published = h3()
    published.state.pop(key, None)
    if value is not None:
        published.state[key] = value
    weights, config = write(published, tmp_path)
    with pytest.raises(CheckpointError, match=re.escape(message.format(key=key))) as caught:
        load(str(weights), config=config)
    assert "\n" not in str(caught.value)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "heads": ({"attn_cfg": {}}, "layer 1 is attention: no shape says its number of heads; give attn_cfg: {num_heads:"),
    "fit": ({"attn_cfg": {"num_heads": 3}}, "d_model 8 has no 3 heads of 0 rotary channels"),
    "wide": ({"attn_cfg": {"num_heads": 2, "rotary_emb_dim": 6}}, "d_model 8 has no 2 heads of 6 rotary channels"),
    "odd": ({"attn_cfg": {"num_heads": 2, "rotary_emb_dim": 3}}, "the option rotary_emb_dim is 3, an odd number"),
    "causal": ({"attn_cfg": {"num_heads": 2, "causal": False}}, "the option causal = False is not supported"),
    "layers": ({"attn_layer_idx": [2]}, "the option attn_layer_idx is [2], but 'backbone.layers.1.mixer.Wqkv.weight'"),
    "mode": ({"ssm_cfg": {"mode": "ema"}}, "the option mode = 'ema' is not supported"),
    "states": ({"ssm_cfg": {"d_state": 32}}, "the option d_state is 32, but"),
    "disc": ({"ssm_cfg": {"disc": "dss"}}, "the option disc is 'dss', not one of bilinear, zoh"),
    "unknown": ({"ssm_cfg": {"modes": 3}}, "unknown option 'modes'"),
    "layers of layers": ({"n_layer": 4}, "the option n_layer is 4, but 'backbone.layers.2' in the checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_cannot_be(tmp_path: Path, name: str) -> None:
    changed, message = CONFIGS[name]
    published = h3()
    published.options |= changed
    weights, config = write(published, tmp_path)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load(str(weights), config=config)
    assert "\n" not in str(caught.value)


def test_old_norms_follow_the_number_of_layers() -> None:
    """Every norm of the old file has one place in the new, whatever the order of the keys."""
    published = h3()
    old = dict(reversed(old_norms(published).items()))
    moved = h3_checkpoint._renamed(h3_checkpoint.Checkpoint(Path("x"), old)).tensors
    assert moved.keys() == published.state.keys()
    assert all(torch.equal(moved[key], value) for key, value in published.state.items())
