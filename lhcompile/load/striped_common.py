"""What the checkpoints of StripedHyena, Evo-1 and Evo 2 have in common: options, keys, sizes, and how they are filled.

Keys and shapes say what each block is and how large; the configuration, in the published names, says the rest. What
every published one holds (num_attention_heads, eps) must be given, other options have the published code's defaults.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lhcompile.artifacts import LoadedModel
from lhcompile.errors import CheckpointError
from lhcompile.load.checkpoint import Checkpoint, fill, without_prefix
from lhcompile.load.lm_checkpoint import Reading
from lhcompile.load.options import HUGGING_FACE, GivenOptions
from lhcompile.load.striped import TIME_ORDERED, AttentionBlock, ConvolutionBlock, StripedConfig, StripedHyena

__all__ = [
    "EMBEDDING",
    "IGNORED",
    "SUPPORTED",
    "StripedOptions",
    "head_blocks",
    "layers_of",
    "loaded_model",
    "model_config",
    "reading_of",
    "sizes_of",
]

EMBEDDING, UNEMBED = "embedding_layer.weight", "unembed.weight"
FREQUENCIES = "rotary_emb.inv_freq"
DECIDING = {"inner_mha_cls.Wqkv.weight": "attention", "filter.poles": "modal", "filter.log_poles": "hcl"}
"""Keys of a block that say its kind."""
SUPPORTED: dict[str, tuple[Any, ...]] = {"final_norm": (True,), "smeared_gqa": (False,), "long_fir_threshold": (None,)}
CACHED = 8192
"""Positions that keys and values are made for at most where no context is asked for."""
IGNORED = HUGGING_FACE | {
    "attn_block_dtype", "compile", "depthwise_dtype", "hyena_block_dtype", "inference_mode", "inner_size_multiple_of",
    "log_intermediate_values", "low_mem_mode", "make_vocab_size_divisible_by", "max_batch_size",
    "max_position_embeddings", "max_sequence_len", "mlp_dtype", "mlp_init_method", "mlp_output_init_method",
    "model_name", "model_parallel_size", "num_filters", "padding_idx", "params_dtype", "pile_parallel_size",
    "pipe_parallel_size", "prefill_style", "print_activations", "process_group", "rng_fork", "seqlen", "split_k0",
    "tie_word_embeddings", "tokenizer_type", "use_flash_attention_2", "use_flash_attn", "use_flash_depthwise",
    "use_flashfft", "use_laughing_hyena", "vocab_file",
}  # fmt: skip
"""Options that say how the published code computes or trains, not what."""


@dataclass(frozen=True)
class StripedOptions:
    """The published options of StripedHyena and Evo-1 that change the logits.

    proj_groups: queries per key; max_seqlen: the context unless --context says otherwise
    """

    num_attention_heads: int
    eps: float
    vocab_size: int
    hidden_size: int
    num_layers: int
    inner_mlp_size: int
    state_size: int = 0
    short_filter_length: int = 3
    short_filter_bias: bool = True
    proj_groups: int = 1
    qkv_proj_bias: bool = True
    mha_out_proj_bias: bool = True
    tie_embeddings: bool = False
    max_seqlen: int = 8192
    rotary_emb_base: float = 10000.0
    use_interpolated_rotary_pos_emb: bool = False
    rotary_emb_scaling_factor: float = 1.0
    use_flash_rmsnorm: bool = False
    column_split_hyena: bool = True
    mlp_activation: Literal["silu", "gelu"] = "silu"


# ---- what the file holds -------------------------------------------------------------------------------------------


def reading_of(checkpoint: Checkpoint, family: str) -> Reading:
    """Keys without a wrapper's prefix."""
    return Reading(without_prefix(checkpoint, {EMBEDDING}), family)


