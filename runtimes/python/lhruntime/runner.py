"""Runs the two graphs over states that stay in place.

The states exist twice. Side 0 is read while side 1 is written, then the sides change roles, so that no call
allocates or copies a state: one IO binding per side, made once, serves every step. Where the graphs run on a device,
an input that they read on the other side of the bus is copied across as it is bound, so each step binds its inputs
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from lhruntime.model import LoadedModel

__all__ = ["Runner"]

Array = np.ndarray[Any, np.dtype[Any]]


class Runner:
    """A model and its present states, for a fixed batch.

    step_input [batch, 1, *tail] is filled by the caller before `step`; tail is () for tokens and
    (channels,) for features.
    """

    def __init__(self, model: LoadedModel, batch: int) -> None:
        self._model = model
        self._specs = model.manifest.states
        self._shapes = [spec.sized(batch) for spec in self._specs]
        self._sides = (self._allocate(), self._allocate())
        self._now = 0
        self.step_input = np.zeros((batch, 1, *model.input_tail), model.input_dtype)
        self._step_output = np.zeros((batch, 1, model.width), model.output_dtype)
        self._step_bindings = [
            self._bind(model.step, side, self.step_input, self._step_output) for side in (0, 1)
        ]
        self.zero()

    def step(self) -> Array:
        """Consume step_input; output [batch, 1, width], a buffer that the next step overwrites."""
        binding = self._step_bindings[self._now]
        if self._model.device != "cpu":
            self._bind_inputs(binding, self._now, self.step_input)
        self._model.step.run_with_iobinding(binding)
        self._now = 1 - self._now
        return self._step_output

    def prefill(self, values: Array, output: Array) -> None:
        """Consume values [batch, seq, *tail] and fill output [batch, seq, width]; both contiguous."""
        binding = self._bind(self._model.prefill, self._now, values, output)
        self._model.prefill.run_with_iobinding(binding)
        self._now = 1 - self._now

    def read(self) -> list[Array]:
        """Copies of the present states, in the manifest's order."""
        return [np.array(value.numpy()) for value in self._sides[self._now]]

    def write(self, states: Sequence[Array]) -> None:
        """Make these the present states; shapes and dtypes are those of `read`."""
        for value, state in zip(self._sides[self._now], states, strict=True):
            value.update_inplace(np.ascontiguousarray(state))

    def zero(self) -> None:
        """Make every present state zero."""
        pairs = zip(self._specs, self._shapes, strict=True)
        self.write([np.zeros(shape, spec.dtype) for spec, shape in pairs])

    def _allocate(self) -> list[ort.OrtValue]:
        return [
            ort.OrtValue.ortvalue_from_shape_and_type(
                shape, spec.dtype.type, self._model.device, self._model.device_id
            )
            for spec, shape in zip(self._specs, self._shapes, strict=True)
        ]

    def _bind(self, graph: ort.InferenceSession, side: int, values: Array, output: Array) -> ort.IOBinding:
        """Read states from one side, write them to the other; values and output are used in place."""
        binding = graph.io_binding()
        self._bind_inputs(binding, side, values)
        binding.bind_ortvalue_output(self._model.manifest.output, ort.OrtValue.ortvalue_from_numpy(output))
        for spec, new in zip(self._specs, self._sides[1 - side], strict=True):
            binding.bind_ortvalue_output(spec.output, new)
        return binding

    def _bind_inputs(self, binding: ort.IOBinding, side: int, values: Array) -> None:
        binding.bind_ortvalue_input(self._model.manifest.input, ort.OrtValue.ortvalue_from_numpy(values))
        for spec, old in zip(self._specs, self._sides[side], strict=True):
            binding.bind_ortvalue_input(spec.input, old)
