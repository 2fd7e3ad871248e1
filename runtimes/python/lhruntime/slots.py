"""Sequences side by side: a slot is one row of every state, of fixed size, filled and emptied while others run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from lhruntime.bfloat16 import BFLOAT16, from_bits, to_bits
from lhruntime.errors import ArgumentError
from lhruntime.manifest import PastSpec, StateSpec
from lhruntime.model import LoadedModel

__all__ = ["Prompts", "Slots"]

Array = np.ndarray[Any, np.dtype[Any]]


class Slots:
    """The states of `count` sequences, which every call reads in one place and writes in another.

    past: states that the graphs they are bound to have as one tensor for each position

    Raises ArgumentError if a state has no row of its own for each sequence.
    """

    def __init__(self, model: LoadedModel, count: int, past: Mapping[str, PastSpec] | None = None) -> None:
        self._specs, apart = model.manifest.states, past or {}
        for spec in self._specs:
            if spec.shape[:1] != ("batch",):
                raise ArgumentError(
                    f"sequences cannot run side by side: state {spec.input} is {list(spec.shape)}, "
                    "expected rows first, one for each sequence"
                )
        longest = max((len(past.inputs) for past in apart.values()), default=0)
        self.period = longest + 1 + (longest + 1) % 2 if apart else 2  # even, for the states that have two sides
        self._states: list[_State] = [
            _Window(model, spec, apart[spec.input], count, self.period)
            if spec.input in apart
            else _Sides(model, spec, count)
            for spec in self._specs
        ]
        self._now = 0
        self.zero()

    @property
    def bytes(self) -> int:
        """Of the states of all sequences, once."""
        return sum(state.bytes for state in self._states)

    @property
    def traffic(self) -> int:
        """Bytes of states that a call reads and writes."""
        return sum(state.traffic for state in self._states)

    @property
    def now(self) -> int:
        """The number of the next call; after `period` calls they lie where they lay."""
        return self._now

    def turn(self) -> None:
        """What has been written is what is read next."""
        self._now = (self._now + 1) % self.period

    def bind(self, binding: ort.IOBinding, call: int) -> None:
        """Let a graph read the states of a call, and write them for the next."""
        for state in self._states:
            state.bind(binding, call)

    @contextmanager
    def writing(self, index: int) -> Iterator[list[ort.OrtValue]]:
        """Where the present states [1, ...] of one sequence are to be written; afterwards they are the sequence's."""
        yield [state.inlet(index, self._now) for state in self._states]
        for state in self._states:
            state.settle(index, self._now)

    def zero(self) -> None:
        """Make the present states of all sequences zero."""
        for state in self._states:
            state.zero(self._now)

    def clear(self, index: int) -> None:
        """Make the present states of one sequence zero."""
        with self.writing(index) as values:
            for spec, value in zip(self._specs, values, strict=True):
                value.update_inplace(np.zeros(spec.sized(1), spec.dtype))

    def read(self, index: int) -> list[Array]:
        """Copies of the present states [1, ...] of one sequence, in the manifest's order."""
        return [state.read(index, self._now) for state in self._states]


class _State(Protocol):
    """One state of all sequences. bytes, traffic: as of Slots; inlet: where a row is written, before settle."""

    bytes: int
    traffic: int

    def bind(self, binding: ort.IOBinding, call: int) -> None: ...

    def inlet(self, index: int, call: int) -> ort.OrtValue: ...

    def settle(self, index: int, call: int) -> None: ...

    def read(self, index: int, call: int) -> Array: ...

    def zero(self, call: int) -> None: ...


class _Sides:
    """A state that is there twice: a call reads one side and writes the other, then they change roles."""

    def __init__(self, model: LoadedModel, spec: StateSpec, count: int) -> None:
        self._spec = spec
        self._sides = [_Rows(model, spec.sized(count), spec.dtype) for _ in range(2)]
        self.bytes = self._sides[0].value.tensor_size_in_bytes()
        self.traffic = 2 * self.bytes

    def bind(self, binding: ort.IOBinding, call: int) -> None:
        binding.bind_ortvalue_input(self._spec.input, self._sides[call % 2].value)
        binding.bind_ortvalue_output(self._spec.output, self._sides[1 - call % 2].value)

    def inlet(self, index: int, call: int) -> ort.OrtValue:
        return self._sides[call % 2].row(index)

    def settle(self, index: int, call: int) -> None:
        """It lies where it was written."""

    def read(self, index: int, call: int) -> Array:
        return np.array(self._sides[call % 2].row(index).numpy())

    def zero(self, call: int) -> None:
        self._sides[call % 2].zero()


