"""Random checkpoints of HyenaDNA, H3, safari LongConv and MultiHyena, tiny but in the form of the published files.

    python tests/lm_checkpoints.py h3 DIRECTORY

writes DIRECTORY/model.pt and DIRECTORY/config.json.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["PUBLISHED", "Published", "h3", "hyenadna", "long_conv", "long_conv_sequence", "multihyena", "write"]


@dataclass
class Published:
    """state: as in the file; options: as in its configuration; plain: the same weights for the reference"""

    state: dict[str, Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    plain: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.plain = self.plain or {**self.state, "lm_head.weight": self._head()}

    def _head(self) -> Tensor:
        embedding = self.state.get("backbone.embeddings.word_embeddings.weight", torch.zeros(1))
        return self.state.get("lm_head.weight", embedding)


class Draw:
    """Weights that let every part be heard: biases not zero, norms not one."""

    def __init__(self, seed: int = 0) -> None:
        self.source = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, size: float = 1.0) -> Tensor:
        return size * torch.randn(*shape, generator=self.source)

    def between(self, low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=self.source)

    def linear(self, out: int, into: int, bias: bool = True) -> dict[str, Tensor]:
        weight = {"weight": self.normal(out, into, size=into**-0.5)}
        return weight | ({"bias": self.normal(out, size=0.3)} if bias else {})

    def norm(self, d: int) -> dict[str, Tensor]:
        return {"weight": self.between(0.5, 1.5, d), "bias": self.normal(d, size=0.3)}

    def attention(self, d: int) -> dict[str, Tensor]:
        return under("Wqkv", self.linear(3 * d, d)) | under("out_proj", self.linear(d, d))

    def language_model(self, d: int, mixers: list[dict[str, Tensor]], vocab: int = 16) -> dict[str, Tensor]:
        """Everything around the mixers; the embedding is small, so that eps is heard."""
        state = {"backbone.embeddings.word_embeddings.weight": self.normal(vocab, d, size=0.03)}
        for i, mixer in enumerate(mixers):
            block = under("mixer", mixer) | under("norm1", self.norm(d)) | under("norm2", self.norm(d))
            block |= under("mlp.fc1", self.linear(2 * d, d)) | under("mlp.fc2", self.linear(d, 2 * d))
            state |= under(f"backbone.layers.{i}", block)
        return state | under("backbone.ln_f", self.norm(d))

    def hyena_filter(self, channels: int, l_max: int, emb_dim: int = 5, width: int = 8) -> dict[str, Tensor]:
        """An implicit filter whose three frequency keys are one tensor."""
        freq = self.between(1, 3, 1, width)
        found = {"bias": self.normal(channels), "pos_emb.z": self.normal(1, l_max, emb_dim)}
        found |= {"pos_emb.t": torch.linspace(0, 1, l_max).reshape(1, l_max, 1)}
        found |= {"modulation.deltas": self.between(1, 15, 1, 1, channels)}
        for i, size in enumerate([emb_dim, width, width]):
            found |= under(f"implicit_filter.{2 * i}", self.linear(width, size))
            found[f"implicit_filter.{2 * i + 1}.freq"] = freq.clone()
        return found | under("implicit_filter.6", self.linear(channels, width, bias=False))

    def hyena(self, d: int, l_max: int, taps: int = 3, filters: int | None = None) -> dict[str, Tensor]:
        short = {"weight": self.normal(3 * d, 1, taps, size=0.6), "bias": self.normal(3 * d, size=0.3)}
        found = under("in_proj", self.linear(3 * d, d)) | under("out_proj", self.linear(d, d))
        return found | under("short_filter", short) | under("filter_fn", self.hyena_filter(filters or d, l_max))


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in tensors.items()}


# ---- H3 ----------------------------------------------------------------------------------------------------------


def h3(
    d: int = 8, head_dim: int = 1, n_ssm: int | None = None, rotary: int = 0, attention: tuple[int, ...] = (1,)
) -> Published:
    """Three layers, tied head; spread eigenvalues, a shift whose B is not e_1."""
    draw, heads = Draw(), d // head_dim
    n_ssm = n_ssm or heads
    mixers = []
    for i in range(3):
        if i in attention:
            mixers.append(draw.attention(d))
            continue
        mixer = {}
        for name in ("q_proj", "k_proj", "v_proj", "output_linear"):
            mixer |= under(name, draw.linear(d, d))
        mixer |= {"ssm_k_D": draw.normal(d), "D": draw.normal(heads)}
        mixer["ssm_k_kernel.kernel.B"] = draw.normal(d, 64, size=0.3)
        mixer["ssm_k_kernel.kernel.C"] = draw.normal(1, d, 64, size=0.3)
        mixer["kernel.kernel.C"] = draw.normal(1, heads, 32, 2)
        mixer["kernel.kernel.B"] = draw.normal(n_ssm, 32, 2)
        mixer["kernel.kernel.log_dt"] = draw.between(-4.5, -2.3, heads)
        mixer["kernel.kernel.inv_A_real"] = draw.between(-1.5, 1.5, n_ssm, 32)
        mixer["kernel.kernel.A_imag"] = draw.between(0, 60, n_ssm, 32)
        mixers.append(mixer)
    options: dict[str, Any] = {"d_model": d, "n_layer": 3, "d_inner": 2 * d, "vocab_size": 13}
    options |= {"pad_vocab_size_multiple": 8, "ssm_cfg": {"mode": "diag", "measure": "diag-lin"}}
    if attention:
        options |= {"attn_layer_idx": list(attention), "attn_cfg": {"num_heads": 2, "rotary_emb_dim": rotary}}
    return Published(draw.language_model(d, mixers), options)


def old_norms(published: Published) -> dict[str, Tensor]:
    """The H3 state in the order of before: each norm stands behind what it now stands before."""
    old = {}
    for key, value in published.state.items():
        part = key.rsplit(".", 1)[-1]
        if key.startswith("backbone.ln_f."):
            key = f"backbone.layers.2.norm2.{part}"
        elif ".norm2." in key:
            key = key.replace("norm2", "norm1")
        elif ".norm1." in key:
            layer = int(key.split(".")[2])
            key = f"backbone.layers.{layer - 1}.norm2.{part}" if layer else f"backbone.norm.{part}"
        old[key] = value
    return old


# ---- HyenaDNA ----------------------------------------------------------------------------------------------------


def hyenadna(form: str = "hugging face", l_max: int = 40) -> Published:
    """form: "hugging face" (one frequency key a layer, untied head), or "lightning" (all keys, tied, checkpointed)"""
    draw, d = Draw(), 6
    plain = draw.language_model(d, [draw.hyena(d, l_max) for _ in range(3)])
    embedding = plain["backbone.embeddings.word_embeddings.weight"]
    if form == "lightning":
        plain["lm_head.weight"] = embedding.clone()
        state = {}
        for key, value in plain.items():
            state["model." + key.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer.")] = value
        layer = {"_name_": "hyena", "emb_dim": 5, "filter_order": 8, "short_filter_order": 3, "l_max": l_max}
        layer |= {"modulate": True, "w": 10, "lr": 6e-4, "wd": 0.0, "lr_pos_emb": 0.0, "local_order": 3}
        options = {"d_model": d, "n_layer": 3, "d_inner": 2 * d, "vocab_size": 12, "pad_vocab_size_multiple": 8}
        return Published(state, options | {"layer": layer, "resid_dropout": 0.0, "embed_dropout": 0.1}, plain)
    plain["lm_head.weight"] = draw.normal(16, d)
    state = {}
    for key, value in plain.items():
        kept = int(key.split(".")[2]) % 3 * 2 + 1 if key.endswith(".freq") else 0  # another one in each layer
        if not key.endswith(".freq") or key.endswith(f".{kept}.freq"):
            state[f"hyena.{key}" if key.startswith("backbone.") else key] = value
    options = {
        "model_type": "hyenadna", "architectures": ["HyenaDNAForCausalLM"], "torch_dtype": "float32", "d_model": d,
        "d_inner": 2 * d, "n_layer": 3, "vocab_size": 12, "pad_vocab_size_multiple": 8, "max_seq_len": l_max,
        "emb_dim": 5, "filter_order": 8, "hyena_order": 2, "short_filter_order": 3, "num_inner_mlps": 2,
        "activation_freq": 10, "train_freq": True, "use_bias": True, "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False, "embed_dropout": 0.1, "hyena_dropout": 0.0, "hyena_filter_dropout": 0.0,
        "initializer_range": 0.02, "transformers_version": "4.35.0", "auto_map": {}, "pad_token_id": 4,
    }  # fmt: skip
    return Published(state, options, plain)


# ---- safari LongConv and MultiHyena ------------------------------------------------------------------------------


def _long_conv_operator(draw: Draw, d: int, channels: int, l_max: int, glu: bool) -> dict[str, Tensor]:
    decay = torch.exp(-torch.arange(l_max) / 10)
    found = {"D": draw.normal(channels, d), "kernel.kernel": draw.normal(channels, d, l_max, size=0.7) * decay}
    return found | under("output_linear.0", draw.linear((1 + glu) * d, channels * d))


def long_conv(channels: int = 1, glu: bool = True, l_max: int = 40) -> Published:
    """In safari's language model."""
    draw, d = Draw(), 6
    mixers = [_long_conv_operator(draw, d, channels, l_max, glu) for _ in range(2)]
    layer = {"_name_": "long-conv", "l_max": l_max, "channels": channels, "lam": 0.1, "kernel_dropout": 0.2}
    layer |= {"bidirectional": False, "causal": True, "activation": "gelu", "learning_rate": 0.001}
    layer |= {"postact": "glu" if glu else "silu", "weight_norm": False, "initializer": None, "verbose": True}
    options = {"d_model": d, "n_layer": 2, "d_inner": 2 * d, "vocab_size": 16, "layer": layer}
    return Published(draw.language_model(d, mixers), options)


