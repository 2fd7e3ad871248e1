"""Session: one stream (or a batch of streams) of a built model."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lhruntime.errors import ArgumentError, SnapshotError
from lhruntime.inputs import as_ids, as_sequence, as_single, check_count
from lhruntime.manifest import Manifest
from lhruntime.model import LoadedModel, Provider, load_model
from lhruntime.runner import Runner
from lhruntime.sampling import Sampler, row_generators
from lhruntime.snapshot import Snapshot, pack, unpack
from lhruntime.tokenizer import ByteTokenizer, IdsOnly, tokenizer_for

__all__ = ["DEFAULT_CHUNK", "Session"]

DEFAULT_CHUNK = 1024

Array = np.ndarray[Any, np.dtype[Any]]


class Session:
    """A model with its states, which remember everything consumed so far.

    tail is () for a token model and (channels,) for a model of continuous signals; width is the vocabulary
    or the number of output channels. A session is for one thread at a time; forks are independent.
    """

    def __init__(self, model: LoadedModel, batch: int) -> None:
        """Use `Session.load`."""
        self._model = model
        self._batch = batch
        self._runner = Runner(model, batch)
        self._position = 0
        self._tokenizer = tokenizer_for(model.manifest)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        target: str | None = None,
        batch: int = 1,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        verify: bool = True,
        share_weights: bool = False,
        operators: str | os.PathLike[str] | None = None,
    ) -> Session:
        """Open a built directory with all states zero.

        target:    the graphs to run, of those the directory was built with; the first if None
        batch:     how many streams run side by side
        providers: ONNX Runtime execution providers, the CPU if None; on CUDA the states stay on the device, and
                   products of float32 keep their precision unless the provider's option use_tf32 is "1"
        threads:   intra-op threads of each graph; ONNX Runtime decides if None
        verify:    compare size and sha256 of every listed file with the manifest first
        share_weights: both graphs read weights that lie in a file of their own where they are mapped, one copy
                   in memory, where otherwise each graph packs its own; a step takes longer (1.3 times, 125 million
                   parameters). On the CPU only.
        operators: the library of lhcompile's own operators, built for this machine. Without it the graphs that name
                   them run through the standard operators they are made of

        Raises FormatError if the directory is incomplete, altered or contradicts its manifest,
        ArgumentError for an option that cannot be had.
        """
        batch = check_count("batch", batch)
        model = load_model(
            directory,
            target=target,
            batch=batch,
            providers=providers,
            threads=threads,
            verify=verify,
            share_weights=share_weights,
            operators=operators,
        )
        return cls(model, batch)

    @property
    def manifest(self) -> Manifest:
        """What the built directory says about itself."""
        return self._model.manifest

    @property
    def tokenizer(self) -> ByteTokenizer | IdsOnly:
        """Text to ids and back, if the model is byte-level."""
        return self._tokenizer

    @property
    def batch(self) -> int:
        """How many streams run side by side."""
        return self._batch

    @property
    def tail(self) -> tuple[int, ...]:
        """Axes of the input behind batch and seq: () for tokens, (channels,) for features."""
        return self._model.input_tail

    @property
    def piece(self) -> int | None:
        """How many positions a call of the prefill graph takes; None where it takes any number."""
        return self._model.piece

    @property
    def position(self) -> int:
        """How many positions each stream has consumed."""
        return self._position

    @property
    def room(self) -> int | None:
        """How many more positions each stream can consume; None where the states take any number."""
        capacity = self.manifest.capacity
        return None if capacity is None else capacity - self._position

    def states(self) -> dict[str, Array]:
        """Copies of the present states by the name of the graph input that reads them."""
        names = [spec.input for spec in self.manifest.states]
        return dict(zip(names, self._runner.read(), strict=True))

    def reset(self) -> None:
        """Back to the beginning: states zero, position 0."""
        self._runner.zero()
        self._position = 0

    def prefill(self, tokens: ArrayLike, *, last_only: bool = False, chunk: int = DEFAULT_CHUNK) -> Array:
        """Consume tokens [batch, seq, *tail] ([seq, *tail] will do at batch 1), seq ≥ 1.

        Returns float32 [batch, seq, width], or with last_only the last position [batch, width]. A long
        prompt is cut into calls of at most `chunk` positions; with last_only memory does not grow with seq.

        Raises ArgumentError for an empty prompt, a wrong batch, axis or dtype, a token id out of range, or
        more positions than there is room for; nothing is consumed then.
        """
        chunk = check_count("chunk", chunk)
        values = as_sequence(tokens, self._model, self._batch)
        length = values.shape[1]
        self._check_room(length)
        sizes = self._pieces(length, chunk)
        if last_only:
            start = 0
            for size in sizes:
                last = self._consume(values[:, start : start + size])[:, -1]
                start += size
            return np.array(last, np.float32)
        if len(sizes) == 1:
            # the output of a single position is the runner's buffer, any other is already the caller's
            return self._consume(values).astype(np.float32, copy=length == 1)
        result, start = np.empty((self._batch, length, self._model.width), np.float32), 0
        for size in sizes:
            result[:, start : start + size] = self._consume(values[:, start : start + size])
            start += size
        return result

    def _pieces(self, length: int, chunk: int) -> list[int]:
        """Sizes of the calls that consume so many positions: single ones where prefill's fixed size leaves a rest."""
        piece = self._model.piece
        if piece is not None:
            return [piece] * (length // piece) + [1] * (length % piece)
        return [min(chunk, length - start) for start in range(0, length, chunk)]

    def step(self, tokens: ArrayLike) -> Array:
        """Consume one position, tokens [batch, *tail]; returns float32 [batch, width].

        Raises ArgumentError as prefill does.
        """
        self._check_room(1)
        self._runner.step_input[:, 0] = as_single(tokens, self._model, self._batch)
        output = self._runner.step()[:, 0].astype(np.float32)
        self._position += 1
        return output

    def generate(
        self,
        prompt: ArrayLike,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_tokens: Collection[int] = (),
        chunk: int = DEFAULT_CHUNK,
    ) -> Iterator[Array]:
        """Consume the prompt [batch, seq] after what came before, then yield int64 [batch] token by token.

        temperature, top_k, top_p: see Sampler. seed: the tokens of row r depend on (seed, r) and its own
        logits alone. A row that meets one of stop_tokens repeats it; when all rows have stopped, so does
        the iteration, the stop tokens included. **A yielded token has been consumed**: whenever the
        iteration ends, the session stands behind the last yielded token. Do not advance it in between.

        Raises ArgumentError at once for a bad argument, if there is no room for the prompt and max_new_tokens
        more, or if the model has no tokens.
        """
        if self.manifest.vocab_size is None:
            raise ArgumentError("this model maps features to values: there are no tokens to generate")
        check_count("max_new_tokens", max_new_tokens)
        check_count("chunk", chunk)
        sampler = Sampler(temperature, top_k, top_p)
        generators = row_generators(seed, self._batch)
        tokens = as_sequence(prompt, self._model, self._batch)
        stop = as_ids("stop_tokens", stop_tokens, self.manifest.vocab_size)
        self._check_room(tokens.shape[1] + max_new_tokens)
        return self._stream(tokens, max_new_tokens, sampler, generators, stop, chunk)

    def snapshot(self, path: str | os.PathLike[str] | None = None) -> bytes:
        """States and position as bytes; also written to `path`, whole or not at all, if one is given."""
        states = self._runner.read()
        content = Snapshot(self._model.fingerprint, self._position, self._batch, states)
        data = pack(content, self.manifest.states)
        if path is not None:
            beside = Path(f"{os.fspath(path)}.{os.getpid()}.partial")
            try:
                beside.write_bytes(data)
                beside.replace(path)
            finally:
                beside.unlink(missing_ok=True)
        return data

    def restore(self, source: str | os.PathLike[str] | bytes) -> None:
        """Continue from a snapshot, given as a path or as bytes.

        Raises SnapshotError if it cannot be read, is damaged, or is of another model or batch; the
        session is left as it was.
        """
        data = source if isinstance(source, bytes) else _read(source)
        content = unpack(data, self._model.fingerprint, self._batch, self.manifest.states)
        self._runner.write(content.states)
        self._position = content.position

    def fork(self) -> Session:
        """A second session at the same point: the graphs and weights are shared, the states are its own."""
        other = Session(self._model, self._batch)
        other._runner.write(self._runner.read())
        other._position = self._position
        return other

    def _check_room(self, count: int) -> None:
        if self.room is not None and count > self.room:
            raise ArgumentError(
                f"the model's states have room for {self.manifest.capacity} positions, {self._position} are taken: "
                f"{count} more do not fit; reset the session, or build with a larger --max-context"
            )

    def _consume(self, values: Array) -> Array:
        """values [batch, seq, *tail] → [batch, seq, width], valid until the next call."""
        length = values.shape[1]
        if length == 1:
            self._runner.step_input[:] = values
            output = self._runner.step()
        else:
            output = np.empty((self._batch, length, self._model.width), self._model.output_dtype)
            self._runner.prefill(np.ascontiguousarray(values), output)
        self._position += length
        return output

    def _stream(
        self,
        prompt: Array,
        max_new_tokens: int,
        sampler: Sampler,
        generators: list[np.random.Generator],
        stop: Array,
        chunk: int,
    ) -> Iterator[Array]:
        logits = self.prefill(prompt, last_only=True, chunk=chunk)
        tokens = np.zeros(self._batch, np.int64)
        stopped = np.zeros(self._batch, bool)
        for _ in range(max_new_tokens):
            tokens = np.where(stopped, tokens, sampler.sample(logits, generators))
            stopped = np.isin(tokens, stop)
            logits = self.step(tokens)
            yield tokens.copy()
            if stopped.all():
                return


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SnapshotError(f"{os.fspath(path)}: cannot be read ({error.strerror})") from error
