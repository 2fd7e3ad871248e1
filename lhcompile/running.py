"""The verbs that drive a built directory, `generate` and `bench`. They need neither torch nor onnx, and start fast."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lhruntime import Session

from lhcompile.errors import ConfigError

__all__ = ["Bench", "bench", "generate"]


def generate(
    directory: str | Path,
    prompt: str,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    target: str | None = None,
) -> Iterator[str]:
    """Text after a prompt, piece by piece as it is generated, through plain onnxruntime.

    target: whose graphs run, of those that were built; the first if None.

    A model without a tokenizer takes token ids as its prompt, "1 2 3", and gives ids.
    Raises at once: ArgumentError of lhruntime for settings out of range, ConfigError for a prompt of no ids or for a
    model of continuous signals.
    """
    path = Path(directory)
    session = Session.load(path, target=target)
    if session.manifest.features:
        raise ConfigError(f"{directory} is a model of continuous signals: it has no tokens to generate")
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
    prefill_tokens_per_second: of `prefill_tokens` at once, no more than the states have room for
    state_bytes: per sequence, states that grow with it as large as they can get
    A position of a continuous signal counts as a token.
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
    directory: str | Path,
    batch: int = 1,
    steps: int = 200,
    prefill_tokens: int = 1024,
    threads: int | None = None,
    target: str | None = None,
) -> Bench:
    """Measure step latency and prefill rate; medians over `steps` tokens and five prefills, after a warm-up."""
    session = Session.load(directory, target=target, batch=batch, threads=threads)
    draw = np.random.default_rng(0)
    durations = []
    for row in _inputs(session, draw, steps + 10, batch):
        if session.room == 0:
            session.reset()
        started = time.perf_counter()
        session.step(row)
        durations.append(time.perf_counter() - started)
    prefill_tokens = min(prefill_tokens, session.manifest.capacity or prefill_tokens)
    prompt = _inputs(session, draw, batch, prefill_tokens)
    prefills = []
    for _ in range(6):
        session.reset()
        started = time.perf_counter()
        session.prefill(prompt, last_only=True, chunk=prefill_tokens)
        prefills.append(time.perf_counter() - started)
    step = float(np.median(durations[10:]))
    states = session.states()
    graphs = [file for kind in ("*.onnx", "*.bin") for file in sorted(Path(directory).glob(kind))]
    return Bench(
        batch=batch,
        threads=threads,
        step_ms=1e3 * step,
        step_ms_p90=1e3 * float(np.quantile(durations[10:], 0.9)),
        tokens_per_second=batch / step,
        prefill_tokens=prefill_tokens,
        prefill_tokens_per_second=batch * prefill_tokens / float(np.median(prefills[1:])),
        state_bytes=sum(state.nbytes for state in states.values()) // batch,
        file_bytes={file.name: file.stat().st_size for file in graphs},
    )


def _inputs(session: Session, draw: np.random.Generator, *shape: int) -> np.ndarray[Any, np.dtype[Any]]:
    """Random token ids [*shape], or features [*shape, features]."""
    if session.manifest.vocab_size is None:
        return draw.standard_normal((*shape, *session.tail), np.float32)
    return draw.integers(0, session.manifest.vocab_size, shape)
