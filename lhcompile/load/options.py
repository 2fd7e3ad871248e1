"""A model's options: merged from files and held against what a checkpoint's shapes say.

A loader settles its options in three steps:

    given = given_options(checkpoint, config, nested=("layer",), renamed={"bias": "use_bias"})
    shaped = {"d_model": (d_model, EMBEDDING), …}            # option → (value, the key whose shape determines it)
    options, notes = settle(HyenaConfig, given, shaped, supported={"num_blocks": (1,)}, ignored={"dropout", …})

1. `given_options` reads --config (YAML or JSON, the family's own names) and config.json beside the weights. An option
   of --config wins.
2. What shapes determine is taken from them; an option that says otherwise is an error, null says nothing.
3. `settle` makes the family's dataclass: each of its fields comes from the shapes, else from the options, checked
   against the field's type (null says nothing), else from its default, which is noted as assumed. An option that is no
   field may be in `supported`, with one of the values listed there, or in `ignored`, which names those that change
   nothing. Any other is noted as not used, unless it is nearly the name of one that would be assumed: that is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from lhcompile.errors import ConfigError
from lhcompile.load.checkpoint import Checkpoint
from lhcompile.load.configuration import read_mapping, resolved

__all__ = ["HUGGING_FACE", "GivenOptions", "given_options", "settle", "unpadded_vocabulary"]

HUGGING_FACE = frozenset({
    "_commit_hash", "_name_or_path", "architectures", "auto_map", "bos_token_id", "chunk_size_feed_forward",
    "custom_pipelines", "dtype", "eos_token_id", "id2label", "is_decoder", "is_encoder_decoder", "label2id",
    "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict",
    "sep_token_id", "tokenizer_class", "torch_dtype", "transformers_version", "unk_token_id", "use_cache",
    "use_return_dict",
    # what older versions also wrote: how text is generated, and tasks of other models
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "is_composition", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size", "num_beam_groups",
    "num_beams", "num_return_sequences", "output_scores", "prefix", "pruned_heads", "remove_invalid_values",
    "repetition_penalty", "return_dict_in_generate", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16",
})  # fmt: skip
"""Options of every Hugging Face config.json that do not change a causal model's logits; for `ignored`."""

Options = TypeVar("Options")
NEARLY = 0.85
"""Names as alike as this, by difflib's measure, are taken for one name misspelled."""


@dataclass(frozen=True)
class GivenOptions:
    """values: by name; files: where each stands; unresolved: names with interpolations that lead nowhere"""

    checkpoint: Path
    values: dict[str, Any]
    files: dict[str, Path]
    unresolved: tuple[str, ...] = ()

    def refuse(self, name: str, reason: str) -> ConfigError:
        """The error that names the option, its value and its file."""
        return ConfigError(f"{self.files.get(name, self.checkpoint)}: the option {name} {reason}")

    def inside(self, name: str) -> GivenOptions:
        """The options of the mapping that the option `name` is; none when it is null or not given."""
        inner = self.values.get(name)
        if inner is not None and not isinstance(inner, dict):
            raise self.refuse(name, "is no mapping")
        values = {str(key): value for key, value in (inner or {}).items()}
        return GivenOptions(self.checkpoint, values, dict.fromkeys(values, self.files.get(name, self.checkpoint)))


def given_options(
    checkpoint: Checkpoint,
    config: Path | None,
    *,
    sections: Collection[str] = ("model", "model_config"),
    nested: Collection[str] = (),
    renamed: Mapping[str, str] | None = None,
) -> GivenOptions:
    """The options of `checkpoint.config` and of the file `config`, whose own win.

    sections: the first of these that a file has as a mapping holds the options, else its whole content does
    nested: mappings among the options whose options stand beside the others
    renamed: other names of options; a file that has both must give both one value

    Raises ConfigError when a file cannot be read, a nested one is no mapping, or names contradict.
    """
    values: dict[str, Any] = {}
    files: dict[str, Path] = {}
    unresolved: list[str] = []
    sources = [(checkpoint.config_file, checkpoint.config)] if checkpoint.config else []
    for path, root in [*sources, *([(config, read_mapping(config))] if config else [])]:
        section = next((root[name] for name in sections if isinstance(root.get(name), dict)), root)
        found, unknown = resolved({k: v for k, v in section.items() if k not in nested}, root)
        for name in nested:
            inner = root.get(name) if section.get(name) is None else section[name]
            if inner is not None and not isinstance(inner, dict):
                raise ConfigError(f"{path}: the option {name} is no mapping")
            more, more_unknown = resolved(inner or {}, root)
            found, unknown = found | more, [*unknown, *more_unknown]
        for name, standard in (renamed or {}).items():
            if name in found:
                value, known = found.pop(name), found.get(standard)
                found[standard] = value if known is None else known
                if value is not None and found[standard] != value:
                    raise ConfigError(f"{path}: the options {name} and {standard} are one but differ")
        values |= found
        files |= dict.fromkeys(found, path)
        unresolved += unknown
    return GivenOptions(checkpoint.path, values, files, tuple(unresolved))


