"""Snapshots: what comes back is what was, and every damage is one clear error that changes nothing."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from lhruntime import Session, SnapshotError
from toy_models import save, toy


@pytest.fixture
def session(built: Path) -> Session:
    session = Session.load(built, threads=1)
    session.prefill(np.arange(10))
    return session


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("steps", [1, 2])
def test_round_trip(built: Path, tmp_path: Path, batch: int, steps: int) -> None:
    first = Session.load(built, batch=batch)
    for token in range(steps):
        first.step([token] * batch)
    path = tmp_path / "memory.snapshot"
    data = first.snapshot(path)
    assert path.read_bytes() == data
    assert list(tmp_path.iterdir()) == [path]
    expected = first.step([9] * batch)
    for source in (data, path, str(path)):
        second = Session.load(built, batch=batch)
        second.step([77] * batch)
        second.restore(source)
        assert second.position == steps
        assert second.snapshot() == data
        np.testing.assert_array_equal(second.step([9] * batch), expected)


def test_a_snapshot_is_small_and_documented(session: Session) -> None:
    data = session.snapshot()
    magic, version, header_size, body_size = struct.unpack_from("<8sIIQ", data)
    assert (magic, version) == (b"LHSTATE\n", 1)
    header = json.loads(data[24 : 24 + header_size])
    assert header["position"] == 10
    assert header["batch"] == 1
    assert header["model"] == session.manifest.fingerprint
    assert header["states"][1] == {
        "name": "past_key_values.0.recurrent_state",
        "shape": [1, 8, 3],
        "dtype": "float32",
    }
    body = data[24 + header_size : -32]
    assert len(body) == body_size == 4 * 2 * (8 * 2 + 8 * 3)
    assert body == b"".join(state.tobytes() for state in session.states().values())
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()


def resealed(data: bytes) -> bytes:
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "not a snapshot"),
        (lambda data: b"PK" + data[2:], "not a snapshot"),
        (lambda data: data[:5], "the snapshot is truncated: it has 5 bytes"),
        (lambda data: data[:20], "the snapshot is truncated: it has 20 bytes"),
        (lambda data: data[:-1], "the snapshot is truncated: .* bytes, expected"),
        (lambda data: data + b"x", "the snapshot is too long: .* bytes, expected"),
        (lambda data: data[:8] + b"\2" + data[9:], "the snapshot has version 2, this runtime reads 1"),
        (lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], "is corrupted: its checksum"),
        (lambda data: resealed(data.replace(b'{"batch"', b'["batch"')), "the snapshot's header is not JSON"),
        (lambda data: resealed(data.replace(b"conv_state", b"conv_stata")), "the snapshot's states differ"),
        (lambda data: resealed(data.replace(b'"position": 10', b'"position": -1')), "position is -1"),
    ],
)
def test_damage(session: Session, damage: Callable[[bytes], bytes], message: str) -> None:
    before = session.snapshot()
    with pytest.raises(SnapshotError, match=message):
        session.restore(damage(before))
    assert session.snapshot() == before


def test_every_flipped_byte_is_noticed(session: Session) -> None:
    data = session.snapshot()
    for at in range(0, len(data), 7):
        with pytest.raises(SnapshotError):
            session.restore(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])


def test_another_model(session: Session, tmp_path: Path) -> None:
    other = Session.load(save(toy(seed=5), tmp_path / "other"))
    with pytest.raises(SnapshotError, match="the snapshot belongs to another model"):
        other.restore(session.snapshot())


def test_another_batch(session: Session, built: Path) -> None:
    with pytest.raises(SnapshotError, match="the snapshot holds batch 1, this session has batch 3"):
        Session.load(built, batch=3).restore(session.snapshot())


def test_a_missing_file(session: Session, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="nowhere: cannot be read"):
        session.restore(tmp_path / "nowhere")


def test_a_copy_of_the_directory_is_the_same_model(session: Session, built: Path, tmp_path: Path) -> None:
    for file in built.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    moved = Session.load(tmp_path)
    moved.restore(session.snapshot())
    assert moved.position == 10
