"""onnxruntime-genai runs built directories as they are, and says what lhruntime says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime_genai as og
import pytest
from commands import done
from lhruntime import Session
from models import VOCAB, WIDTH, Hyena, tiny
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from lhcompile.artifacts import Lowered
from lhcompile.capture import capture
from lhcompile.lower import lower, write_graphs
from lhcompile.lower.masked import masked
from lhcompile.package import Manifest, Source, package, read_manifest
from lhcompile.package.genai import CONFIG_NAME, GenaiFiles, genai_files
from lhcompile.package.genai_states import pack, unpack
from lhcompile.package.manifest import Graphs, State
from lhcompile.recognize import recognize
from lhcompile.streamify import streamify

Ids = NDArray[np.int64]
TOLERANCE = 1e-5
"""Largest |Δlogit| at logits of unit scale: a prompt in pieces is added up in another order."""
NEW = 12
FORMS = {
    "bytes": None,
    "one order": ("shared", "modal"),
    "mixed orders": ("per channel", "packed"),
    "hybrid": ("hybrid", "exact"),
}
"""A build of the tiny Hyena, whose layers have one state of one row each, and models of `built`."""
OWN = ["bytes", "one order"]


@pytest.fixture(scope="module")
def served(
    checkpoint: Path, built: Callable[[str, str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """served(name in FORMS): a directory with genai's files in it; tests must not change it."""
    made: dict[str, Path] = {}

    def get(form: str) -> Path:
        if form not in made:
            out = tmp_path_factory.mktemp("genai") / "out"
            if (model := FORMS[form]) is None:
                done("build", checkpoint, "-o", out, "--order", 1, "--sequences", 2)
            else:
                packaged(built(*model).lowered, VOCAB, out)
            added(out)
            made[form] = out
        return made[form]

    return get


def packaged(lowered: Lowered, vocabulary: int, out: Path, tokenizer: bytes | None = None) -> None:
    """The built directory of a model's graphs."""
    write_graphs({"step.onnx": lowered.step, "prefill.onnx": lowered.prefill}, out.parent)
    files: dict[str, Source] = {name: out.parent / name for name in ("step.onnx", "prefill.onnx")}
    kind = {"kind": "none"}
    if tokenizer is not None:
        kind, files["tokenizer.json"] = {"kind": "tokenizers", "file": "tokenizer.json"}, tokenizer
    states = [vars(state) | {"input": state.name, "shape": ["batch", *state.shape]} for state in lowered.states]
    for state in states:
        del state["name"], state["scales"]
    package(out, files, manifest_of(vocabulary, kind, states=states), force=False)


def manifest_of(vocabulary: int, tokenizer: dict[str, str], **change: Any) -> Manifest:
    """A manifest of one short convolution, or with other entries."""
    state = {"input": "a", "output": "b", "shape": ["batch", 2, 4], "dtype": "float32", "kind": "fir", "module": "m"}
    raw = {
        "lhcompile_version": "0",
        "target": "cpu",
        "model": {"family": "module", "vocab_size": vocabulary, "context_length": 32, "parameters": 1},
        "tokenizer": tokenizer,
        "graphs": {"step": {"file": "step.onnx"}, "prefill": {"file": "prefill.onnx"}},
        "inputs": {"tokens": "input_ids"},
        "outputs": {"logits": "logits"},
        "states": [state],
    }
    return Manifest.model_validate(raw | change)


def added(out: Path) -> GenaiFiles:
    """genai's files, written into a built directory."""
    manifest = read_manifest(out)
    named = manifest.tokenizer.file if manifest.tokenizer is not None else None
    made = genai_files(manifest, (out / named).read_bytes() if named else None)
    for name, content in made.files.items():
        (out / name).write_bytes(content)
    return made


def generator(out: Path, batch: int, length: int) -> Any:
    parameters = og.GeneratorParams(model := og.Model(str(out)))
    parameters.set_search_options(batch_size=batch, max_length=length)
    return og.Generator(model, parameters)


