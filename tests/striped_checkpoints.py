"""Random StripedHyena, Evo-1 and Evo 2 checkpoints, tiny but in the form of the published files.

    python tests/striped_checkpoints.py evo-2 DIRECTORY

writes DIRECTORY/model.pt and DIRECTORY/config.yml.
"""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

__all__ = ["PUBLISHED", "Published", "published", "write"]


@dataclass(frozen=True)
class Published:
    """state: as in the file; options: as in the yml beside it"""

    state: dict[str, Any]
    options: dict[str, Any]


STRIPED = {
    "hidden_size": 32, "num_filters": 32, "num_layers": 3, "short_filter_length": 3, "short_filter_bias": True,
    "mlp_init_method": "torch.nn.init.zeros_", "mlp_output_init_method": "torch.nn.init.zeros_",
    "make_vocab_size_divisible_by": 8, "log_intermediate_values": False, "hyena_filter_groups": 1,
    "model_parallel_size": 1, "final_norm": True, "use_flash_attn": True, "use_flash_depthwise": False,
    "use_flashfft": False, "inference_mode": True, "prefill_style": "fft",
}  # fmt: skip
"""eps is larger than the published ones, so that its place can be heard."""
SH_7B = STRIPED | {
    "model_name": "sh-7b", "vocab_size": 40, "attn_layer_idxs": [1], "hyena_layer_idxs": [0, 2, 32],
    "num_attention_heads": 8, "eps": 0.01, "state_size": 2, "rotary_emb_base": 500000, "proj_groups": 4,
    "column_split_hyena": True, "column_split": False, "tie_embeddings": False, "inner_mlp_size": 56,
    "mha_out_proj_bias": False, "qkv_proj_bias": False, "max_seqlen": 256, "use_flash_rmsnorm": True,
    "pipe_parallel_size": 1, "tokenizer_type": "HFAutoTokenizer", "vocab_file": "tokenizer/tokenizer.json",
}  # fmt: skip
EVO_1 = STRIPED | {
    "vocab_size": 32, "max_sequence_len": 8192, "attn_layer_idxs": [1], "hyena_layer_idxs": [0, 2],
    "num_attention_heads": 4, "eps": 0.01, "state_size": 8, "inner_size_multiple_of": 16, "smeared_gqa": False,
    "proj_groups": 1, "split_k0": True, "pile_parallel_size": 1, "tie_embeddings": True, "inner_mlp_size": None,
    "mha_out_proj_bias": True, "qkv_proj_bias": True, "rng_fork": False, "use_flash_rmsnorm": False,
    "column_split": True, "tokenizer_type": "CharLevelTokenizer", "mlp_activation": "gelu",
    "use_interpolated_rotary_pos_emb": True, "rotary_emb_scaling_factor": 16,
}  # fmt: skip
EVO_2 = STRIPED | {
    "model_name": "evo2", "vocab_size": 32, "num_layers": 4, "hcs_layer_idxs": [0], "hcm_layer_idxs": [1],
    "hcl_layer_idxs": [2], "attn_layer_idxs": [3], "hcm_filter_length": 128, "hcl_filter_groups": 32,
    "hcm_filter_groups": 4, "hcs_filter_groups": 8, "hcs_filter_length": 7, "num_attention_heads": 4,
    "short_filter_bias": False, "eps": 0.01, "state_size": 16, "rotary_emb_base": 10000,
    "rotary_emb_scaling_factor": 128, "use_interpolated_rotary_pos_emb": True, "inner_size_multiple_of": 16,
    "inner_mlp_size": 48, "proj_groups": 1, "column_split_hyena": False, "column_split": True, "interleave": True,
    "evo2_style_activations": True, "pipe_parallel_size": 1, "tie_embeddings": True, "mha_out_proj_bias": True,
    "hyena_out_proj_bias": True, "hyena_flip_x1x2": False, "qkv_proj_bias": False,
    "use_fp8_input_projections": True, "max_seqlen": 512, "max_batch_size": 1, "use_flash_rmsnorm": False,
    "use_laughing_hyena": False, "tokenizer_type": "CharLevelTokenizer", "mlp_activation": "gelu",
    "print_activations": False,
}  # fmt: skip
PUBLISHED = {"sh-7b": SH_7B, "evo-1": EVO_1, "evo-2": EVO_2}


