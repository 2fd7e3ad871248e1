"""Files with which onnxruntime-genai runs a built directory as it is.

genai runs a line of graphs for every call and keeps two tensors a layer from call to call, conv_state and
recurrent_state, of one shape for all layers. States that have this form are its own; any others are packed, whatever
they are, attention's and counters included:

    its two tensors ─genai_unpack─▶ states ─prefill or step─▶ states' ─genai_pack─▶ its two tensors

Two small graphs without weights do that, and cost four copies of the states a token. genai writes successors over the
states they came from; both forms read a state before that. With more than one row it runs prefill for every token, and
fills up short prompts behind their ends, which only graphs with an attention_mask get right.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lhcompile.package.genai_states import OWN, PACKED, Names, are_own, numbers, pack, unpack
from lhcompile.package.manifest import Graphs, Manifest, Target

__all__ = ["CONFIG_NAME", "GenaiFiles", "genai_files"]

CONFIG_NAME = "genai_config.json"
UNPACK_NAME, PACK_NAME = "genai_unpack.onnx", "genai_pack.onnx"
TOKENIZER_NAME, TOKENIZER_CONFIG_NAME = "tokenizer.json", "tokenizer_config.json"
MASK = "attention_mask"
MOST_COUNTED = 2**24
"""Up to here whole numbers are exact in float32, in which states are packed."""
ENDLESS = 2**31 - 1
"""The context of a model whose states take any number of tokens."""
PROVIDERS: dict[Target, list[dict[str, dict[str, str]]]] = {"cpu": [], "cuda": [{"cuda": {}}]}
"""The targets whose graphs genai runs, with the execution providers it is to use."""
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "<|eot_id|>")
"""Special tokens that end a text, by the names that tokenizers give them."""


@dataclass(frozen=True)
class GenaiFiles:
    """Files by name, none where genai cannot run the model; notes: why not, or what to know, one line each."""

    files: dict[str, bytes]
    notes: tuple[str, ...] = ()


def genai_files(manifest: Manifest, tokenizer: bytes | None = None, masked: Graphs | None = None) -> GenaiFiles:
    """genai_config.json, the tokenizer's files, and the graphs that pack states where those are needed.

    tokenizer: what tokenizer.json holds, where the manifest names one. Of several targets the first that genai has an
    execution provider for is taken.
    masked: graphs of that target with an attention_mask behind the tokens, to be run in place of its own, so that rows
    of a batch may begin with prompts of different lengths
    """
    target, graphs = _graphs(manifest)
    reason = _refusal(manifest, graphs)
    if reason is not None or target is None or graphs is None:
        return GenaiFiles({}, (f"onnxruntime-genai cannot run this build: {reason}",))
    files, notes, end = _tokenizer(manifest, tokenizer)
    names = OWN if are_own(manifest.states) else PACKED
    if names is PACKED:
        files |= {UNPACK_NAME: unpack(manifest.states), PACK_NAME: pack(manifest.states)}
    model = _model(manifest, target, names, end)
    model["decoder"]["pipeline"] = _pipeline(manifest, masked or graphs, names, [] if masked is None else [MASK])
    files[CONFIG_NAME] = _json({"model": model, "search": _search(manifest)})
    return GenaiFiles(files, notes)


def _graphs(manifest: Manifest) -> tuple[Target | None, Graphs | None]:
    every: dict[Target, Graphs] = {manifest.target: manifest.graphs} | (manifest.variants or {})
    return next(((target, graphs) for target, graphs in every.items() if target in PROVIDERS), (None, None))


def _refusal(manifest: Manifest, graphs: Graphs | None) -> str | None:
    """Why genai cannot run the directory; None where it can."""
    if manifest.inputs.tokens is None or manifest.outputs.logits is None:
        return "it takes features, not token ids"
    if graphs is None:
        return f"there are no graphs for {' or '.join(PROVIDERS)} in it"
    if graphs.step.file == graphs.prefill.file:
        return "its only graph takes one token a call"
    if sum(map(numbers, manifest.states)) < 2:
        return "it keeps fewer than two numbers from token to token"
    for state in manifest.states:
        if state.shape[0] != "batch" or not all(isinstance(size, int) and size > 0 for size in state.shape[1:]):
            return f"state {state.input} has the shape {state.shape}"
        if state.dtype in ("int64", "int32") and (state.capacity or ENDLESS) > MOST_COUNTED:
            return f"state {state.input} counts further than {MOST_COUNTED}"
    return None


# ---- genai_config.json ---------------------------------------------------------------------------------------------


def _model(manifest: Manifest, target: Target, names: Names, end: int) -> dict[str, Any]:
    caches = names.past[0].replace("conv_state", "cache")  # no state has this name: genai keeps no caches of attention
    return {
        "type": "decoder-pipeline",
        "vocab_size": manifest.model.vocab_size,
        "context_length": _capacity(manifest) or ENDLESS,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder": {
            "session_options": {"provider_options": PROVIDERS[target]},
            "inputs": {
                "input_ids": manifest.inputs.tokens,
                "attention_mask": MASK,
                "past_conv_names": names.past[0],
                "past_recurrent_names": names.past[1],
                "past_key_names": caches,
                "past_value_names": caches,
            },
            "outputs": {
                "logits": manifest.outputs.logits,
                "present_conv_names": names.present[0],
                "present_recurrent_names": names.present[1],
            },
        },
    }


def _pipeline(manifest: Manifest, graphs: Graphs, names: Names, mask: list[str]) -> list[dict[str, Any]]:
    """The graphs in the order in which they run; prefill for prompts, step for one token of one row."""
    old, new = [state.input for state in manifest.states], [state.output for state in manifest.states]
    reads, says = [manifest.inputs.tokens, *mask, *old], [manifest.outputs.logits, *new]
    line = [
        _run("prefill", graphs.prefill.file, reads, says, step=False),
        _run("step", graphs.step.file, reads, says, prompt=False),
    ]
    if names is OWN:
        return line
    first = _run("unpack", UNPACK_NAME, [name % 0 for name in names.past], old)
    last = _run("pack", PACK_NAME, new, [name % 0 for name in names.present])
    return [first, *line, last]


def _run(
    name: str, file: str, reads: list[Any], says: list[Any], prompt: bool = True, step: bool = True
) -> dict[str, Any]:
    graph = {"filename": file, "inputs": reads, "outputs": says, "run_on_prompt": prompt, "run_on_token_gen": step}
    return {name: graph}


def _search(manifest: Manifest) -> dict[str, Any]:
    """Greedy, up to the context that the model was made for; callers may ask for more where the states take it."""
    length = min(manifest.model.context_length, _capacity(manifest) or ENDLESS)
    return {"max_length": length, "do_sample": False, "num_beams": 1, "past_present_share_buffer": False}


def _capacity(manifest: Manifest) -> int | None:
    return min((state.capacity for state in manifest.states if state.capacity is not None), default=None)


# ---- tokenizer -----------------------------------------------------------------------------------------------------


def _tokenizer(manifest: Manifest, given: bytes | None) -> tuple[dict[str, bytes], tuple[str, ...], int]:
    """Files, notes, and the token that ends a text: genai must have one, and stops at it."""
    vocabulary = manifest.model.vocab_size or 1
    kind = None if manifest.tokenizer is None else manifest.tokenizer.kind
    if kind == "bytes":
        files = {TOKENIZER_NAME: _json(_byte_tokenizer()), TOKENIZER_CONFIG_NAME: _gpt2(space=False)}
        return files, ("onnxruntime-genai ends a text at byte 0",), 0
    if given is None:
        end = vocabulary - 1
        return {}, (f"onnxruntime-genai ends a text at id {end}: the build has no tokenizer, it takes ids",), end
    content = json.loads(given)
    ends = [token["id"] for token in content.get("added_tokens") or [] if token["content"] in ENDS]
    end = next((one for one in ends if one < vocabulary), vocabulary - 1)
    notes = [] if end in ends else [f"onnxruntime-genai ends a text at id {end}: the tokenizer names no other"]
    if not _is_read_alike(content):
        notes.append("onnxruntime-genai takes ids: it reads this kind of tokenizer.json differently, or not at all")
        return {}, tuple(notes), end
    return {TOKENIZER_CONFIG_NAME: _gpt2(content["pre_tokenizer"]["add_prefix_space"])}, tuple(notes), end


def _is_read_alike(content: dict[str, Any]) -> bool:
    """Whether genai's GPT2Tokenizer finds the ids that the file means: it always cuts text as GPT-2 does."""
    before, after = content.get("pre_tokenizer") or {}, content.get("post_processor") or {"type": "ByteLevel"}
    cuts = before.get("type") == "ByteLevel" and before.get("use_regex", True)
    plain = content.get("normalizer") is None and after["type"] == "ByteLevel"
    return bool(content["model"].get("type") == "BPE" and cuts and plain)


def _gpt2(space: bool) -> bytes:
    """tokenizer_config.json; space: text is given one in front"""
    return _json({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": space, "clean_up_tokenization_spaces": False})


def _byte_tokenizer() -> dict[str, Any]:
    """One token a byte, under the character that stands for it in byte-level vocabularies: its own where it is
    printable, else the next free one from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    characters = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": {character: byte for byte, character in enumerate(characters)}, "merges": []},
    }


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
