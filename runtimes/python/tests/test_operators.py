"""A library of operators that is named, and the decode graph that a manifest may name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lhruntime import ArgumentError, FormatError, Session
from lhruntime.manifest import PastSpec, read_manifest
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


def test_a_past_in_tensors_of_its_own_is_of_a_state(copy: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    window, other = manifest["states"][0]["input"], "another"
    assert manifest["states"][0]["shape"][:1] == ["batch"]
    positions = manifest["states"][0]["shape"][1]
    good = {"inputs": [f"{window}.past_{age}" for age in range(positions, 0, -1)], "output": "newest"}
    manifest["graphs"]["past"] = {window: good}
    path.write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"graphs\.past is of decode, which is missing"):
        read_manifest(copy)
    manifest["graphs"]["decode"] = manifest["graphs"]["step"]
    path.write_text(json.dumps(manifest))
    past = read_manifest(copy).graphs[manifest["target"]].past
    assert past == {window: PastSpec(tuple(good["inputs"]), "newest")}
    for name, entry in (
        (other, good),
        (window, good | {"inputs": good["inputs"][1:]}),
        (window, good | {"inputs": []}),
        (window, good | {"inputs": list(range(positions))}),
    ):
        manifest["graphs"]["past"] = {name: entry}
        path.write_text(json.dumps(manifest))
        with pytest.raises(FormatError, match=rf"graphs\.past\.{name}\.inputs is "):
            read_manifest(copy)
    manifest["graphs"]["past"] = {window: good | {"dtype": "bfloat16"}}
    path.write_text(json.dumps(manifest))
    assert read_manifest(copy).graphs[manifest["target"]].past[window].dtype == "bfloat16"
    for dtype, kept in (("float16", "float32"), ("bfloat16", "float16"), (16, "float32")):
        manifest["graphs"]["past"], manifest["states"][0]["dtype"] = {window: good | {"dtype": dtype}}, kept
        path.write_text(json.dumps(manifest))
        with pytest.raises(FormatError, match=rf"graphs\.past\.{window}\.dtype is "):
            read_manifest(copy)
    manifest["states"][0]["dtype"] = "float32"
    manifest["graphs"]["past"] = {window: {"inputs": good["inputs"]}}
    path.write_text(json.dumps(manifest))
    with pytest.raises(FormatError, match=r"output is missing"):
        read_manifest(copy)