def layers_of(reading: Reading, given: GivenOptions, lists: Mapping[str, str]) -> tuple[str, ...]:
    """The kind of each block, as its keys say; a list among the options must agree.

    lists: option → kind. Blocks that it lists and that do not exist change nothing.
    Raises CheckpointError for numbers with gaps, ConfigError for a list that contradicts the keys.
    """
    numbers = reading.numbers(r"blocks\.(\d+)\.")
    if numbers != list(range(len(numbers))):
        raise reading.error(f"the blocks are numbered {numbers}, with gaps")
    listed: dict[int, str] = {}
    for option in lists:
        indices = given.values.get(option, [])
        if not isinstance(indices, list) or not all(type(index) is int for index in indices):
            raise given.refuse(option, f"is {indices!r}, not a list of layers")
        listed |= {index: option for index in indices if index not in listed}
    layers = []
    for number in numbers:
        kinds, key = _kinds(reading, number, tuple(lists.values()))
        option = listed.get(number, "")
        if option and lists[option] not in kinds:
            raise given.refuse(option, f"lists layer {number}, but {key!r} in the checkpoint makes it {kinds[0]}")
        layers.append(lists[option] if option else kinds[0])
    return tuple(layers)


def _kinds(reading: Reading, number: int, family: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """(what the block may be, likeliest first, a key that says so)"""
    block = f"blocks.{number}."
    for key, kind in DECIDING.items():
        if block + key in reading.tensors:
            return (kind,), block + key
    explicit = reading.tensors.get(block + "filter.h")
    if explicit is not None:
        many = explicit.ndim == 3 and explicit.shape[2] >= TIME_ORDERED
        return ("hcm", "hcs") if many else ("hcs", "hcm"), block + "filter.h"
    inside = [key for key in reading.tensors if key.startswith(block)]
    attends = [key for key in inside if "inner_mha_cls" in key]
    if attends:
        return ("attention",), attends[0]
    return tuple(kind for kind in family if kind != "attention"), inside[0]


def _first_shape(reading: Reading, suffix: str, axes: str) -> tuple[tuple[int, ...], str] | None:
    """(shape, key) of the first block's tensor with this key; None if no block has one.

    Raises CheckpointError when it has not the axes.
    """
    numbers = reading.numbers(r"blocks\.(\d+)\." + re.escape(suffix) + "$")
    key = f"blocks.{numbers[0]}.{suffix}" if numbers else ""
    return (reading.shape(key, axes), key) if numbers else None


def sizes_of(
    reading: Reading, given: GivenOptions, layers: tuple[str, ...], biases: Mapping[str, str]
) -> tuple[GivenOptions, dict[str, tuple[Any, str]]]:
    """(the options without an inner_mlp_size of null, option → (value, the key that determines it)).

    biases: option → its key within a block. An option that is given stands, so that `fill` names the tensor missing.
    """
    vocab, width = reading.shape(EMBEDDING, "[vocab_size, hidden_size]")
    first = "blocks.0.mlp.l1.weight"
    inner = reading.shape(first, "[inner_mlp_size, hidden_size]")[0]
    shaped: dict[str, tuple[Any, str]] = {
        "vocab_size": (vocab, EMBEDDING),
        "hidden_size": (width, EMBEDDING),
        "num_layers": (len(layers), f"blocks.{len(layers) - 1}"),
        "inner_mlp_size": (inner, first),
    }
    for option, suffix, axes, axis in (
        ("short_filter_length", "filter.short_filter_weight", "[3 * hidden_size, 1, short_filter_length]", 2),
        ("state_size", "filter.poles", "[hidden_size, state_size, 1, 2]", 1),
        ("state_size", "filter.log_poles", "[hidden_size, state_size, 1]", 1),
    ):
        if found := _first_shape(reading, suffix, axes):
            shaped[option] = found[0][axis], found[1]
    if found := _first_shape(reading, "inner_mha_cls.Wqkv.weight", "[rows, hidden_size]"):
        (rows, _), key = found
        if rows <= width or 2 * width % (rows - width):
            raise reading.error(f"{key!r} has {rows} rows, expected {width} + 2 * {width} / proj_groups")
        shaped["proj_groups"] = 2 * width // (rows - width), key
    for option, suffix in biases.items():
        if option not in given.values:
            bias = next((key for key in reading.tensors if key.endswith("." + suffix)), None)
            shaped[option] = bias is not None, bias or f"blocks.0.{suffix}"
    if "tie_embeddings" not in given.values:
        shaped["tie_embeddings"] = UNEMBED not in reading.tensors, UNEMBED
    return _without_null(given, width, inner, first), shaped


def _without_null(given: GivenOptions, width: int, inner: int, key: str) -> GivenOptions:
    """An inner_mlp_size of null is 8/3 of the width, rounded up to a multiple of inner_size_multiple_of."""
    if "inner_mlp_size" not in given.values or given.values["inner_mlp_size"] is not None:
        return given
    multiple = given.values.get("inner_size_multiple_of", 64)
    if type(multiple) is not int or multiple < 1:
        raise given.refuse("inner_size_multiple_of", f"cannot be {multiple!r}")
    meant = -(-(8 * width // 3) // multiple) * multiple
    if meant != inner:
        raise given.refuse(
            "inner_mlp_size",
            f"is null, which with inner_size_multiple_of {multiple} is {meant}, "
            f"but {key!r} in the checkpoint makes it {inner}",
        )
    return replace(given, values={name: value for name, value in given.values.items() if name != "inner_mlp_size"})


def model_config(
    options: StripedOptions, given: GivenOptions, layers: tuple[str, ...], context: int | None, **own: Any
) -> StripedConfig:
    """The module's sizes and options; own: those that not every family has.

    Raises ConfigError for heads that do not divide, and numbers out of range.
    """
    width, heads = options.hidden_size, options.num_attention_heads
    if heads < 1 or width % heads or (width // heads) % 2 or heads % options.proj_groups:
        raise given.refuse(
            "num_attention_heads",
            f"is {heads}, which does not cut hidden_size {width} in heads of an even size, "
            f"in groups of proj_groups {options.proj_groups}",
        )
    for name in ("rotary_emb_base", "rotary_emb_scaling_factor"):
        if getattr(options, name) <= 0:
            raise given.refuse(name, f"is {getattr(options, name)}, not above 0")
    for name, least in (("max_seqlen", 2), ("eps", 0)):
        if getattr(options, name) < least:
            raise given.refuse(name, f"is {getattr(options, name)}, less than {least}")
    return StripedConfig(
        vocab_size=options.vocab_size,
        width=width,
        heads=heads,
        kv_heads=heads // options.proj_groups,
        inner=options.inner_mlp_size,
        context=context or (min(options.max_seqlen, CACHED) if "attention" in layers else options.max_seqlen),
        layers=layers,
        eps=options.eps,
        norm_inside=options.use_flash_rmsnorm,
        rotary_base=options.rotary_emb_base,
        scaling=options.rotary_emb_scaling_factor if options.use_interpolated_rotary_pos_emb else 1.0,
        short_taps=options.short_filter_length,
        short_bias=options.short_filter_bias,
        qkv_bias=options.qkv_proj_bias,
        attention_out_bias=options.mha_out_proj_bias,
        tied=options.tie_embeddings,
        states=options.state_size,
        **own,
    )


# ---- the module ----------------------------------------------------------------------------------------------------


def head_blocks(rows: Tensor, heads: int) -> Tensor:
    """Rows that stand head by head, [a | b | c] within each, as all of a, all of b, all of c; int64 [3 · width]"""
    return rows.reshape(heads, 3, -1).transpose(0, 1).flatten()


def loaded_model(
    reading: Reading,
    options: StripedOptions,
    model: StripedConfig,
    notes: Iterable[str],
    channels: Tensor,
    attention: Tensor | None = None,
) -> LoadedModel:
    """Fills the module and brings its weights into the module's order.

    channels: the file's row of each channel of x_2 | x_1 | v; attention: the same of q | k | v, None as it stands
    """
    with torch.device("meta"):
        module = StripedHyena(model)
    fill(module, _trained(_with_one_embedding(reading, model.tied)), reading.kind)
    module.float().eval().requires_grad_(False)
    _refuse_growing(reading, module)
    for block in module.blocks:
        if isinstance(block, ConvolutionBlock):
            short = (block.filter.short_filter_weight, block.filter.short_filter_bias)
            _reorder(channels, block.projections.weight, block.projections.bias, *short)
        elif isinstance(block, AttentionBlock) and attention is not None:
            _reorder(attention, block.inner_mha_cls.Wqkv.weight, block.inner_mha_cls.Wqkv.bias)
    return LoadedModel(
        module=module,
        family=reading.kind,
        context_length=model.context,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        source=str(reading.checkpoint.path),
        config=asdict(options) | {"layers": list(model.layers)},
        notes=(*reading.checkpoint.notes, *_of_positions(reading, options, model), *notes),
    )


def _of_positions(reading: Reading, options: StripedOptions, model: StripedConfig) -> Iterator[str]:
    """Notes: that the context is cut to CACHED; that stored frequencies are not the options', which are exact."""
    if model.context == CACHED < options.max_seqlen:
        yield f"keys and values are made for {CACHED} of the max_seqlen {options.max_seqlen}; --context N for more"
    dim = model.width // model.heads
    made = model.rotary_base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    for key, stored in reading.tensors.items():
        if not key.endswith(FREQUENCIES):
            continue
        if stored.shape != made.shape or not torch.allclose(stored.double(), made, rtol=0.01, atol=1e-6):
            base = f"{model.rotary_base:.12g}"
            yield f"{key!r} holds other frequencies than those of rotary_emb_base {base}, which are used"
            return


def _trained(checkpoint: Checkpoint) -> Checkpoint:
    """Without the rotary frequencies."""
    trained = {key: value for key, value in checkpoint.tensors.items() if not key.endswith(FREQUENCIES)}
    return replace(checkpoint, tensors=trained)


def _with_one_embedding(reading: Reading, tied: bool) -> Checkpoint:
    """Without the second copy that a tied checkpoint may hold. Raises CheckpointError when it differs."""
    checkpoint, tensors = reading.checkpoint, reading.tensors
    if not tied or UNEMBED not in tensors:
        return checkpoint
    embedding, unembed = tensors[EMBEDDING], tensors[UNEMBED]
    if embedding.shape != unembed.shape or not torch.equal(embedding, unembed):
        raise CheckpointError(
            f"{checkpoint.path}: {UNEMBED!r} differs from {EMBEDDING!r}, which it is tied to; "
            "if it is not tied, set tie_embeddings: false in --config"
        )
    return replace(checkpoint, tensors={key: value for key, value in tensors.items() if key != UNEMBED})


def _refuse_growing(reading: Reading, module: nn.Module) -> None:
    """Raises CheckpointError for a pole that in float32 has a modulus of 1 or more."""
    for key, table in module.named_parameters():
        if key.endswith("filter.poles"):
            modulus = torch.view_as_complex(table.double()).abs().squeeze(-1)
        elif key.endswith("filter.log_poles"):
            modulus = table.double().exp().float().squeeze(-1)
        else:
            continue
        worst, channel = modulus.amax(1).max(0)
        if worst >= 1:
            where = f"a pole of modulus {float(worst):.7g} in channel {int(channel)}"
            raise CheckpointError(
                f"{reading.checkpoint.path}: {key!r} has {where}; with 1 and more the recurrence would not decay"
            )


def _reorder(rows: Tensor, *parameters: Tensor | None) -> None:
    """Row i of each becomes its row rows[i]."""
    if torch.equal(rows, torch.arange(len(rows))):
        return
    for parameter in parameters:
        if parameter is not None:
            parameter.data = parameter.data[rows]
