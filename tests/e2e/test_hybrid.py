"""A model with attention, positions and a given modal system through the command line, with room for 24 positions."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import done, refused, run
from factories import hybrid
from lhruntime import ArgumentError, Session
from models import VOCAB

ROOM, CONTEXT = 24, 32
MODEL = ["factories:hybrid", "--context", CONTEXT]
TOLERANCE = 1e-4
"""Largest |Δlogit| of an exact build, at logits of unit scale."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """An exact build, and the rows it printed."""
    out = tmp_path_factory.mktemp("hybrid") / "out"
    return out, done("build", *MODEL, "-o", out, "--exact", "--max-context", ROOM, "--sequences", 2).rows


@pytest.fixture
def session(built: tuple[Path, dict[str, str]]) -> Session:
    return Session.load(built[0], batch=2, threads=1)


def tokens(time: int = ROOM) -> torch.Tensor:
    return torch.randint(0, VOCAB, (2, time), generator=torch.Generator().manual_seed(3))


def test_the_manifest_and_the_report_say_what_grows(built: tuple[Path, dict[str, str]]) -> None:
    out, rows = built
    manifest = json.loads((out / "manifest.json").read_text())
    states = [(s["kind"], s["shape"], s["dtype"], s.get("capacity")) for s in manifest["states"]]
    assert states == [
        ("fir", ["batch", 2, 24], "float32", None),
        ("long_conv", ["batch", 31, 8], "float32", None),
        ("key", ["batch", 2, ROOM, 2], "float32", ROOM),
        ("value", ["batch", 2, ROOM, 2], "float32", ROOM),
        ("modal", ["batch", 6, 8], "float32", None),
        ("position", ["batch", 1], "int64", ROOM),
    ]
    assert manifest["model"]["context_length"] == CONTEXT
    assert [(x["method"], x["tap_error"]) for x in manifest["distillation"]] == [("modal", 0.0)]
    report = json.loads((out / "report.json").read_text())
    assert (report["capacity"], report["state_bytes"]) == (ROOM, 4 * (48 + 248 + 96 + 96 + 48) + 8)
    assert report["budget"] is None
    assert rows["state"] == "2.152 KB per sequence"
    page = (out / "report.html").read_text()
    assert "per sequence of at most 24 positions" in page
    assert "Every long convolution was a state space already, or keeps its own taps, so no filter was" in page


@pytest.mark.parametrize("cuts", [[], range(1, ROOM), [3, 8, 9, 10], [ROOM - 1]], ids=str)
def test_the_models_own_logits(session: Session, cuts: list[int]) -> None:
    expected = hybrid()(tokens()).numpy()
    assert 0.3 < expected.std() < 3
    pieces = [session.prefill(tokens()[:, a:b].numpy()) for a, b in pairwise([0, *cuts, ROOM])]
    assert float(np.abs(np.concatenate(pieces, 1) - expected).max()) < TOLERANCE


def test_what_does_not_fit_is_refused_before_it_runs(session: Session) -> None:
    assert (session.manifest.capacity, session.room) == (ROOM, ROOM)
    ids = tokens(ROOM + 1).numpy()
    with pytest.raises(ArgumentError, match="room for 24 positions, 0 are taken: 25 more do not fit"):
        session.prefill(ids)
    with pytest.raises(ArgumentError, match=r"0 are taken: 26 more do not fit; .* larger --max-context"):
        session.generate(ids[:, :10], 16)
    assert (session.position, session.room) == (0, ROOM)
    session.prefill(ids[:, :ROOM])
    before = session.states()
    with pytest.raises(ArgumentError, match="24 are taken: 1 more do not fit; reset the session"):
        session.prefill(ids[:, ROOM:])
    with pytest.raises(ArgumentError, match="24 are taken: 1 more do not fit; reset the session"):
        session.step(ids[:, ROOM])
    assert all(np.array_equal(before[name], state) for name, state in session.states().items())
    session.reset()
    assert session.room == ROOM


def test_snapshots_and_forks_keep_the_counter(session: Session) -> None:
    ids = tokens().numpy()
    whole = session.prefill(ids)
    session.reset()
    session.prefill(ids[:, :7])
    kept = session.snapshot()
    fork = session.fork()
    session.reset()
    session.restore(kept)
    position = session.states()["past.position"]
    assert (position.dtype, position.tolist()) == (np.int64, [[7], [7]])
    for each in (session, fork):
        np.testing.assert_allclose(each.prefill(ids[:, 7:]), whole[:, 7:], atol=TOLERANCE)
        assert each.room == 0


def test_generation_up_to_the_last_position(session: Session) -> None:
    new = list(session.generate(tokens(10).numpy(), ROOM - 10, seed=0))
    assert len(new) == ROOM - 10
    assert session.room == 0


def test_verbs(built: tuple[Path, dict[str, str]]) -> None:
    out = built[0]
    rows = done("verify", out, "--against", *MODEL).rows
    assert rows["cuts"] == "4 ways of feeding a sequence agree, outputs and states"
    assert rows["loss, compiled"].endswith("(+0.000%)")
    rows = done("bench", out, "--steps", 40, "--threads", 1).rows
    assert rows["prefill"].endswith(f"({ROOM} tokens at once)")
    assert rows["state"] == "2.152 KB per sequence"
    assert len(done("generate", out, "--prompt", "1 2 3", "-n", ROOM - 3).out.split()) == ROOM
    refused(run("generate", out, "--prompt", "1 2 3", "-n", ROOM), "0 are taken: 27 more do not fit")
    found = done("inspect", *MODEL).out
    assert "attention" in found
    assert "state space" in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-context", 33], "--max-context 33 is above the model's context of 32 positions"),
        (["--max-context", 1], "--max-context: Input should be greater than or equal to 2"),
        (["--reduce", "--exact"], "--reduce and --exact exclude each other"),
    ],
    ids=str,
)
def test_refused(options: list[object], message: str, tmp_path: Path) -> None:
    refused(run("build", *MODEL, "-o", tmp_path / "out", *options), message)
    assert not (tmp_path / "out").exists()
