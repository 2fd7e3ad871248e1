"""The verbs of the command line as functions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhruntime import Session

from lhcompile import verify
from lhcompile.artifacts import Program, module_path
from lhcompile.calibrate import calibrate
from lhcompile.capture import capture
from lhcompile.config import CalibrationConfig, LoadConfig, build_config, validated
from lhcompile.errors import ConfigError, ParityError
from lhcompile.load import load
from lhcompile.package import Manifest, verify_files
from lhcompile.pipeline import Progress
from lhcompile.pipeline import build as _build
from lhcompile.recognize import recognize
from lhcompile.verify.model import Report, StageFidelity

__all__ = [
    "Bench",
    "Inspection",
    "LayerSummary",
    "Verification",
    "bench",
    "build",
    "generate",
    "inspect",
    "verify_directory",
]


def build(model: str, progress: Progress | None = None, command: str = "lhcompile.build", **options: Any) -> Report:
    """Compile `model` into the directory `output`; options are the fields of `lhcompile.config`'s classes.

    Raises an LhcompileError for everything a user can mend; the destination is then untouched.
    """
    return _build(str(model), build_config(**options), progress, command)


@dataclass(frozen=True)
class LayerSummary:
    """One operator with memory: its module, kind, filters, channels, taps and bytes of state per sequence if exact."""

    module: str
    kind: str
    filters: int
    channels: int
    taps: int
    exact_bytes: int


@dataclass(frozen=True)
class Inspection:
    """What was found in a model, without building it."""

    family: str
    parameters: int
    context_length: int
    vocab_size: int
    config: dict[str, Any]
    notes: tuple[str, ...]
    layers: tuple[LayerSummary, ...]


def inspect(model: str, **options: Any) -> Inspection | Manifest:
    """The manifest of a built directory, or what a model is and which operators in it have memory.

    options: the fields of LoadConfig.
    """
    if (Path(model) / "manifest.json").is_file():
        return verify_files(Path(model))
    loaded = load(model, **dict(validated(LoadConfig, options)))
    program = recognize(capture(loaded))
    return Inspection(
        family=loaded.family,
        parameters=loaded.parameters,
        context_length=program.context,
        vocab_size=program.vocabulary,
        config=loaded.config,
        notes=loaded.notes,
        layers=tuple(_layers(program)),
    )


def _layers(program: Program) -> Iterator[LayerSummary]:
    for node in program.graph.graph.nodes:
        if node.target in (torch.ops.lhc.fir.default, torch.ops.lhc.long_conv.default):
            weight = getattr(program.graph, str(node.args[1].target))
            channels = node.args[0].meta["sizes"][2].offset
            kind = "short convolution" if node.target == torch.ops.lhc.fir.default else "long convolution"
            taps = weight.shape[-1]
            yield LayerSummary(module_path(node), kind, weight.shape[0], channels, taps, 4 * channels * (taps - 1))


@dataclass(frozen=True)
class Verification:
    """What was checked of a built directory: files, cuts, and its figures on text.

    stages: loss of the directory, and of the source model when one was given
    """

    files: int
    cuts: int
    stages: tuple[StageFidelity, ...] = ()


def verify_directory(
    directory: str | Path,
    against: str | None = None,
    calibration: Path | None = None,
    tokenizer: Path | None = None,
    sequences: int = 16,
    say: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> Verification:
    """Check a built directory: checksums, every way of cutting a sequence, and with `against` the source model.

    against: the model it was built from, loaded with `options` (fields of LoadConfig); its logits and loss are
    compared on `calibration` text, or on random tokens where none is given. say: told what is going on.
    Raises PackageError for a damaged directory and ParityError when a gate is not met; the logits of a build whose
    convolutions are all kept must be the source's own.
    """
    path = Path(directory)
    say("comparing checksums")
    manifest = verify_files(path)
    model = verify.SessionModel(lambda batch: Session.load(path, batch=batch))
    vocabulary, context = manifest.model.vocab_size, manifest.model.context_length
    if vocabulary is None:
        raise ConfigError(f"{directory} is a model of continuous signals; verify takes token models")
    source = None if against is None else load(against, **dict(validated(LoadConfig, options)))
    if source is not None and source.parameters != manifest.model.parameters:
        built = f"{directory} was built from one of {manifest.model.parameters}"
        raise ConfigError(f"{against} is another model: it has {source.parameters} parameters, {built}")
    if calibration is None:
        rows = torch.randint(0, vocabulary, (sequences, min(256, context)), generator=torch.Generator().manual_seed(0))
    else:
        if source is None:
            raise ConfigError("text is for comparing with the source model: name it with --against")
        say("reading the text")
        values = {"calibration": calibration, "tokenizer": tokenizer, "sequences": sequences}
        config = validated(CalibrationConfig, values)
        program = recognize(capture(source))
        rows = calibrate(config, program, source.parameters, lambda: program).heldout
    say("feeding the graphs in every cut")
    few = rows[:3, : min(160, rows.shape[1])]
    cuts = verify.check_cuts(model, few)
    if source is None:
        return Verification(len(manifest.files), cuts)
    if not manifest.distillation:
        verify.check_stage(model, source.module, few, verify.ONNX)
    say(f"measuring on {rows.numel()} tokens")
    stages = tuple(verify.fidelity(source.module, {"onnx": model}, rows))
    if not np.isfinite(stages[-1].loss or 0.0):
        raise ParityError("the loss of the built model is not finite")
    return Verification(len(manifest.files), cuts, stages)


def generate(
    directory: str | Path,
    prompt: str,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Text after a prompt, piece by piece as it is generated, through plain onnxruntime.

    A model without a tokenizer takes token ids as its prompt, "1 2 3", and gives ids.
    Raises at once: ArgumentError of lhruntime for settings out of range, ConfigError for a prompt of no ids.
    """
    path = Path(directory)
    session = Session.load(path)
    encode, stream = _text(path, session)
    new = session.generate(encode(prompt), max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    return stream(int(tokens[0]) for tokens in new)


Encode = Callable[[str], np.ndarray[Any, np.dtype[np.int64]]]
Decode = Callable[[Iterable[int]], Iterator[str]]


def _text(path: Path, session: Session) -> tuple[Encode, Decode]:
    """(text → ids, ids → pieces of text) for a directory's tokenizer."""
    file = session.manifest.tokenizer.get("file")
    if session.manifest.tokenizer["kind"] == "none":
        return _ids, lambda ids: (f" {token}" for token in ids)
    if file is None:
        tokenizer = session.tokenizer

        def pieces(ids: Iterable[int]) -> Iterator[str]:
            decoder = tokenizer.stream()
            yield from (decoder.feed(token) for token in ids)
            yield decoder.finish()

        return tokenizer.encode, pieces
    from tokenizers import Tokenizer

    loaded = Tokenizer.from_file(str(path / file))

    def words(ids: Iterable[int]) -> Iterator[str]:
        seen: list[int] = []
        text = shown = ""
        for token in ids:
            seen.append(token)
            text = loaded.decode(seen)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the rest of a character may follow
                yield text[len(shown) :]
                shown = text
        yield text[len(shown) :]

    return (lambda text: np.array(loaded.encode(text).ids, np.int64)), words


def _ids(text: str) -> np.ndarray[Any, np.dtype[np.int64]]:
    try:
        return np.array([int(word) for word in text.split()], np.int64)
    except (ValueError, OverflowError):
        raise ConfigError("the model has no tokenizer: give token ids as the prompt, as in --prompt '1 2 3'") from None


@dataclass(frozen=True)
class Bench:
    """Speed of a built directory on this machine.

    step_ms: median milliseconds a token, step_ms_p90: its 90th percentile; tokens_per_second: batch / median
    prefill_tokens_per_second: of `prefill_tokens` at once; state_bytes: per sequence
    """

    batch: int
    threads: int | None
    step_ms: float
    step_ms_p90: float
    tokens_per_second: float
    prefill_tokens: int
    prefill_tokens_per_second: float
    state_bytes: int
    file_bytes: dict[str, int]


def bench(
    directory: str | Path, batch: int = 1, steps: int = 200, prefill_tokens: int = 1024, threads: int | None = None
) -> Bench:
    """Measure step latency and prefill rate; medians over `steps` tokens and five prefills, after a warm-up."""
    session = Session.load(directory, batch=batch, threads=threads)
    vocabulary = int(session.manifest.vocab_size or 1)
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, vocabulary, (steps + 10, batch))
    durations = []
    for row in tokens:
        started = time.perf_counter()
        session.step(row)
        durations.append(time.perf_counter() - started)
    prompt = draw.integers(0, vocabulary, (batch, prefill_tokens))
    prefills = []
    for _ in range(6):
        session.reset()
        started = time.perf_counter()
        session.prefill(prompt, last_only=True, chunk=prefill_tokens)
        prefills.append(time.perf_counter() - started)
    step = float(np.median(durations[10:]))
    states = session.states()
    return Bench(
        batch=batch,
        threads=threads,
        step_ms=1e3 * step,
        step_ms_p90=1e3 * float(np.quantile(durations[10:], 0.9)),
        tokens_per_second=batch / step,
        prefill_tokens=prefill_tokens,
        prefill_tokens_per_second=batch * prefill_tokens / float(np.median(prefills[1:])),
        state_bytes=sum(state.nbytes for state in states.values()) // batch,
        file_bytes={file.name: file.stat().st_size for file in sorted(Path(directory).glob("*.onnx*"))},
    )