def greedy(running: Any, count: int) -> Ids:
    """[batch, count] tokens, fewer where every row has come to its end."""
    tokens = []
    while len(tokens) < count and not running.is_done():
        running.generate_next_token()
        tokens.append(running.get_next_tokens().copy())
    return np.stack(tokens, 1)


def end_of(out: Path) -> int:
    return int(json.loads((out / CONFIG_NAME).read_text())["model"]["eos_token_id"])


def prompt(out: Path, length: int, batch: int) -> Ids:
    """The same ids in every row, without the one that ends a text."""
    vocabulary = read_manifest(out).model.vocab_size
    ids = np.random.default_rng(length).integers(0, vocabulary, length)
    return np.tile(np.where(ids == end_of(out), 1, ids), (batch, 1))


# ---- tokens --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_greedy_tokens_are_those_of_the_runtime(served: Callable[[str], Path], form: str) -> None:
    out, count = served(form), 0
    for batch, length in product((1, 2), (1, 7, 19 if form == "hybrid" else 100)):
        ids = prompt(out, length, batch)
        session = Session.load(out, batch=batch, threads=1)
        expected = session.prefill(ids, last_only=True)
        running = generator(out, batch, length + NEW)
        running.append_tokens(ids.astype(np.int32))
        assert np.abs(running.get_logits().reshape(batch, -1) - expected).max() < TOLERANCE
        tokens = greedy(running, NEW)
        session.reset()
        truth = np.stack(list(session.generate(ids, NEW, temperature=0, stop_tokens=[end_of(out)])), 1)
        np.testing.assert_array_equal(tokens, truth)
        count += tokens.size
    assert count > 5 * NEW


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_in_pieces(served: Callable[[str], Path], form: str) -> None:
    """The second prefill starts from states that are not zero, in the buffers that it writes to."""
    out = served(form)
    ids = prompt(out, 29, 1).astype(np.int32)
    expected = Session.load(out, threads=1).prefill(ids, last_only=True)
    running = generator(out, 1, 30)
    for piece in np.split(ids, [5, 6], axis=1):
        running.append_tokens(piece)
    assert np.abs(running.get_logits().reshape(1, -1) - expected).max() < TOLERANCE


def test_states_are_packed_where_they_must_be(served: Callable[[str], Path]) -> None:
    for form in FORMS:
        assert (served(form) / "genai_pack.onnx").exists() == (form not in OWN), form


def test_more_than_there_is_room_for_is_refused(served: Callable[[str], Path]) -> None:
    with pytest.raises(RuntimeError, match=r"max_length \(33\) cannot be greater than model context_length \(32\)"):
        generator(served("hybrid"), 1, 33)


def test_the_first_target_that_genai_runs() -> None:
    graphs = {kind: {"file": f"{kind}.cuda.onnx"} for kind in ("step", "prefill")}
    made = genai_files(manifest_of(256, {"kind": "bytes"}, target="web", variants={"cuda": graphs}))
    decoder = json.loads(made.files[CONFIG_NAME])["model"]["decoder"]
    files = [graph["filename"] for stage in decoder["pipeline"] for graph in stage.values()]
    assert files == ["genai_unpack.onnx", "prefill.cuda.onnx", "step.cuda.onnx", "genai_pack.onnx"]
    assert decoder["session_options"] == {"provider_options": [{"cuda": {}}]}