class _Draw:
    """Random weights; bfloat16 but for those that the files keep in float32."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, size: float) -> Tensor:
        return size * torch.randn(*shape, generator=self.generator)

    def uniform(self, *shape: int, least: float, most: float) -> Tensor:
        return least + (most - least) * torch.rand(*shape, generator=self.generator)

    def linear(self, out: int, into: int) -> Tensor:
        return self.normal(out, into, size=into**-0.5).bfloat16()

    def vector(self, width: int) -> Tensor:
        return self.normal(width, size=0.4).bfloat16()

    def scale(self, width: int) -> Tensor:
        return self.uniform(width, least=0.5, most=1.5).bfloat16()


def published(name: str, seed: int = 0, **changed: Any) -> Published:
    """A random checkpoint with the options of PUBLISHED[name], those in `changed` instead."""
    options = PUBLISHED[name] | changed
    draw = _Draw(seed)
    width, vocab = options["hidden_size"], options["vocab_size"]
    state: dict[str, Any] = {
        "embedding_layer.weight": draw.normal(vocab, width, size=width**-0.5).bfloat16(),
        "norm.scale": draw.scale(width),
    }
    if not options["tie_embeddings"]:
        state["unembed.weight"] = draw.linear(vocab, width)
    for layer in range(options["num_layers"]):
        attends = layer in options["attn_layer_idxs"]
        block = _attention(draw, options) if attends else _convolution(draw, options, layer)
        state |= {f"blocks.{layer}.{key}": value for key, value in (block | _mlp(draw, options)).items()}
    return Published(state, options)


def _mlp(draw: _Draw, options: dict[str, Any]) -> dict[str, Tensor]:
    width, inner = options["hidden_size"], options["inner_mlp_size"]
    if inner is None:
        multiple = options["inner_size_multiple_of"]
        inner = (int(8 * width / 3) + multiple - 1) // multiple * multiple
    return {
        "pre_norm.scale": draw.scale(width),
        "post_norm.scale": draw.scale(width),
        "mlp.l1.weight": draw.linear(inner, width),
        "mlp.l2.weight": draw.linear(inner, width),
        "mlp.l3.weight": draw.linear(width, inner),
    }


def _attention(draw: _Draw, options: dict[str, Any]) -> dict[str, Tensor]:
    width, head = options["hidden_size"], options["hidden_size"] // options["num_attention_heads"]
    rows = width + 2 * width // options["proj_groups"]
    base = float(options.get("rotary_emb_base", 10000))
    found = {
        "inner_mha_cls.Wqkv.weight": 2 * draw.linear(rows, width),
        "inner_mha_cls.out_proj.weight": draw.linear(width, width),
        "inner_mha_cls.rotary_emb.inv_freq": (base ** (-torch.arange(0, head, 2) / head)).bfloat16(),
    }
    if options["qkv_proj_bias"]:
        found["inner_mha_cls.Wqkv.bias"] = draw.vector(rows)
    if options["mha_out_proj_bias"]:
        found["inner_mha_cls.out_proj.bias"] = draw.vector(width)
    return found


def _convolution(draw: _Draw, options: dict[str, Any], layer: int) -> dict[str, Any]:
    width = options["hidden_size"]
    evo2 = "hcl_layer_idxs" in options
    found: dict[str, Any] = {
        "projections.weight": 2 * draw.linear(3 * width, width),
        "out_filter_dense.weight": draw.linear(width, width),
        "filter.short_filter_weight": draw.normal(3 * width, 1, options["short_filter_length"], size=0.7).bfloat16(),
    }
    if options["short_filter_bias"]:
        found["filter.short_filter_bias"] = draw.vector(3 * width)
    if not evo2 or options["qkv_proj_bias"]:
        found["projections.bias"] = draw.vector(3 * width)
    if not evo2 or options["hyena_out_proj_bias"]:
        found["out_filter_dense.bias"] = draw.vector(width)
    if evo2:
        found["projections._extra_state"] = io.BytesIO(b"of another library")
        return found | _evo2_filter(draw, options, layer)
    states = (width, options["state_size"], 1)
    poles = torch.polar(draw.uniform(*states, least=0.2, most=0.98), draw.uniform(*states, least=-3.0, most=3.0))
    return found | {
        "filter.poles": torch.view_as_real(poles),
        "filter.residues": draw.normal(*states, 2, size=0.4),
        "filter.D": draw.vector(width),
    }


def _evo2_filter(draw: _Draw, options: dict[str, Any], layer: int) -> dict[str, Tensor]:
    width, states = options["hidden_size"], options["state_size"]
    if layer in options["hcs_layer_idxs"]:
        size = options["hcs_filter_groups"], 1, options["hcs_filter_length"]
        return {"filter.h": draw.normal(*size, size=0.4).bfloat16()}
    if layer in options["hcm_layer_idxs"]:
        size = options["hcm_filter_groups"], 1, options["hcm_filter_length"]
        decay = torch.exp(-torch.arange(size[2]) / 40)
        return {"filter.h": (draw.normal(*size, size=0.3) * decay).bfloat16(), "filter.D": draw.vector(width)}
    return {
        "filter.log_poles": -draw.uniform(width, states, 1, least=-5.0, most=1.0).exp(),
        "filter.residues": draw.normal(width, states, size=0.2),
        "filter.D": draw.vector(width),
    }


def write(model: Published, directory: Path) -> tuple[Path, Path]:
    """Writes both files into the directory; their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    weights, config = directory / "model.pt", directory / "config.yml"
    torch.save(model.state, weights)
    config.write_text(yaml.safe_dump(model.options))
    return weights, config


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=PUBLISHED)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    write(published(arguments.name), arguments.directory)
