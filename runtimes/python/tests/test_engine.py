"""The engine on a toy model: many sequences that come and go, and each gets the tokens it gets alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from lhruntime import ArgumentError, BusyError, Engine, EngineError, FormatError, Handle, Session
from lhruntime.loops import DeviceLoop, StepLoop
from lhruntime.model import load_model
from lhruntime.sampling import Sampler
from lhruntime.slots import Prompts
from onnx import helper
from toy_models import manifest_of, save, toy, write_manifest

Array = np.ndarray[Any, np.dtype[Any]]
LONG = 100_000
"""More tokens than any test waits for."""


@dataclass(frozen=True)
class Asked:
    prompt: Array
    count: int
    options: dict[str, Any]

    def of(self, engine: Engine) -> Handle:
        return engine.submit(self.prompt, self.count, **self.options)

    def alone(self, session: Session) -> list[int]:
        session.reset()
        return [int(token[0]) for token in session.generate(self.prompt, self.count, **self.options)]


def asked(number: int, seed: int = 0, longest: int = 40) -> list[Asked]:
    draw = np.random.default_rng(seed)
    options = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 20},
        {"temperature": 1.2, "top_p": 0.9},
        {"temperature": 1.0, "stop_tokens": range(0, 256, 16)},
    ]
    return [
        Asked(
            draw.integers(0, 256, int(draw.integers(1, longest))),
            int(draw.integers(1, longest)),
            options[index % len(options)] | {"seed": index},
        )
        for index in range(number)
    ]


@pytest.fixture
def engine(built: Path) -> Iterator[Engine]:
    with Engine.load(built, slots=3, threads=1, chunk=8) as engine:
        yield engine


@pytest.fixture(scope="module")
def session(built: Path) -> Session:
    return Session.load(built, threads=1)


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_every_sequence_gets_the_tokens_it_gets_alone(built: Path, session: Session, slots: int) -> None:
    requests = asked(40)
    expected = [request.alone(session) for request in requests]
    assert len({tuple(tokens) for tokens in expected}) > 30
    with Engine.load(built, slots=slots, threads=1, chunk=8) as engine:
        handles = [request.of(engine) for request in requests]
        assert [handle.result(60) for handle in handles] == expected
        assert [request.of(engine).result(60) for request in requests[:8]] == expected[:8]
    for handle, request in zip(handles, requests, strict=True):
        full = len(handle.tokens) == request.count
        stopped = handle.tokens[-1] in request.options.get("stop_tokens", ())
        assert handle.reason == ("stop" if stopped else "length")
        assert full or stopped


def test_submitted_and_cancelled_from_several_threads(built: Path, session: Session) -> None:
    requests = asked(60, seed=1)
    expected = [request.alone(session) for request in requests]
    draw = np.random.default_rng(2)
    leave = [int(draw.integers(1, 6)) if index % 3 == 0 else None for index in range(len(requests))]

    def client(request: Asked, leave_after: int | None) -> tuple[list[int], str | None]:
        handle, tokens = request.of(engine), []
        for token in handle.stream():
            tokens.append(token)
            if len(tokens) == leave_after:
                handle.cancel()
                break
        return tokens, handle.reason

    with Engine.load(built, slots=4, threads=1, chunk=8) as engine, ThreadPoolExecutor(6) as pool:
        found = list(pool.map(client, requests, leave))
    for (tokens, reason), wanted, after in zip(found, expected, leave, strict=True):
        assert tokens == wanted[:after]
        assert reason in (("cancelled", "length", "stop") if after else ("length", "stop"))
    assert sum(reason == "cancelled" for _, reason in found) > 5


def rows(loop: StepLoop, own: Array, row: int, others: Array) -> bytes:
    """The states and logits of a row that reads `own` while the others read `others` [seq, batch]."""
    logits = []
    for token, beside in zip(own, others, strict=True):
        for index, other in enumerate(beside):
            loop.place(index, int(token if index == row else other), Sampler(0.0))
        loop.advance(np.zeros((1, len(beside)), np.float32))
        logits.append(loop._logits[row].copy())
    return b"".join(array.tobytes() for array in (*logits, *loop.slots.read(row)))


def test_a_row_is_the_same_bits_whatever_the_others_are_and_wherever_it_stands(built: Path) -> None:
    model = load_model(built, target=None, batch=5, providers=None, threads=1, verify=True)
    draw = np.random.default_rng(3)
    own = draw.integers(0, 256, 30)
    found = {rows(StepLoop(model, 5), own, row, draw.integers(0, 256, (30, 5))) for row in (0, 1, 4) for _ in range(3)}
    assert len(found) == 1
    assert rows(StepLoop(model, 5), own[::-1], 0, draw.integers(0, 256, (30, 5))) not in found


def test_tokens_stream_while_they_come(engine: Engine) -> None:
    handle = engine.submit([1, 2, 3], LONG, seed=0)
    stream = handle.stream()
    first = [next(stream) for _ in range(3)]
    assert handle.reason is None
    assert handle.tokens[:3] == first
    second_reader = handle.stream()
    assert [next(second_reader) for _ in range(3)] == first
    handle.cancel()
    rest = list(stream)
    assert first + rest == handle.tokens == handle.result()
    assert handle.reason == "cancelled"
    assert len(handle.tokens) < LONG


def test_a_cancelled_sequence_gives_its_slot_to_the_next(engine: Engine) -> None:
    blocking = [engine.submit([index], LONG) for index in range(3)]
    waiting = engine.submit([9], 4, seed=0)
    given_up = engine.submit([9], LONG)
    eventually(lambda: all(handle.tokens for handle in blocking))
    assert (waiting.tokens, waiting.reason) == ([], None)
    given_up.cancel()
    assert given_up.result(0) == []
    with pytest.raises(TimeoutError, match=r"the sequence has not ended after 0\.01 seconds"):
        waiting.result(0.01)
    blocking[1].cancel()
    assert len(waiting.result(30)) == 4
    assert [blocking[index].reason for index in (0, 1, 2)] == [None, "cancelled", None]


def test_cancelled_while_its_prompt_is_read(engine: Engine) -> None:
    running = engine.submit([1], LONG)
    eventually(lambda: bool(running.tokens))
    long = [engine.submit(np.zeros(100_000, int), 5) for _ in range(2)]
    eventually(lambda: engine._entering is not None and engine._entering[1].handle is long[0])
    seen = len(running.tokens)
    eventually(lambda: len(running.tokens) > seen)
    for handle in long:
        handle.cancel()
    assert len(engine.submit([2], 5).result(30)) == 5
    assert [handle.result() for handle in long] == [[], []]


def test_first_come_first_served(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    blocking = [engine.submit([index], LONG) for index in range(3)]
    eventually(lambda: all(handle.tokens for handle in blocking))
    place, started = engine._loop.place, []
    monkeypatch.setattr(engine._loop, "place", lambda row, token, how: (started.append(token), place(row, token, how)))
    prompts = [np.full(length, length) for length in (30, 1, 17, 2, 9, 1)]
    handles = [engine.submit(prompt, 20) for prompt in prompts]
    blocking[2].cancel()
    blocking[1].cancel()
    for handle in handles:
        handle.result(30)
    assert started == [30, 1, 17, 2, 9, 1]


def test_a_long_prompt_is_read_between_the_tokens_of_others(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    consume, advance = Prompts._consume, StepLoop.advance
    monkeypatch.setattr(Prompts, "_consume", lambda *a: (log.append("chunk"), consume(*a))[1])
    monkeypatch.setattr(StepLoop, "advance", lambda *a: (log.append("step"), advance(*a))[1])
    with Engine.load(built, slots=2, threads=1, chunk=10) as engine:
        running = engine.submit([1], LONG)
        eventually(lambda: len(running.tokens) > 3)
        engine.submit(np.arange(101), 1).result(30)
    chunks = [index for index, entry in enumerate(log) if entry == "chunk"]
    assert len(chunks) == 10
    assert np.diff(chunks).tolist() == [2] * 9  # a step for those that run behind every chunk


def test_chunks_do_not_depend_on_what_runs_beside(built: Path, session: Session) -> None:
    prompt = np.random.default_rng(0).integers(0, 256, 33)
    session.reset()
    session.prefill(prompt[:-1], chunk=8)
    with Engine.load(built, slots=2, threads=1, chunk=8) as engine:
        model = engine._model
    slots = StepLoop(model, 2).slots
    assert sum(1 for _ in Prompts(model, 8).read(prompt[None, :-1], lambda: slots.writing(1))) == 3
    for found, expected in zip(slots.read(1), session.states().values(), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert all(not state.any() for state in slots.read(0))


def test_no_chunk_is_written_over_the_states_it_reads(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(built, target=None, batch=2, providers=None, threads=1, verify=True)
    slots, calls, consume = StepLoop(model, 2).slots, [], Prompts._consume

    def record(prompts: Prompts, tokens: Array, old: list[Any], new: list[Any]) -> None:
        calls.append(([value.data_ptr() for value in old], [value.data_ptr() for value in new]))
        consume(prompts, tokens, old, new)

    monkeypatch.setattr(Prompts, "_consume", record)
    for _ in Prompts(model, 2).read(np.zeros((1, 9), np.int64), lambda: slots.writing(1)):
        pass
    assert len(calls) == 5
    assert all(set(old).isdisjoint(new) for old, new in calls)
    assert [new for _, new in calls[:-1]] == [old for old, _ in calls[1:]]
    with slots.writing(1) as values:
        assert calls[-1][1] == [value.data_ptr() for value in values]


def test_a_slot_keeps_nothing_of_who_was_there(built: Path, session: Session) -> None:
    (request,) = asked(1, seed=7)
    with Engine.load(built, slots=1, threads=1) as engine:
        expected = request.of(engine).result(30)
        for length in (1, 50):
            engine.submit(np.full(length, 200), 20).result(30)
            assert request.of(engine).result(30) == expected == request.alone(session)
            single = Asked(np.array([65]), 10, {"seed": 3})
            assert single.of(engine).result(30) == single.alone(session)


def test_a_full_queue_refuses(built: Path) -> None:
    with Engine.load(built, slots=2, threads=1, queue=1) as engine:
        running = [engine.submit([1], LONG), engine.submit([1], LONG)]
        waiting = engine.submit([1], 3)
        with pytest.raises(BusyError, match="the queue is full: 2 slots and 1 places to wait are taken"):
            engine.submit([1], 3)
        waiting.cancel()
        again = engine.submit([1], 3)
        running[0].cancel()
        assert len(again.result(30)) == 3
    with Engine.load(built, slots=2, threads=1, queue=0) as engine:
        for _ in range(30):
            handles = [engine.submit([1], 2), engine.submit([1], 2)]
            assert [len(handle.result(30)) for handle in handles] == [2, 2]


def test_closing_ends_what_runs_and_waits(built: Path) -> None:
    engine = Engine.load(built, slots=1, threads=1)
    handles = [engine.submit([1], LONG) for _ in range(3)]
    next(handles[0].stream())
    engine.close()
    engine.close()
    assert [handle.reason for handle in handles] == ["cancelled"] * 3
    assert handles[0].result()
    assert not handles[1].result()
    with pytest.raises(EngineError, match="the engine is closed"):
        engine.submit([1], 1)


def test_a_program_may_end_without_closing(built: Path) -> None:
    code = f"from lhruntime import Engine; e = Engine.load({str(built)!r}); next(e.submit([1], {LONG}).stream())"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60, check=False)
    assert done.returncode == 0


def test_a_failure_of_the_runtime_reaches_everybody(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine.load(built, slots=1, threads=1) as engine:
        running, waiting = engine.submit([1], LONG), engine.submit([2], 3)
        next(running.stream())

        def broken(*_: Any) -> Array:
            raise RuntimeError("out of memory\nsomewhere")

        monkeypatch.setattr(engine._loop, "advance", broken)
        for handle in (running, waiting):
            with pytest.raises(EngineError, match=r"^the engine failed: out of memory$"):
                handle.result(30)
            assert handle.reason == "failed"
        with pytest.raises(EngineError, match="out of memory"):
            list(running.stream())
        with pytest.raises(EngineError, match="the engine failed: out of memory"):
            engine.submit([1], 1)


def test_logits_that_cannot_be_chosen_from_end_that_sequence_only(tmp_path: Path) -> None:
    model = toy()
    model.weights["embedding"][7] = np.nan
    directory = save(model, tmp_path / "nan")
    with Engine.load(directory, slots=2, threads=1) as engine:
        beside = engine.submit([1], LONG, top_k=1)
        bad = engine.submit([1, 7], 30)
        with pytest.raises(ArgumentError, match="the largest logit is nan: there is nothing to sample from"):
            bad.result(30)
        after = engine.submit([1], 30, top_k=1)  # in the slot where NaN is
        assert len(after.result(30)) == 30
        eventually(lambda: len(beside.tokens) >= 30)
        assert after.tokens == beside.tokens[:30]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 3), "the prompt is empty"),
        (("text", 3), "text is not a prompt"),
        (([256], 3), r"token id 256 at \[0, 0\] is outside 0..255"),
        (([[1], [2]], 3), "got a batch of 2, this session has batch 1"),
        (([1], 0), "max_new_tokens is 0, expected a whole number of at least 1"),
    ],
)
def test_bad_requests(engine: Engine, arguments: tuple[Any, int], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        engine.submit(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"seed": -1}, "seed is -1"),
        ({"stop_tokens": [256]}, r"stop_tokens is \[256\], expected ids below 256"),
    ],
)
def test_bad_options(engine: Engine, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        engine.submit([1], 3, **options)


@pytest.mark.parametrize("name", ["slots", "chunk", "ahead"])
def test_bad_sizes(built: Path, name: str) -> None:
    with pytest.raises(ArgumentError, match=f"{name} is 0, expected a whole number of at least 1"):
        Engine.load(built, **{name: 0})


def test_ahead_needs_a_graph_that_chooses(built: Path) -> None:
    with pytest.raises(ArgumentError, match="ahead is 2, but the directory has no graph that chooses tokens"):
        Engine.load(built, ahead=2)
    with pytest.raises(ArgumentError, match="there is no graph 'decode' in it: build for --target cuda"):
        DeviceLoop.load(built, 2)


def test_it_says_how_it_runs(engine: Engine) -> None:
    assert engine.describe() == {
        "graph": "step", "device": "cpu", "cuda_graph": False, "ahead": 1, "operators": None, "slots": 3,
        "state_bytes": 2 * 8 * (2 + 3) * 4,
    }  # fmt: skip


def test_models_that_cannot_run_side_by_side_are_refused(built_features: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="this model maps features to values: there are no tokens to generate"):
        Engine.load(built_features)
    fixed = save(toy(), tmp_path / "fixed", batch="2")
    with pytest.raises(FormatError, match="has the fixed batch 2, this session asks for batch 8"):
        Engine.load(fixed)
    with pytest.raises(ArgumentError, match="prompts of their own lengths are read one by one, the graphs take 2"):
        Engine.load(fixed, slots=2)


def test_a_state_without_rows_is_refused(tmp_path: Path) -> None:
    directory = save(toy(), tmp_path / "shared")
    manifest = manifest_of(toy())
    manifest["states"][1]["shape"] = [1, 8, 3]
    write_manifest(directory, manifest)
    for kind in ("step", "prefill"):
        graph = onnx.load(directory / f"{kind}.onnx")
        for value in (*graph.graph.input, *graph.graph.output):
            if value.name.endswith("0.recurrent_state"):
                value.type.tensor_type.shape.dim[0].dim_value = 1
        onnx.save(graph, directory / f"{kind}.onnx")
    write_manifest(directory, manifest)
    message = r"state past_key_values.0.recurrent_state is \[1, 8, 3\], expected rows first"
    with pytest.raises(ArgumentError, match=f"sequences cannot run side by side: {message}"):
        Engine.load(directory, slots=1)


def test_rows_that_hear_of_each_other_are_refused(tmp_path: Path) -> None:
    directory = save(toy(), tmp_path / "mixed")
    model = onnx.load(directory / "step.onnx")
    (squash,) = (node for node in model.graph.node if node.op_type == "Tanh" and node.input[0] == "y_0")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "axis0"))
    at = list(model.graph.node).index(squash)
    model.graph.node.insert(at, helper.make_node("ReduceMax", ["y_0", "axis0"], ["highest"]))
    model.graph.node.insert(at + 1, helper.make_node("Sub", ["y_0", "highest"], ["relative"]))
    squash.input[0] = "relative"
    onnx.save(model, directory / "step.onnx")
    write_manifest(directory, manifest_of(toy()))
    with pytest.raises(ArgumentError, match="a row's states depend on what is in the other rows"):
        Engine.load(directory, slots=2)
    Engine.load(directory, slots=1).close()
