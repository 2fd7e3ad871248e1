"""Engine: many sequences at once, each of which comes and goes when it likes.

One thread of the engine's own does all the work, in rounds:

    1. slots of sequences that have ended are free again
    2. if a slot is free, the prompt that has waited longest gets it; one chunk of that prompt is read
    3. all running sequences advance, by one token or by as many as the loop takes at once

So sequences start in the order they were submitted, one prompt is read at a time, and those that run wait for no more
than one chunk of it between two advances. The prompt is read at batch 1 and its state put into the slot; its last token
goes through the step with the others, which gives the sequence's first token.

A row of a batch knows nothing of the others, and every step has the same batch, free slots included. So a sequence gets
the tokens that it gets alone in the engine, bit for bit, whatever runs beside it.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lhruntime.errors import ArgumentError, BusyError, EngineError
from lhruntime.handles import Handle
from lhruntime.inputs import as_ids, as_sequence, check_count
from lhruntime.loops import DeviceLoop, Loop, StepLoop, check_neighbours
from lhruntime.manifest import Manifest
from lhruntime.model import LoadedModel, Provider, load_model
from lhruntime.sampling import Sampler, row_generators
from lhruntime.slots import Prompts
from lhruntime.tokenizer import ByteTokenizer, IdsOnly, tokenizer_for

__all__ = ["Engine"]

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(eq=False)
class _Job:
    """A sequence as it was asked for, and how many tokens it has. prompt: int64 [1, seq]; limit: its tokens at most"""

    prompt: Array
    sampler: Sampler
    generator: np.random.Generator
    stop: frozenset[int]
    limit: int
    count: int = 0
    handle: Handle = field(default_factory=Handle)

    @property
    def ended(self) -> bool:
        return self.handle.reason is not None

    def take(self, tokens: Sequence[int]) -> None:
        """Those of the new tokens that belong to it go to the handle."""
        for index, token in enumerate(tokens, 1):
            self.count += 1
            if token in self.stop or self.count == self.limit:
                self.handle.give(tokens[:index], "stop" if token in self.stop else "length")
                return
        self.handle.give(tokens, None)


class Engine:
    """A model that runs up to `slots` sequences side by side. Any thread may call it. Close it after use."""

    def __init__(self, model: LoadedModel, loop: Loop, slots: int, chunk: int, queue: int | None) -> None:
        """Use `Engine.load`."""
        self._model, self._loop, self._prompts = model, loop, Prompts(model, chunk)
        self._limit = queue
        self._jobs: list[_Job | None] = [None] * slots
        self._taken = np.zeros(slots, np.int64)
        self._entering: tuple[int, _Job, Iterator[None]] | None = None
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed: EngineError | None = None
        self._driver = threading.Thread(target=self._drive, name="lhruntime-engine", daemon=True)
        self._driver.start()
        atexit.register(self.close)

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        *,
        slots: int = 8,
        target: str | None = None,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        operators: str | os.PathLike[str] | None = None,
        verify: bool = True,
        queue: int | None = None,
        chunk: int = 256,
        ahead: int = 1,
        cuda_graph: bool = True,
    ) -> Engine:
        """Open a built directory of a token model and start to serve.

        slots:      how many sequences run side by side; each step costs the same, however many do
        target, providers, threads, operators, verify: see Session.load
        queue:      how many sequences may wait for a slot, any number if None
        chunk:      how many positions of a prompt are read between two advances
        ahead:      steps between two looks at the tokens, where the directory's graph chooses them itself: fewer
                    waits, but tokens come in groups, and so do free slots
        cuda_graph: replay the steps from CUDA graphs, where the directory's graph chooses tokens and the device is one

        Raises FormatError and ArgumentError as Session.load does, and ArgumentError for a model whose sequences cannot
        run side by side.
        """
        slots, chunk, ahead = check_count("slots", slots), check_count("chunk", chunk), check_count("ahead", ahead)
        if queue is not None:
            check_count("queue", queue, 0)
        model = load_model(
            directory,
            target=target,
            batch=slots,
            providers=providers,
            threads=threads,
            verify=verify,
            operators=operators,
            choose=True,
            cuda_graph=cuda_graph,
        )
        vocabulary = model.manifest.vocab_size
        if vocabulary is None:
            raise ArgumentError("this model maps features to values: there are no tokens to generate")
        if not model.chooses and ahead > 1:
            raise ArgumentError(f"ahead is {ahead}, but the directory has no graph that chooses tokens: expected 1")
        loop: Loop = DeviceLoop(model, slots, ahead) if model.chooses else StepLoop(model, slots)
        check_neighbours(loop, slots, vocabulary)
        return cls(model, loop, slots, chunk, queue)

    @property
    def manifest(self) -> Manifest:
        """What the built directory says about itself."""
        return self._model.manifest

    @property
    def tokenizer(self) -> ByteTokenizer | IdsOnly:
        """Text to ids and back, if the model is byte-level."""
        return tokenizer_for(self._model.manifest)

    @property
    def slots(self) -> int:
        """How many sequences run side by side."""
        return len(self._jobs)

    def describe(self) -> dict[str, Any]:
        """How it runs.

        graph: "decode" if the graph chooses the tokens, "step" if the host does; operators: the library whose kernels
        run, None where every operator is a standard one; cuda_graph: whether steps are replayed; state_bytes: of a slot
        """
        return self._loop.describe() | {
            "operators": self._model.operators,
            "slots": self.slots,
            "state_bytes": self._loop.slots.bytes // self.slots,
        }

    def submit(
        self,
        prompt: ArrayLike,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop_tokens: Collection[int] = (),
    ) -> Handle:
        """Queue a sequence: prompt [seq] or [1, seq], then up to max_new_tokens; it ends with the first of stop_tokens.

        The draws are those of Session.generate at batch 1: temperature, top_k, top_p and seed mean the same.

        Raises ArgumentError for a bad argument, or if the model's states have no room for so many positions; BusyError
        if the queue is full; EngineError if the engine is closed or has failed.
        """
        check_count("max_new_tokens", max_new_tokens)
        tokens = as_sequence(prompt, self._model, 1)
        capacity, needed = self.manifest.capacity, tokens.shape[1] + max_new_tokens
        if capacity is not None and needed > capacity:
            raise ArgumentError(
                f"the model's states have room for {capacity} positions, the prompt and max_new_tokens take {needed}"
            )
        stop = frozenset(as_ids("stop_tokens", stop_tokens, self._model.width).tolist())
        (generator,) = row_generators(seed, 1)
        job = _Job(tokens, Sampler(temperature, top_k, top_p), generator, stop, max_new_tokens)
        with self._changed:
            if self._closed is not None:
                raise EngineError(str(self._closed))
            self._waiting = deque(other for other in self._waiting if not other.ended)
            if self._limit is not None and len(self._waiting) >= self._limit + self._vacant():
                raise BusyError(f"the queue is full: {self.slots} slots and {self._limit} places to wait are taken")
            self._waiting.append(job)
            self._changed.notify_all()
        return job.handle

    def close(self) -> None:
        """End: what runs or waits is cancelled. Returns when the engine's thread has."""
        with self._changed:
            self._closed = self._closed or EngineError("the engine is closed")
            self._changed.notify_all()
        self._driver.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # the driver's own, but for _waiting and _closed, which the lock guards

    def _drive(self) -> None:
        failure = None
        try:
            while self._wait():
                self._round()
        except Exception as error:  # onnxruntime's exceptions have no common base
            failure = EngineError(f"the engine failed: {str(error).partition(chr(10))[0]}")
            failure.__cause__ = error
        with self._changed:
            self._closed = self._closed or failure
            entering = self._entering and self._entering[1]
            left = [job for job in (*self._waiting, *self._jobs, entering) if job is not None]
            self._waiting.clear()
        for job in left:
            job.handle.end("failed" if failure else "cancelled", failure)

    def _wait(self) -> bool:
        """Until there is something to do; False if the engine is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._entering or any(self._jobs))
            return self._closed is None

    def _round(self) -> None:
        for row, job in enumerate(self._jobs):
            if job is not None and job.ended:
                self._jobs[row] = None
                self._loop.free(row)
        self._read_prompt()
        self._advance()

    def _vacant(self) -> int:
        """Slots that nobody runs in or enters."""
        return sum(job is None or job.ended for job in self._jobs) - (self._entering is not None)

    def _read_prompt(self) -> None:
        """One chunk of the prompt that is being read; of the next in the queue, if there is a slot for it."""
        with self._changed:
            while self._entering is None and self._waiting and None in self._jobs:
                job = self._waiting.popleft()
                if not job.ended:
                    row = self._jobs.index(None)
                    self._entering = row, job, self._reading(row, job.prompt[:, :-1])
        if self._entering is None:
            return
        row, job, reading = self._entering
        read = not job.ended and next(reading, self) is self
        if read:
            self._taken[row] = job.prompt.shape[1] - 1
            self._loop.place(row, int(job.prompt[0, -1]), job.sampler)
        if read or job.ended:
            with self._changed:
                self._entering, self._jobs[row] = None, job if read else None

    def _reading(self, row: int, tokens: Array) -> Iterator[None]:
        """The last token is left to the step."""
        slots = self._loop.slots
        if tokens.shape[1] == 0:
            slots.clear(row)
        else:
            yield from self._prompts.read(tokens, partial(slots.writing, row))

    def _advance(self) -> None:
        running = [(row, job) for row, job in enumerate(self._jobs) if job is not None]
        if not running:
            return
        steps = self._steps([job for _, job in running])
        uniform = np.zeros((steps, self.slots), np.float32)
        for row, job in running:
            uniform[:, row] = job.generator.random(steps, dtype=np.float32)
        tokens = self._loop.advance(uniform)
        self._taken += steps
        for row, job in running:
            if row in self._loop.failed:
                job.handle.end("failed", self._loop.failed[row])
            else:
                job.take(tokens[:, row].tolist())

    def _steps(self, jobs: Sequence[_Job]) -> int:
        """As many as the loop takes, but none that nobody asked for, or that some slot has no room for."""
        steps = min(self._loop.ahead, max(job.limit - job.count for job in jobs))
        capacity = self.manifest.capacity
        if capacity is None:
            return steps
        for row, job in enumerate(self._jobs):
            if job is None and self._taken[row] + steps > capacity:  # it goes on though it is free
                self._loop.slots.clear(row)
                self._taken[row] = 0
        return min(steps, capacity - int(self._taken.max()))
