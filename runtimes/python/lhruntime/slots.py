"""Sequences side by side: a slot is one row of every state, of fixed size, filled and emptied while others run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime as ort

from lhruntime.errors import ArgumentError
from lhruntime.model import LoadedModel

__all__ = ["Prompts", "Slots"]

Array = np.ndarray[Any, np.dtype[Any]]


class Slots:
    """The states of `count` sequences, twice: a step reads one side and writes the other, then they change roles.

    Raises ArgumentError if a state has no row of its own for each sequence.
    """

    def __init__(self, model: LoadedModel, count: int) -> None:
        self._model, self._specs = model, model.manifest.states
        for spec in self._specs:
            if spec.shape[:1] != ("batch",):
                raise ArgumentError(
                    f"sequences cannot run side by side: state {spec.input} is {list(spec.shape)}, "
                    "expected rows first, one for each sequence"
                )
        self._sides = (self._allocate(count), self._allocate(count))
        self._count, self._now = count, 0
        self.zero()

    @property
    def bytes(self) -> int:
        """Of the states of all sequences, once."""
        return sum(value.tensor_size_in_bytes() for value in self._sides[0])

    @property
    def now(self) -> int:
        """The side that the next step reads."""
        return self._now

    def turn(self) -> None:
        """What has been written is what is read next."""
        self._now = 1 - self._now

    def bind(self, binding: ort.IOBinding, side: int) -> None:
        """Let a graph read the states of one side and write those of the other."""
        for spec, old, new in zip(self._specs, self._sides[side], self._sides[1 - side], strict=True):
            binding.bind_ortvalue_input(spec.input, old)
            binding.bind_ortvalue_output(spec.output, new)

    def row(self, index: int) -> list[ort.OrtValue]:
        """The present states [1, ...] of one sequence where they lie: what is written to them is written there."""
        views = self._model.prefill.io_binding()
        for spec, value in zip(self._specs, self._sides[self._now], strict=True):
            shape = spec.sized(1)
            address = value.data_ptr() + index * spec.dtype.itemsize * int(np.prod(shape, dtype=np.int64))
            where = (self._model.device, self._model.device_id)
            views.bind_output(spec.output, *where, spec.dtype.type, shape, address)
        return views.get_outputs()

    def zero(self) -> None:
        """Make the present states of all sequences zero."""
        for spec, value in zip(self._specs, self._sides[self._now], strict=True):
            value.update_inplace(np.zeros(spec.sized(self._count), spec.dtype))

    def clear(self, index: int) -> None:
        """Make the present states of one sequence zero."""
        for spec, view in zip(self._specs, self.row(index), strict=True):
            view.update_inplace(np.zeros(spec.sized(1), spec.dtype))

    def read(self, index: int) -> list[Array]:
        """Copies of the present states [1, ...] of one sequence, in the manifest's order."""
        return [np.array(view.numpy()) for view in self.row(index)]

    def _allocate(self, count: int) -> list[ort.OrtValue]:
        where = (self._model.device, self._model.device_id)
        return [
            ort.OrtValue.ortvalue_from_shape_and_type(spec.sized(count), spec.dtype.type, *where)
            for spec in self._specs
        ]


class Prompts:
    """Reads prompts, one at a time, at batch 1.

    A prompt is cut into calls of `chunk` positions from its beginning on, whatever runs beside it: where it is cut
    changes the last bits of its states.

    Raises ArgumentError if the graph takes another batch, or prompts of one length only.
    """

    def __init__(self, model: LoadedModel, chunk: int) -> None:
        batch = model.prefill.get_inputs()[0].shape[0]
        if isinstance(batch, int) and batch != 1:
            raise ArgumentError(f"prompts of their own lengths are read one by one, the graphs take {batch} at once")
        if model.piece is not None:
            raise ArgumentError(f"the graphs take prompts in pieces of {model.piece} only, expected any length")
        self._model, self._chunk = model, chunk
        # the zeros are only ever read
        self._zeros, *self._between = (Slots(model, 1) for _ in range(3))

    def read(self, tokens: Array, into: Callable[[], list[ort.OrtValue]]) -> Iterator[None]:
        """Consume tokens int64 [1, seq ≥ 1], pausing between one call and the next.

        The last call, behind which there is no pause, writes the states into `into()`, asked for just before it.
        """
        starts = range(0, tokens.shape[1], self._chunk)
        old = self._zeros.row(0)
        for index, start in enumerate(starts):
            last = index == len(starts) - 1
            new = into() if last else self._between[index % 2].row(0)
            self._consume(tokens[:, start : start + self._chunk], old, new)
            old = new
            if not last:
                yield

    def _consume(self, tokens: Array, old: list[ort.OrtValue], new: list[ort.OrtValue]) -> None:
        model = self._model
        binding = model.prefill.io_binding()
        binding.bind_ortvalue_input(
            model.manifest.input, ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tokens))
        )
        binding.bind_output(model.manifest.output, model.device, model.device_id)  # nobody reads it: it stays there
        for spec, before, after in zip(model.manifest.states, old, new, strict=True):
            binding.bind_ortvalue_input(spec.input, before)
            binding.bind_ortvalue_output(spec.output, after)
        model.prefill.run_with_iobinding(binding)
