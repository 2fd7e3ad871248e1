"""Built models in lhruntime's engine: tokens chosen by the host, by the graph, and where room is limited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import done
from lhruntime import ArgumentError, DeviceLoop, Engine, Session
from lhruntime.sampling import Sampler
from models import VOCAB

ROOM = 24
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.5, "top_k": 40},
    {"temperature": 1.5, "top_p": 0.75},
    {"temperature": 0.75, "top_k": 30, "top_p": 0.875, "stop_tokens": range(0, 256, 9)},
    {"temperature": 1e-60, "top_p": 1e-60},
    {"temperature": 1e60, "top_k": 10**30},
]
"""Numbers that float32 holds, or that mean the same where it does not."""


@pytest.fixture(scope="module")
def on_device(checkpoint: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Hyena with a graph that chooses tokens."""
    out = tmp_path_factory.mktemp("on_device") / "out"
    done("build", checkpoint, "-o", out, "--target", "cuda", "--order", 4, "--calibration", text, "--sequences", 4)
    return out


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Attention among other mixers, with room for 24 positions."""
    out = tmp_path_factory.mktemp("hybrid") / "out"
    model = ["factories:hybrid", "--context", 32, "--exact", "--max-context", ROOM]
    done("build", *model, "-o", out, "--sequences", 2)
    return out


def check(engine: Engine, session: Session, number: int, longest: int, vocab_size: int) -> None:
    """Many sequences get the tokens that a session gives each of them."""
    draw = np.random.default_rng(0)
    requests = []
    for index in range(number):
        count = int(draw.integers(1, longest))
        prompt = draw.integers(0, vocab_size, int(draw.integers(1, longest)))
        options = SETTINGS[index % len(SETTINGS)] | {"seed": index}
        options["stop_tokens"] = [token for token in options.get("stop_tokens", ()) if token < vocab_size]
        requests.append((prompt, count, options))
    handles = [engine.submit(prompt, count, **options) for prompt, count, options in requests]
    for handle in handles[::5]:
        handle.cancel()
    expected = []
    for prompt, count, options in requests:
        session.reset()
        expected.append([int(token[0]) for token in session.generate(prompt, count, **options)])
    assert len({tuple(tokens) for tokens in expected}) > number // 2
    for index, (handle, tokens) in enumerate(zip(handles, expected, strict=True)):
        found = handle.result(120)
        assert found == tokens[: len(found)]
        assert len(found) == len(tokens) or (index % 5 == 0 and handle.reason == "cancelled")


def test_tokens_chosen_by_the_host(order_4: Path) -> None:
    with Engine.load(order_4, slots=5, threads=1, chunk=16) as engine:
        assert engine.describe()["graph"] == "step"
        check(engine, Session.load(order_4, threads=1), 40, 50, 256)


@pytest.mark.parametrize("ahead", [1, 3, 4])
def test_tokens_chosen_by_the_graph(on_device: Path, ahead: int) -> None:
    with Engine.load(on_device, slots=5, threads=1, chunk=16, ahead=ahead) as engine:
        assert engine.describe()["graph"] == "decode"
        assert engine.describe()["ahead"] == ahead
        check(engine, Session.load(on_device, threads=1), 40, 50, 256)


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_the_loop_alone_decodes_greedily(on_device: Path, ahead: int) -> None:
    first = np.array([3, 80, 255])
    session = Session.load(on_device, batch=3, threads=1)
    expected, tokens = [], first
    for _ in range(20):
        tokens = session.step(tokens).argmax(1)
        expected.append(tokens)
    loop = DeviceLoop.load(on_device, 3, threads=1, ahead=ahead)
    for row, token in enumerate(first.tolist()):
        loop.place(row, token, Sampler(0.0))
    found = []
    for _ in range(20):
        loop.run(1)
        found.append(loop.tokens)
    np.testing.assert_array_equal(found, expected)
    loop.run(7)
    loop.place(1, 17, Sampler(0.0))  # tokens of the others are still where the host has not looked
    loop.run(2)
    for _ in range(7):
        tokens = session.step(tokens).argmax(1)
    tokens[1] = 17
    for _ in range(2):
        tokens = session.step(tokens).argmax(1)
    np.testing.assert_array_equal(loop.tokens, tokens)
    for name, state in session.states().items():
        rows = np.concatenate([loop.slots.read(row)[list(session.states()).index(name)] for row in range(3)])
        np.testing.assert_array_equal(rows, state)


def test_rows_stand_at_places_of_their_own_and_free_ones_go_on_for_ever(hybrid: Path) -> None:
    session = Session.load(hybrid, threads=1)
    with Engine.load(hybrid, slots=3, threads=1, chunk=5) as engine:
        check(engine, session, 30, ROOM // 2 + 1, VOCAB)
        (full,) = (engine.submit(np.arange(ROOM - 10) % VOCAB, 10, seed=1),)
        assert len(full.result(30)) == 10
        for seed in range(8):  # one at a time, beside two free slots
            assert len(engine.submit([seed], ROOM - 1).result(30)) == ROOM - 1
        with pytest.raises(ArgumentError, match="room for 24 positions, the prompt and max_new_tokens take 25"):
            engine.submit([1, 2, 3], ROOM - 2)