def long_conv_sequence(norm: str = "layer", prenorm: bool = True, features: bool = False) -> Published:
    """In safari's sequence model, of two layers. norm: "layer", "batch" or "scalar" """
    draw, d, l_max = Draw(), 6, 40

    def normed(prefix: str) -> dict[str, Tensor]:
        found = draw.norm(d)
        if norm == "scalar":
            found = {"m": draw.normal(1, size=0.5), "s": draw.between(0.5, 1.5, 1)}
        if norm == "batch":
            found |= {"running_mean": draw.normal(d), "running_var": draw.between(0.5, 2, d)}
            found["num_batches_tracked"] = torch.tensor(7)
        return under(prefix, found)

    state = under("encoder.0", draw.linear(d, 3) if features else {"weight": draw.normal(16, d)})
    for i in range(2):
        state |= under(f"model.layers.{i}.layer", _long_conv_operator(draw, d, 2, l_max, True))
        state |= normed(f"model.layers.{i}.norm.norm")
    state |= normed("model.norm.norm") if prenorm else {}
    state |= under("decoder.0.output_transform", draw.linear(16, d))
    layer = {"_name_": "long-conv", "channels": 2, "lam": 0.1, "l_max": l_max}
    model = {"_name_": "model", "layer": layer, "d_model": d, "n_layers": 2, "prenorm": prenorm, "residual": "R"}
    model |= {"norm": "batch" if norm == "batch" else "layer", "transposed": norm == "scalar", "dropout": 0.0}
    model |= {"pool": {"_name_": "pool", "stride": 1, "expand": None}, "track_norms": True, "tie_dropout": False}
    return Published(state, {"model": model, "decoder": {"mode": "last"}}, dict(state))


def multihyena(direct: bool = True, norm: bool = True) -> Published:
    """Two heads of three channels in safari's language model; direct, norm: whether there are D and RMSNorm"""
    draw, d = Draw(), 6
    mixers = [draw.hyena(d, 40, filters=2) for _ in range(2)]
    for mixer in mixers:
        if not direct:
            del mixer["filter_fn.bias"]
        if norm:
            mixer["norm.weight"] = draw.between(0.5, 1.5, d)
    layer = {"_name_": "multihyena", "num_heads": 2, "l_max": 40, "modulate": True}
    return Published(draw.language_model(d, mixers), {"d_model": d, "n_layer": 2, "layer": layer})


PUBLISHED = {
    "h3": h3,
    "hyenadna": hyenadna,
    "long-conv": long_conv,
    "long-conv-sequence": long_conv_sequence,
    "multihyena": multihyena,
}


def write(published: Published, folder: Path, name: str = "model.pt") -> tuple[Path, Path]:
    """(the checkpoint, its configuration), as files"""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(published.state, folder / name)
    (folder / "config.json").write_text(json.dumps(published.options))
    return folder / name, folder / "config.json"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", choices=PUBLISHED)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(*write(PUBLISHED[arguments.family](), arguments.folder))
