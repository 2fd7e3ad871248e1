"""Files that are damaged, hostile or foreign."""

from __future__ import annotations

import io
import os
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lhcompile.errors import CheckpointError
from lhcompile.load import load
from lhcompile.load.checkpoint import read_checkpoint

Save = Callable[..., str]
State = dict[str, Tensor]


def refused(path: str | Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(str(path))
    assert "\n" not in str(caught.value)


class Acts:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, exec, eval, os.mkdir], ids=lambda f: f.__name__)
def test_code_in_a_pickle_never_runs(
    state: State, tmp_path: Path, function: Callable[..., Any], zipped: bool, wrapped: bool
) -> None:
    trace = tmp_path / "ran"
    text = {os.system: f"touch {trace}", os.mkdir: str(trace)}.get(function, f"open({str(trace)!r}, 'w')")
    content: Any = {**state, "x": Acts(function, text)}
    if wrapped:
        content = {"state_dict": state, "pytorch-lightning_version": "2", "hyper_parameters": Acts(function, text)}
    path = tmp_path / "model.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    refused(path, r"opening it would run code \([\w.]+\); save a plain state_dict")
    assert not trace.exists()


def test_a_bare_pickle_that_acts(tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    (tmp_path / "model.pt").write_bytes(pickle.dumps(Acts(os.mkdir, str(trace)), protocol=2))
    refused(tmp_path / "model.pt", "would run code|not a checkpoint")
    assert not trace.exists()


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package of a training framework that the reader does not have."""
    module = types.ModuleType("foreignlib")
    for name, base in (("Settings", dict), ("Items", list), ("Plain", object)):
        made = type(name, (base,), {"__module__": "foreignlib"})
        setattr(module, name, made)
    monkeypatch.setitem(sys.modules, "foreignlib", module)
    return module


def with_foreign_objects(state: State, module: types.ModuleType) -> dict[str, Any]:
    plain = module.Plain()
    plain.rate = 0.1
    extras = [module.Settings(a=1, b=plain), module.Items([1, plain]), {1, 2}, Path("x")]
    return {"state_dict": {f"model.{k}": v for k, v in state.items()}, "hyper_parameters": extras}


def test_foreign_hyper_parameters_are_skipped(
    state: State, saved: Save, foreign: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = with_foreign_objects(state, foreign)
    content["state_dict"]["model.backbone.ln_f.weight"] = torch.nn.Parameter(state["backbone.ln_f.weight"])
    path = saved(content, "last.ckpt")
    plain = saved(state)
    monkeypatch.delitem(sys.modules, "foreignlib")
    loaded = load(path)
    assert "foreignlib" not in sys.modules
    ids = torch.randint(16, (2, 9))
    assert torch.equal(loaded.module(ids), load(plain).module(ids))
    assert any(n.startswith("skipped objects of foreignlib.Items, foreignlib.Plain, ") for n in loaded.notes)


def test_views_of_one_storage_are_read_as_views(saved: Save, foreign: types.ModuleType) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": whole.t(), "b": whole[1:, ::2], "c": torch.zeros(0), "d": torch.ones(2, dtype=torch.bfloat16)}
    path = saved({"state_dict": state, "more": foreign.Plain()})
    for key, value in read_checkpoint(Path(path)).tensors.items():
        assert torch.equal(value, state[key])


def test_foreign_objects_among_the_weights(state: State, saved: Save, foreign: types.ModuleType) -> None:
    refused(saved({**state, "x": foreign.Plain()}), r"holds objects of foreignlib.Plain and no state_dict")
    refused(saved({"state_dict": {**state, "x": foreign.Plain()}}), r"'x' is a .*, not a tensor; not a state dict")


def test_a_whole_pickled_module(saved: Save) -> None:
    refused(saved(torch.nn.Linear(2, 2)), r"holds objects of .*Linear.* and no state_dict")


def test_foreign_classes_in_the_old_format(state: State, tmp_path: Path, foreign: types.ModuleType) -> None:
    content = with_foreign_objects(state, foreign)
    torch.save(content, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", r"opening it would run code \(foreignlib.Settings\)")


def test_the_old_format_loads(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load(str(tmp_path / "old.pt")).context_length == 12


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_truncated(state: State, tmp_path: Path, zipped: bool, share: float) -> None:
    path = tmp_path / "model.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    refused(path, "truncated")


def test_truncated_safetensors(state: State, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    refused(tmp_path / "model.safetensors", "truncated, or not a safetensors file")


def test_not_checkpoints(saved: Save, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("hello")
    refused(tmp_path / "text.pt", "not a checkpoint: neither a torch file nor safetensors")
    (tmp_path / "empty.pt").write_bytes(b"")
    refused(tmp_path / "empty.pt", "the file is empty")
    refused(tmp_path / "none.pt", "the checkpoint does not exist")
    (tmp_path / "model.onnx").write_text("x")
    refused(tmp_path / "model.onnx", "the name ends in none of .pt, .pth, .ckpt, .bin, .safetensors, .pt2")
    refused(saved([1, 2]), "holds a list, not a state dict")
    refused(saved({}), "the state dict is empty")
    refused(saved({"a": 3}), "'a' is a int, not a tensor; not a state dict")
    (tmp_path / "rubbish.pt").write_bytes(b"\x80\x02rubbish")
    refused(tmp_path / "rubbish.pt", "not a checkpoint")


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a.txt", "hello")
    refused(tmp_path / "a.pt", "not a checkpoint")


def test_extra_state_is_left_out(saved: Save) -> None:
    path = saved({"a": torch.ones(1), "b._extra_state": None})
    assert list(read_checkpoint(Path(path)).tensors) == ["a"]


def test_big_endian_storage_is_refused(
    state: State, tmp_path: Path, foreign: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    buffer = io.BytesIO()
    torch.save(with_foreign_objects(state, foreign), buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(tmp_path / "a.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    refused(tmp_path / "a.pt", "its numbers are big-endian")
