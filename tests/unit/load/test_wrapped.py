"""State dicts inside wrappers and in pieces, and options that lie in the checkpoint itself."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load import load
from lhcompile.load.checkpoint import read_checkpoint

Save = Callable[..., str]
State = dict[str, Tensor]
OPTIONS: dict[str, Any] = {"_name_": "lm", "d_model": 6, "layer": {"_name_": "hyena", "modulate": False, "w": 3.0}}


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (lambda s: {"module": under("module.", s), "ds_config": {}}, "used only 'module' of the file, not ds_config"),
        (lambda s: {"model": {"state_dict": under("model.", s)}, "x": 1}, "used only 'model' of the file, not x"),
        (lambda s: {"state_dict": {"model": s, "optimizer": {}}}, "used only 'model' of the file, not optimizer"),
    ],
)
def test_wrappers_inside_wrappers(state: State, saved: Save, wrap: Callable[[State], Any], note: str) -> None:
    loaded = load(saved(wrap(state)))
    ids = torch.randint(16, (2, 9))
    assert torch.equal(loaded.module(ids), load(saved(state, "plain.pt")).module(ids))
    assert note in loaded.notes


def test_a_mapping_that_holds_itself(saved: Save) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    content["hyper_parameters"] = [content]
    with pytest.raises(CheckpointError, match="'model' is a dict, not a tensor; not a state dict"):
        read_checkpoint(Path(saved(content)))


@pytest.mark.parametrize("name", ["hyper_parameters", "hparams", "config"])
@pytest.mark.parametrize("inside", [True, False])
def test_options_in_the_file(state: State, saved: Save, name: str, inside: bool) -> None:
    """A filter without its decay is another filter."""
    options = {"model": OPTIONS, "train": {"seed": 1}} if inside else OPTIONS
    loaded = load(saved({"state_dict": under("model.", state), "epoch": 1, name: options}, "last.ckpt"))
    assert loaded.config["modulate"] is False
    assert loaded.notes[:2] == (
        "used only 'state_dict' of the file, not epoch",
        "read the options in last.ckpt itself",
    )
    ids = torch.randint(16, (2, 9))
    assert not torch.allclose(loaded.module(ids), load(saved(state)).module(ids), atol=1e-3)


def test_options_in_the_file_stand_behind_any_other(
    state: State, saved: Save, config_file: Callable[..., Path], tmp_path: Path
) -> None:
    path = saved({"state_dict": state, "hyper_parameters": {"model": OPTIONS}})
    loaded = load(path, config=config_file("modulate: true", "other.yml"))
    assert loaded.config["modulate"] is True
    assert "did not use the options in the file, as --config is given" in loaded.notes
    config_file("modulate: true", "model.yaml")
    assert load(path).config["modulate"] is True
    assert load(str(tmp_path)).config["modulate"] is False  # the folder has two YAML files and none of a known name


def test_options_of_the_training_alone_are_none(state: State, saved: Save) -> None:
    loaded = load(saved({"state_dict": state, "hyper_parameters": {"lr": 1e-3, "modulate": False}}))
    assert loaded.config["modulate"] is True
    assert "used only 'state_dict' of the file, not hyper_parameters" in loaded.notes


def test_options_in_the_file_that_contradict_it(state: State, saved: Save) -> None:
    path = saved({"state_dict": state, "hyper_parameters": {"model": {**OPTIONS, "d_model": 8}}}, "last.ckpt")
    with pytest.raises(ConfigError, match=r"last\.ckpt: the option d_model is 8, but .* makes it 6"):
        load(path)


def test_options_in_objects_of_foreign_classes(state: State, saved: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that hold a mapping or a value, a mapping of its own class, and what is no option: nothing is imported."""
    module = types.ModuleType("foreignlib")
    for name, base in (("Mapping", object), ("Node", object), ("Dict", dict)):
        setattr(module, name, type(name, (base,), {"__module__": "foreignlib"}))
    monkeypatch.setitem(sys.modules, "foreignlib", module)

    def node(value: Any) -> Any:
        made = module.Mapping() if isinstance(value, dict) else module.Node()
        key, held = ("_content", {k: node(v) for k, v in value.items()}) if isinstance(value, dict) else ("_val", value)
        made.__dict__ |= {key: held, "_metadata": module.Dict(kind=Any)}
        return made

    for kind, options in (("nodes", node({"model": OPTIONS})), ("dict", module.Dict(model=OPTIONS, x=torch.zeros(2)))):
        saved({"state_dict": state, "hyper_parameters": options}, f"{kind}.ckpt")
    path = Path(saved({"a": 1})).parent
    monkeypatch.delitem(sys.modules, "foreignlib")
    for kind in ("nodes", "dict"):
        assert load(str(path / f"{kind}.ckpt")).config["modulate"] is False
    assert "foreignlib" not in sys.modules