@pytest.mark.parametrize("form", ["one order", "mixed orders", "hybrid"])
def test_prompts_of_different_lengths(form: str, built: Callable[[str, str], Any], tmp_path: Path) -> None:
    """Every row of a batch says what it says alone, though genai fills short prompts up with the end of text."""
    out, lowered, lengths = tmp_path / "out", built(*FORMS[form]).lowered, (13, 1, 8)
    packaged(lowered, VOCAB, out)
    graphs = masked(lowered)
    write_graphs({"step.masked.onnx": graphs.step, "prefill.masked.onnx": graphs.prefill}, out)
    names = {kind: {"file": f"{kind}.masked.onnx"} for kind in ("step", "prefill")}
    for name, content in genai_files(read_manifest(out), masked=Graphs.model_validate(names)).files.items():
        (out / name).write_bytes(content)
    ids, end = prompt(out, 13, 3), end_of(out)
    for row, length in enumerate(lengths):
        ids[row, length:] = end
    running = generator(out, 3, 13 + NEW)
    running.append_tokens(ids.astype(np.int32))
    first = running.get_logits().reshape(3, -1).copy()
    tokens, told = greedy(running, NEW), 0
    for row, length in enumerate(lengths):
        session = Session.load(out, threads=1)
        alone = session.prefill(ids[row : row + 1, :length], last_only=True)
        np.testing.assert_allclose(first[row], alone[0], atol=TOLERANCE)
        session.reset()
        said = session.generate(ids[row : row + 1, :length], NEW, temperature=0, stop_tokens=[end])
        truth = np.concatenate(list(said))[: tokens.shape[1]]
        np.testing.assert_array_equal(tokens[row, : len(truth)], truth)
        assert (tokens[row, len(truth) :] == end).all()
        told += len(truth)
    assert told > NEW


def test_without_a_mask_the_end_of_a_short_prompt_is_heard(served: Callable[[str], Path]) -> None:
    """Why graphs with a mask are there."""
    out = served("one order")
    ids = prompt(out, 13, 2)
    ids[1, 5:] = end_of(out)
    running = generator(out, 2, 20)
    running.append_tokens(ids.astype(np.int32))
    tokens = greedy(running, 1)
    logits, session = running.get_logits().reshape(2, -1), Session.load(out, threads=1)
    differences = []
    for row, length in enumerate((13, 5)):
        session.reset()
        alone = session.prefill(np.append(ids[row, :length], tokens[row])[None], last_only=True)
        differences.append(np.abs(logits[row] - alone[0]).max())
    assert differences[0] < TOLERANCE
    assert differences[1] > 100 * TOLERANCE


# ---- packing -------------------------------------------------------------------------------------------------------


def test_packing_and_back(tmp_path: Path) -> None:
    states = [
        State(input="a", output="a'", shape=["batch", 2, 3], dtype="float32", kind="fir", module="m"),
        State(input="b", output="b'", shape=["batch", 1], dtype="int64", kind="position", module="m"),
        State(input="c", output="c'", shape=["batch", 1, 2, 2], dtype="float16", kind="modal", module="m"),
    ]
    generator = np.random.default_rng(0)
    values = [(100 * generator.standard_normal((2, *s.shape[1:]))).astype(s.dtype) for s in states]
    packer, unpacker = (onnx.reference.ReferenceEvaluator(onnx.load_from_string(f(states))) for f in (pack, unpack))
    conv, recurrent = packer.run(None, dict(zip(packer.input_names, values, strict=True)))
    assert (conv.shape, recurrent.shape, packer.input_names) == ((2, 1, 10), (2, 1, 1), ["a'", "b'", "c'"])
    back = unpacker.run(None, dict(zip(unpacker.input_names, (conv, recurrent), strict=True)))
    assert unpacker.output_names == ["a", "b", "c"]
    for value, same in zip(values, back, strict=True):
        assert same.dtype == value.dtype
        np.testing.assert_array_equal(same, value)


# ---- text ----------------------------------------------------------------------------------------------------------


def test_bytes(served: Callable[[str], Path]) -> None:
    tokenizer = og.Tokenizer(og.Model(str(served("bytes"))))
    text = "héllo  wörld\n\t 你好 🙂 don't  "
    ids = tokenizer.encode(text)
    assert bytes(ids.tolist()) == text.encode()
    assert tokenizer.decode(ids) == text
    every = "".join(map(chr, [*range(1, 0xD800), 0x10FFFF]))
    assert bytes(tokenizer.encode(every).tolist()) == every.encode()


