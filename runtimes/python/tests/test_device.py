"""What a session does on a device, as far as it can be seen without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from lhruntime import FormatError, Session
from lhruntime.runner import Runner
from toy_models import Toy

CUDA = "CUDAExecutionProvider"
DEFAULTS = {"use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"}


class Across:
    """A graph whose binding copies an input as it is bound, as onnxruntime does from one memory into another."""

    def __init__(self, graph: ort.InferenceSession) -> None:
        self._graph = graph

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)

    def io_binding(self) -> ort.IOBinding:
        binding = self._graph.io_binding()
        bind, copies = binding.bind_ortvalue_input, []

        def copied(name: str, value: ort.OrtValue) -> None:
            copies.append(np.array(value.numpy()))
            bind(name, ort.OrtValue.ortvalue_from_numpy(copies[-1]))

        binding.bind_ortvalue_input = copied
        return binding


class OnDevice(Runner):
    """Runs as on a device, its states in the memory of the CPU."""

    def _allocate(self) -> list[ort.OrtValue]:
        return [
            ort.OrtValue.ortvalue_from_shape_and_type(shape, spec.dtype.type)
            for spec, shape in zip(self._specs, self._shapes, strict=True)
        ]


def on_device(session: Session, device: str = "cuda") -> Session:
    model = session._model
    session._runner = OnDevice(
        replace(model, device=device, step=Across(model.step), prefill=Across(model.prefill)), session.batch
    )
    return session


def test_every_step_reads_its_own_token_and_states(built: Path, model: Toy) -> None:
    tokens = np.random.default_rng(0).integers(0, model.vocab, (2, 12))
    session = on_device(Session.load(built, batch=2, threads=1))
    pieces = [session.step(tokens[:, t])[:, None] for t in range(5)]
    pieces.append(session.prefill(tokens[:, 5:9]))
    pieces += [session.step(tokens[:, t])[:, None] for t in range(9, 12)]
    expected, _ = model.reference(tokens)
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected, rtol=0, atol=1e-5)


def test_a_binding_made_once_would_repeat_the_first_token(built: Path, model: Toy) -> None:
    """The graph of the test above does copy: bound once, it goes on reading what stood there then, whatever it was."""
    tokens = np.random.default_rng(0).integers(0, model.vocab, (2, 12))
    session = on_device(Session.load(built, batch=2, threads=1), "cpu")
    outputs = np.stack([session.step(tokens[:, t]) for t in range(5)], 1)
    expected, _ = model.reference(tokens[:, :5])
    assert not float(np.abs(outputs - expected).max()) <= 1e-2


@pytest.mark.parametrize(
    ("given", "opened"),
    [
        (CUDA, (CUDA, DEFAULTS)),
        ((CUDA, {"device_id": "1"}), (CUDA, {**DEFAULTS, "device_id": "1"})),
        ((CUDA, {"use_tf32": "1"}), (CUDA, {**DEFAULTS, "use_tf32": "1"})),
        ("CPUExecutionProvider", "CPUExecutionProvider"),
    ],
    ids=str,
)
def test_products_of_float32_are_exact_unless_asked(
    built: Path, monkeypatch: pytest.MonkeyPatch, given: Any, opened: Any
) -> None:
    seen = []

    def opens(*_: Any, providers: list[Any]) -> None:
        seen.append(providers)
        raise RuntimeError("no device")

    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", opens)
    with pytest.raises(FormatError, match="cannot load it: no device"):
        Session.load(built, providers=[given])
    assert seen == [[opened]]