def test_too_many_options_are_none(state: State, saved: Save) -> None:
    """Lists that hold one list many times take no time and no memory."""
    many: Any = [1]
    for _ in range(18):
        many = [many] * 10
    path = saved({"state_dict": state, "hyper_parameters": {"model": {**OPTIONS, "x": many}}})
    assert load(path).config["modulate"] is True


def pieces(path: Path, cuts: int, first: int = 0) -> list[Path]:
    data = path.read_bytes()
    size = len(data) // cuts + 1
    made = []
    for number in range(cuts):
        made.append(path.with_name(f"{path.name}.part{number + first}"))
        made[-1].write_bytes(data[number * size :][:size])
    path.unlink()
    return made


@pytest.mark.parametrize("first", [0, 1])
def test_a_file_in_pieces(state: State, saved: Save, tmp_path: Path, first: int) -> None:
    whole, ids = saved(state, "big.pt"), torch.randint(16, (2, 9))
    wanted = load(whole).module(ids)
    parts = pieces(Path(whole), 11, first)
    for given in (parts[0], parts[4], tmp_path):
        loaded = load(str(given))
        assert torch.equal(loaded.module(ids), wanted)
        assert loaded.source == str(given)


def test_options_in_pieces(state: State, saved: Save) -> None:
    parts = pieces(Path(saved({"state_dict": state, "hparams": OPTIONS}, "big.pt")), 3)
    loaded = load(str(parts[0]))
    assert loaded.config["modulate"] is False
    assert "read the options in big.pt.part0 itself" in loaded.notes


def test_pieces_that_are_missing_or_cut(state: State, saved: Save, tmp_path: Path) -> None:
    parts = pieces(Path(saved(state, "big.pt")), 4)
    parts[3].write_bytes(parts[3].read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"big\.pt\.part0: the file is truncated"):
        load(str(parts[0]))
    parts[2].unlink()
    for given in (parts[0], tmp_path):
        with pytest.raises(CheckpointError, match=r"big\.pt: the piece \.part2 is missing"):
            load(str(given))


def test_pieces_without_room(state: State, saved: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = pieces(Path(saved(state, "big.pt")), 2)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lhcompile.load.pieces.shutil.copyfileobj", full)
    with pytest.raises(CheckpointError, match=r"part0: its 2 pieces cannot be joined in .* \(No space left"):
        load(str(parts[0]))


def test_a_file_in_pieces_has_the_options_of_the_whole(state: State, saved: Save) -> None:
    path = Path(saved(state, "m.pt"))
    content = path.read_bytes()
    path.unlink()
    for number, part in enumerate((content[:1000], content[1000:])):
        path.with_name(f"m.pt.part{number}").write_bytes(part)
    path.with_suffix(".json").write_text('{"w": 3.0}')
    piece = path.with_name("m.pt.part0")
    assert read_checkpoint(piece).config == {"w": 3.0}
    path.with_name("m.pt.part01").write_bytes(b"another")
    with pytest.raises(CheckpointError, match=r"m\.pt\.part01 and m\.pt\.part1 are the same piece"):
        read_checkpoint(piece)
