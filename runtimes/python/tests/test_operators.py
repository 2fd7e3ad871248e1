"""A library of operators that is named, and the decode graph that a manifest may name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lhruntime import ArgumentError, FormatError, Session
from lhruntime.manifest import read_manifest
from toy_models import Toy, save


@pytest.fixture
def copy(model: Toy, tmp_path: Path) -> Path:
    return save(model, tmp_path / "copy")


def test_a_library_that_cannot_be_loaded(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"operators: .*missing\.so cannot be loaded"):
        Session.load(copy, operators=tmp_path / "missing.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(ArgumentError, match=r"text\.so cannot be loaded"):
        Session.load(copy, operators=tmp_path / "text.so")


def test_a_decode_graph_is_optional(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    assert all(pair.decode is None for pair in read_manifest(copy).graphs.values())
    manifest["graphs"]["decode"] = manifest["graphs"]["step"]
    path.write_text(json.dumps(manifest))
    pair = read_manifest(copy).graphs[manifest["target"]]
    assert pair.decode == pair.step
    manifest["graphs"]["decode"] = {"file": "elsewhere.onnx"}
    path.write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"graphs\.decode\.file is 'elsewhere.onnx', which files does not list"):
        read_manifest(copy)