def settle(
    kind: type[Options],
    given: GivenOptions,
    shaped: Mapping[str, tuple[Any, str]],
    *,
    supported: Mapping[str, tuple[Any, ...]] | None = None,
    ignored: Collection[str] = (),
) -> tuple[Options, list[str]]:
    """(the family's options, notes on what was assumed); see the module.

    kind: a dataclass; shaped: option → (value, the key whose shape determines it)
    supported: options that are no fields of it → the values that change nothing or are built in
    ignored: options, or fields, that matter to training only; such fields keep their defaults

    Raises ConfigError naming the file and the option.
    """
    names = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    free: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in given.values.items():
        if supported and name in supported:
            if value not in supported[name]:
                raise given.refuse(name, f"= {value!r} is not supported")
        elif name in shaped and name not in ignored:
            made, key = shaped[name]
            if value is not None and (tuple(value) if isinstance(value, list) else value) != made:
                raise given.refuse(name, f"is {value}, but {key!r} in the checkpoint makes it {made}")
        elif name in names and name not in ignored:
            if value is not None or names[name] is None or names[name] is MISSING:
                free[name] = value
        elif name not in ignored:
            unknown.append(name)
    assumed = [name for name in names if name not in free and name not in shaped and name not in ignored]
    said = {name for name, value in given.values.items() if value is not None}
    _refuse_misspelled(given, unknown, {*assumed, *(supported or ())} - said)
    for name in assumed:
        if names[name] is MISSING:
            raise ConfigError(f"{given.checkpoint}: the option {name} must be given in --config: no shape says it")
    sizes = {name: value for name, (value, _) in shaped.items() if name in names}
    options = kind(**{**sizes, **_checked(kind, given, free, sizes)})
    notes = [f"did not use unknown options: {', '.join(unknown)}"] if unknown else []
    notes += [f"ignored interpolations: {', '.join(lost)}"] if (lost := _lost(given, ignored)) else []
    if assumed:
        told = ", ".join(f"{name} {getattr(options, name)}" for name in assumed)
        notes.append(f"assumed, as neither file says otherwise: {told}")
    return options, notes


def _refuse_misspelled(given: GivenOptions, unknown: Iterable[str], wanted: Collection[str]) -> None:
    """Raises ConfigError for an unknown option that is nearly one of those wanted, which are not given."""
    for name in unknown:
        if near := get_close_matches(name, sorted(wanted), n=1, cutoff=NEARLY):
            raise ConfigError(f"{given.files[name]}: unknown option {name!r}; is {near[0]!r} meant?")


def _lost(given: GivenOptions, ignored: Collection[str]) -> list[str]:
    return [name for name in given.unresolved if name not in ignored]


def _checked(kind: type, given: GivenOptions, free: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The free options as their fields' types."""
    hints = get_type_hints(kind)
    checked = {}
    for name, value in free.items():
        choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        if choices and value not in choices:
            raise given.refuse(name, f"is {value!r}, not one of {', '.join(map(str, choices))}")
        try:
            kinds = (hints[name], *get_args(hints[name]))
            if (bool not in kinds) if isinstance(value, bool) else hints[name] is bool:  # neither stands for the other
                raise ValueError
            checked[name] = TypeAdapter(hints[name]).validate_python(value)
        except (ValidationError, ValueError):
            raise given.refuse(name, f"cannot be {value!r}") from None
    return checked


def unpadded_vocabulary(given: GivenOptions, rows: int, key: str) -> int:
    """The vocabulary without padding: the options' where they say it, else all rows of the embedding `key`.

    Raises ConfigError when vocab_size, rounded up to pad_vocab_size_multiple, is not `rows`.
    """
    vocab, multiple = given.values.get("vocab_size", rows), given.values.get("pad_vocab_size_multiple", 1)
    if not all(isinstance(n, int) and n > 0 for n in (vocab, multiple)):
        file = given.files.get("vocab_size") or given.files["pad_vocab_size_multiple"]
        raise ConfigError(f"{file}: the options vocab_size and pad_vocab_size_multiple must be positive integers")
    if -(-vocab // multiple) * multiple != rows:
        raise given.refuse(
            "vocab_size",
            f"is {vocab} (pad_vocab_size_multiple {multiple}), but {key!r} in the checkpoint has {rows} rows",
        )
    return int(vocab)