class _Window:
    """The last positions of a signal in a ring of tensors: a call writes one of them, which the next calls read.

    The tensors may be of bfloat16 where the state is float32 and prefill fills it with no other numbers.
    """

    def __init__(self, model: LoadedModel, spec: StateSpec, past: PastSpec, count: int, length: int) -> None:
        _, self._positions, channels = spec.sized(count)
        self._past = past
        self._bits = past.dtype == "bfloat16"
        dtype = np.dtype(np.uint16) if self._bits else spec.dtype
        self._ring = [_Rows(model, (count, 1, channels), dtype, self._bits) for _ in range(length)]
        self._inlet = _Rows(model, (1, self._positions, channels), spec.dtype)
        each = self._ring[0].value.tensor_size_in_bytes()
        self.bytes, self.traffic = self._positions * each, (self._positions + 1) * each

    def _read(self, call: int) -> list[_Rows]:
        """What a call reads, the oldest first."""
        return [self._ring[(call - age) % len(self._ring)] for age in range(self._positions, 0, -1)]

    def bind(self, binding: ort.IOBinding, call: int) -> None:
        for name, rows in zip(self._past.inputs, self._read(call), strict=True):
            binding.bind_ortvalue_input(name, rows.value)
        binding.bind_ortvalue_output(self._past.output, self._ring[call % len(self._ring)].value)

    def inlet(self, index: int, call: int) -> ort.OrtValue:
        return self._inlet.value

    def settle(self, index: int, call: int) -> None:
        state = self._inlet.value.numpy()
        state = to_bits(state) if self._bits else state
        for position, rows in enumerate(self._read(call)):
            rows.row(index).update_inplace(np.ascontiguousarray(state[:, position : position + 1]))

    def read(self, index: int, call: int) -> Array:
        state = np.concatenate([rows.row(index).numpy() for rows in self._read(call)], axis=1)
        return from_bits(state) if self._bits else state

    def zero(self, call: int) -> None:
        for rows in self._read(call):
            rows.zero()


class _Rows:
    """A tensor on the model's device, a row for each sequence.

    bits: for graphs it is of bfloat16, for the host of uint16, the dtype given
    """

    def __init__(self, model: LoadedModel, shape: Sequence[int], dtype: np.dtype[Any], bits: bool = False) -> None:
        self._model, self._shape, self._dtype = model, tuple(shape), dtype
        where = (model.device, model.device_id)
        self.value = ort.OrtValue.ortvalue_from_shape_and_type(self._shape, BFLOAT16 if bits else dtype.type, *where)

    def row(self, index: int) -> ort.OrtValue:
        """One row where it lies: what is written to it is written there."""
        shape = (1, *self._shape[1:])
        address = self.value.data_ptr() + index * self._dtype.itemsize * prod(shape)
        view = self._model.prefill.io_binding()
        where = (self._model.device, self._model.device_id)
        view.bind_output(self._model.manifest.output, *where, self._dtype.type, shape, address)
        (value,) = view.get_outputs()
        return value

    def zero(self) -> None:
        self.value.update_inplace(np.zeros(self._shape, self._dtype))


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

    def read(self, tokens: Array, into: Callable[[], AbstractContextManager[list[ort.OrtValue]]]) -> Iterator[None]:
        """Consume tokens int64 [1, seq ≥ 1], pausing between one call and the next.

        The last call, behind which there is no pause, writes the states into what `into` gives, asked for just before.
        """
        starts = range(0, tokens.shape[1], self._chunk)
        with self._zeros.writing(0) as old:
            pass
        for index, start in enumerate(starts):
            last = index == len(starts) - 1
            with into() if last else self._between[index % 2].writing(0) as new:
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