def trained(use_regex: bool) -> Tokenizer:
    """300 tokens of byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["def f(x, y):\n    return x + y  # don't\n"] * 50, trainer)
    return tokenizer


def test_a_tokenizer_of_ones_own(tmp_path: Path) -> None:
    tokenizer, out, model = trained(use_regex=True), tmp_path / "out", tiny(Hyena)
    model.module.embed, model.module.head = nn.Embedding(304, WIDTH), nn.Linear(WIDTH, 304)
    packaged(lower(streamify(recognize(capture(model))), "cpu"), 304, out, tokenizer.to_str().encode())
    assert added(out).notes == ()
    theirs = og.Tokenizer(og.Model(str(out)))
    for words in ("def g(x, yy):\n\treturn  12345 * x", "a<|endoftext|>b", "don't  \n 你好 🙂"):
        ids = theirs.encode(words)
        assert ids.tolist() == tokenizer.encode(words).ids
    ids = ids[None].astype(np.int64)
    running = generator(out, 1, ids.size + NEW)
    running.append_tokens(ids.astype(np.int32))
    truth = np.stack(list(Session.load(out).generate(ids, NEW, temperature=0, stop_tokens=[0])), 1)
    np.testing.assert_array_equal(greedy(running, NEW), truth)


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        ({}, ()),
        ({"normalizer": {"type": "NFC"}}, ("takes ids",)),
        ({"model": {"type": "WordLevel"}}, ("takes ids",)),
        ({"post_processor": {"type": "TemplateProcessing"}}, ("takes ids",)),
        ({"pre_tokenizer": None}, ("takes ids",)),
        ({"added_tokens": [{"id": 9, "content": "[MASK]"}]}, ("ends a text at id 303: the tokenizer names no other",)),
        ({"added_tokens": [{"id": 304, "content": "</s>"}]}, ("ends a text at id 303: the tokenizer names no other",)),
    ],
    ids=str,
)
def test_tokenizers_that_are_read_differently(change: dict[str, Any], notes: tuple[str, ...]) -> None:
    content = json.loads(trained(use_regex=True).to_str()) | change
    made = genai_files(manifest_of(304, {"kind": "tokenizers", "file": "tokenizer.json"}), json.dumps(content).encode())
    assert len(made.notes) == len(notes)
    assert all(part in note for part, note in zip(notes, made.notes, strict=True))
    assert ("tokenizer_config.json" in made.files) == ("takes ids" not in notes)
    assert CONFIG_NAME in made.files


def test_genai_always_cuts_as_gpt2_does(served: Callable[[str], Path], tmp_path: Path) -> None:
    """Why a tokenizer that does not is refused."""
    shutil.copytree(served("bytes"), tmp_path / "out")
    tokenizer = trained(use_regex=False)
    tokenizer.save(str(tmp_path / "out" / "tokenizer.json"))
    words = "def f(x, y):\n    return x"
    theirs = og.Tokenizer(og.Model(str(tmp_path / "out"))).encode(words)
    assert theirs.tolist() != tokenizer.encode(words).ids
    manifest = manifest_of(304, {"kind": "tokenizers", "file": "tokenizer.json"})
    assert "tokenizer_config.json" not in genai_files(manifest, tokenizer.to_str().encode()).files


# ---- refused -------------------------------------------------------------------------------------------------------


STATE = {"input": "a", "output": "b", "dtype": "int64", "kind": "position", "module": "m"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"inputs": {"features": "x"}, "outputs": {"values": "y"}}, "it takes features, not token ids"),
        ({"target": "web"}, "there are no graphs for cpu or cuda in it"),
        ({"graphs": {kind: {"file": "step.onnx"} for kind in ("step", "prefill")}}, "its only graph takes one token"),
        ({"states": []}, "it keeps fewer than two numbers from token to token"),
        ({"states": [STATE | {"shape": [4, "batch"]}]}, r"state a has the shape \[4, 'batch'\]"),
        ({"states": [STATE | {"shape": ["batch", 4], "capacity": 2**24 + 1}]}, "state a counts further than 16777216"),
    ],
    ids=str,
)
def test_what_genai_cannot_run(change: dict[str, Any], reason: str) -> None:
    made = genai_files(manifest_of(256, {"kind": "bytes"}, **change))
    assert made.files == {}
    (note,) = made.notes
    assert re.fullmatch(f"onnxruntime-genai cannot run this build: {reason}.*", note)
