"""Models of other shapes are judged on text that none was trained on, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from bench import shapes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that was never trained, with the loss it has on a text."""
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "heldout.txt").write_bytes(bytes(range(256)) * 8)
    options = shapes.HYENA | {"d_model": 16, "n_layer": 1, "d_inner": 16, "order": 2}
    torch.manual_seed(0)
    model = shapes.SHAPES["Hyena, order 2"].module(options).eval()
    torch.save(shapes.stored(model), folder / "model.pt")
    (folder / "config.yaml").write_text(yaml.safe_dump(options))
    text = torch.tensor(list((tmp_path / "heldout.txt").read_bytes()))
    (folder / "figures.json").write_text(json.dumps({"loss": shapes.loss_on(model, text, shapes.CONTEXT)}))
    return folder


def test_another_text_is_refused(folder: Path) -> None:
    (folder.parent / "heldout.txt").write_bytes(b"another text, which may have been seen. " * 60)
    with pytest.raises(SystemExit, match=r"heldout\.txt is not the text that .* was measured on"):
        shapes.built(folder)
    assert not (folder / "built").exists()


def test_text_is_left_alone_where_every_model_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> object:
        raise AssertionError("the text was divided again")

    monkeypatch.setattr(shapes, "split", never)
    before = (folder.parent / "heldout.txt").read_bytes()
    shapes.train_missing({"Hyena, order 2": folder}, folder.parent / "heldout.txt", 0.1)
    assert (folder.parent / "heldout.txt").read_bytes() == before


def test_a_part_is_not_trained_on_a_text_that_has_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "installed_sources", lambda: [])
    monkeypatch.setattr(shapes, "split", lambda *_: ([], []))
    folders = {"Hyena, order 2": folder, "tied heads": folder.parent / "missing"}
    with pytest.raises(SystemExit, match="no longer what models in"):
        shapes.train_missing(folders, folder.parent / "heldout.txt", 0.1)


def test_the_loss_that_was_noted_is_the_loss_of_the_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very text gets past the gate, to the build."""
    def reached(*_: object, **__: object) -> object:
        raise InterruptedError

    monkeypatch.setattr(shapes, "build", reached)
    with pytest.raises(InterruptedError):
        shapes.built(folder)
