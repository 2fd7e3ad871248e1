"""The loop over the step: tokens in, the next tokens out, for all slots at once.

StepLoop reads the logits of every step and chooses on the host. DeviceLoop runs the graph `decode`, which chooses
itself: each step's tokens lie where the next one reads them, so that several steps run without a word from the host.

    place                0        1        2        3      of DeviceLoop, ahead = 4
    reads uniform of     0        1        2        3
    reads tokens of      3        0        1        2
    writes tokens of     0        1        2        3
    states            A → B    B → A    A → B    B → A     and others as lhruntime.slots has them

Everything is bound once for each place. On CUDA a place is a CUDA graph, which keeps its addresses. The numbers to
choose by are written ahead for as many steps as are run, then the tokens of all of them are read at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import count
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from lhruntime.errors import ArgumentError
from lhruntime.inputs import check_count
from lhruntime.model import SETTINGS, TOKENS, LoadedModel, Provider, load_model
from lhruntime.sampling import Sampler
from lhruntime.slots import Slots

__all__ = ["DeviceLoop", "Loop", "StepLoop", "check_neighbours"]

Array = np.ndarray[Any, np.dtype[Any]]
_FLOAT32 = np.finfo(np.float32)
_graph_ids = count(1)
"""Names of CUDA graphs, no two alike: several loops may share a session."""


class Loop(Protocol):
    """What an engine needs of a loop.

    ahead:  most steps that advance takes at once
    failed: slots that the last advance could not choose for, and why
    """

    slots: Slots
    ahead: int
    failed: dict[int, ArgumentError]

    def place(self, row: int, token: int, sampler: Sampler) -> None:
        """The token that a slot reads next, and how its tokens are chosen from then on."""

    def free(self, row: int) -> None:
        """Nobody reads the tokens of a slot; it goes on with any."""

    def advance(self, uniform: Array) -> Array:
        """Numbers in [0, 1) float32 [steps, slots] to choose by → tokens int64 [steps, slots]."""

    def describe(self) -> dict[str, Any]:
        """How it runs."""


class StepLoop:
    """Tokens are chosen on the host from the logits of the step graph, one step at a time."""

    ahead = 1

    def __init__(self, model: LoadedModel, batch: int) -> None:
        self._model = model
        self.slots = Slots(model, batch)
        self.failed: dict[int, ArgumentError] = {}
        self._samplers: dict[int, Sampler] = {}
        self._next = np.zeros((batch, 1), np.int64)
        self._tokens = _allocate(model, (batch, 1), np.int64)
        self._logits = np.zeros((batch, 1, model.width), model.output_dtype)
        self._bindings = [self._bind(call) for call in range(self.slots.period)]

    def place(self, row: int, token: int, sampler: Sampler) -> None:
        self._next[row], self._samplers[row] = token, sampler

    def free(self, row: int) -> None:
        self._next[row] = 0
        self._samplers.pop(row, None)

    def advance(self, uniform: Array) -> Array:
        self._tokens.update_inplace(self._next)
        self._model.step.run_with_iobinding(self._bindings[self.slots.now])
        self.slots.turn()
        self.failed = {}
        for row, sampler in self._samplers.items():
            try:
                self._next[row] = sampler.choose(self._logits[row].astype(np.float32), uniform[:, row])
            except ArgumentError as error:
                self.failed[row] = error
        return self._next[:, 0][None].copy()

    def describe(self) -> dict[str, Any]:
        return {"graph": "step", "device": self._model.device, "cuda_graph": False, "ahead": 1}

    def _bind(self, call: int) -> ort.IOBinding:
        binding = self._model.step.io_binding()
        binding.bind_ortvalue_input(self._model.manifest.input, self._tokens)
        binding.bind_ortvalue_output(self._model.manifest.output, ort.OrtValue.ortvalue_from_numpy(self._logits))
        self.slots.bind(binding, call)
        return binding


class DeviceLoop:
    """Tokens are chosen where the model runs, up to `ahead` steps without the host.

    What they are chosen by is rounded to float32. A row whose logits hold NaN gets tokens that mean nothing.
    """

    def __init__(self, model: LoadedModel, batch: int, ahead: int = 1) -> None:
        """Use `DeviceLoop.load`. Raises ArgumentError if the model does not choose."""
        if not model.chooses:
            raise ArgumentError("there is no graph 'decode' in it: build for --target cuda")
        self._model, self._batch = model, batch
        self.slots, self.ahead = Slots(model, batch, model.past), check_count("ahead", ahead)
        self.failed: dict[int, ArgumentError] = {}
        options = model.step.get_provider_options().get("CUDAExecutionProvider", {})
        self._captured = options.get("enable_cuda_graph") == "1"
        self._places = -(-ahead // self.slots.period) * self.slots.period  # so that a place's states lie where they lay
        self._now = 0
        self._host = {name: np.zeros(batch, dtype) for name, dtype in SETTINGS.items()}
        self._host["uniform"] = np.zeros((self._places, batch), np.float32)
        self._host["top_p"][:] = 1
        self._host[TOKENS] = np.zeros((self._places, batch), np.int64)
        self._values = {name: _allocate(model, array.shape, array.dtype.type) for name, array in self._host.items()}
        self._changed = set(self._host)  # on the host, and not yet on the device
        self._unread = False  # tokens on the device
        self._graphs = [next(_graph_ids) for _ in range(self._places)]
        self._runs = [self._bind(place) for place in range(self._places)]

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        batch: int,
        *,
        target: str | None = None,
        providers: Sequence[Provider] | None = None,
        threads: int | None = None,
        operators: str | os.PathLike[str] | None = None,
        cuda_graph: bool = True,
        ahead: int = 1,
        verify: bool = True,
    ) -> DeviceLoop:
        """Open a built directory with all states zero, greedy.

        cuda_graph: replay the steps from CUDA graphs; of no meaning elsewhere
        others:     see Engine.load

        Raises what Session.load raises, and ArgumentError if the directory has no graph that chooses.
        """
        batch = check_count("batch", batch)
        model = load_model(
            directory,
            target=target,
            batch=batch,
            providers=providers,
            threads=threads,
            verify=verify,
            operators=operators,
            choose=True,
            cuda_graph=cuda_graph,
        )
        return cls(model, batch, ahead)

    @property
    def tokens(self) -> Array:
        """What the last step chose and the next one reads, int64 [batch]."""
        self._read()
        return self._host[TOKENS][self._now - 1].copy()

    def place(self, row: int, token: int, sampler: Sampler) -> None:
        self._read()
        self._host[TOKENS][self._now - 1, row] = token
        temperature = sampler.temperature and np.clip(sampler.temperature, _FLOAT32.tiny, _FLOAT32.max)
        self._host["temperature"][row] = temperature
        self._host["top_k"][row] = min(sampler.top_k, self._model.width)
        self._host["top_p"][row] = max(sampler.top_p, _FLOAT32.tiny)
        self._changed |= {TOKENS, "temperature", "top_k", "top_p"}

    def free(self, row: int) -> None:
        self.place(row, 0, Sampler(0.0))

    def advance(self, uniform: Array) -> Array:
        steps = len(uniform)
        places = (self._now + np.arange(steps)) % self._places
        self._host["uniform"][places] = uniform
        self._changed.add("uniform")
        self.run(steps)
        self._read()
        return self._host[TOKENS][places]

    def run(self, steps: int) -> None:
        """So many steps, and then wait for the device; the host reads and writes nothing in between.

        Tokens are chosen by the numbers that were given to `advance` last, zeros before the first.
        """
        self._write()
        self._unread = True
        for step in range(steps):
            binding, *options = self._runs[self._now]
            self._model.step.run_with_iobinding(binding, options[step == steps - 1])
            self._now = (self._now + 1) % self._places
            self.slots.turn()

    def describe(self) -> dict[str, Any]:
        return {
            "graph": "decode", "device": self._model.device, "cuda_graph": self._captured, "ahead": self.ahead
        }  # fmt: skip

    def _write(self) -> None:
        for name in self._changed:
            self._values[name].update_inplace(self._host[name])
        self._changed.clear()

    def _read(self) -> None:
        if self._unread:
            self._host[TOKENS], self._unread = np.array(self._values[TOKENS].numpy()), False

    def _bind(self, place: int) -> tuple[ort.IOBinding, ort.RunOptions, ort.RunOptions]:
        """A binding, and the options of a run that does not wait for the device and of one that does."""
        model = self._model
        binding = model.step.io_binding()
        where, batch = (model.device, model.device_id), self._batch

        def address(name: str, row: int) -> int:
            return int(self._values[name].data_ptr()) + row * batch * self._host[name].itemsize

        before = address(TOKENS, (place - 1) % self._places)
        binding.bind_input(model.manifest.input, *where, np.int64, [batch, 1], before)
        binding.bind_input("uniform", *where, np.float32, [batch], address("uniform", place))
        for name in ("temperature", "top_k", "top_p"):
            binding.bind_ortvalue_input(name, self._values[name])
        binding.bind_output(TOKENS, *where, np.int64, [batch, 1], address(TOKENS, place))
        self.slots.bind(binding, place % self.slots.period)
        return binding, self._options(place, waits=False), self._options(place, waits=True)

    def _options(self, place: int, *, waits: bool) -> ort.RunOptions:
        options = ort.RunOptions()
        if self._model.device == "cuda":
            options.add_run_config_entry("disable_synchronize_execution_providers", str(int(not waits)))
        if self._captured:
            options.add_run_config_entry("gpu_graph_id", str(self._graphs[place]))
        return options


def check_neighbours(loop: Loop, count: int, vocab_size: int) -> None:
    """Run a few steps to see that a row's states are the same bits whatever stands in the other rows; zeros afterwards.

    Raises ArgumentError if they are not: of graphs that scale a whole batch by what is in it, for example.
    """
    draw = np.random.default_rng(0)
    own, seen = draw.integers(vocab_size, size=2), []
    for _ in range(2):
        loop.slots.zero()
        for token in own:
            for row, other in enumerate(draw.integers(vocab_size, size=count).tolist()):
                loop.place(row, other if row else int(token), Sampler(0.0))
            loop.advance(np.zeros((1, count), np.float32))
        seen.append(b"".join(state.tobytes() for state in loop.slots.read(0)))
    for row in range(count):
        loop.free(row)
    loop.slots.zero()
    if seen[0] != seen[1]:
        raise ArgumentError(
            "sequences cannot run side by side: in these graphs a row's states depend on what is in the other rows"
        )


def _allocate(model: LoadedModel, shape: Sequence[int], dtype: type) -> ort.OrtValue:
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, model.device, model.device_id)
