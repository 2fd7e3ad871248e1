"""Folders of checkpoints: which files are read, shards, and what lies beside them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load import load
from lhcompile.load.checkpoint import Checkpoint, fill, read_checkpoint
from lhcompile.load.safari import HyenaLM

State = dict[str, Tensor]
A, B = torch.arange(6.0).reshape(2, 3), torch.ones(2, dtype=torch.bfloat16)


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)


def shards(folder: Path, name: str, parts: dict[str, State], shown: dict[str, str] | None = None) -> None:
    """Writes the shards and their index; shown: what the index says in place of the truth."""
    for file, tensors in parts.items():
        save = safetensors.torch.save_file if file.endswith(".safetensors") else torch.save
        save(tensors, folder / file)
    truth = {key: file for file, tensors in parts.items() for key in tensors}
    content = {"metadata": {"total_size": 1}, "weight_map": truth if shown is None else shown}
    (folder / f"{name}.index.json").write_text(json.dumps(content))


def both(checkpoint: Checkpoint) -> bool:
    tensors = checkpoint.tensors
    return tensors.keys() == {"a", "b"} and torch.equal(tensors["a"], A) and torch.equal(tensors["b"], B)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_one_file_or_shards(tmp_path: Path, name: str) -> None:
    stem, end = name.split(".")
    save: Callable[..., Any] = safetensors.torch.save_file if end == "safetensors" else torch.save
    (tmp_path / "one").mkdir()
    save({"a": A, "b": B}, tmp_path / "one" / name)
    assert both(read_checkpoint(tmp_path / "one"))
    shards(tmp_path, name, {f"{stem}-1-of-2.{end}": {"a": A}, f"{stem}-2-of-2.{end}": {"b": B}})
    found = read_checkpoint(tmp_path)
    assert both(found)
    assert (found.path, found.config, found.notes) == (tmp_path, {}, ())


def test_the_only_yaml_file_of_a_folder_holds_the_options(tmp_path: Path) -> None:
    torch.save({"a": A, "b": B}, tmp_path / "model.pt")
    (tmp_path / "published.yml").write_text("eps: 0.1")
    found = read_checkpoint(tmp_path)
    assert (found.config, found.config_file) == ({"eps": 0.1}, tmp_path / "published.yml")
    (tmp_path / "other.yaml").write_text("eps: 0.2")
    assert read_checkpoint(tmp_path).config == {}
    (tmp_path / "config.json").write_text('{"eps": 0.3}')
    assert read_checkpoint(tmp_path).config == {"eps": 0.3}


def test_the_config_beside_the_weights(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    torch.save({"a": A, "b": B}, tmp_path / "other.pt")
    (tmp_path / "config.json").write_text('{"d_model": 3}')
    assert read_checkpoint(tmp_path).config == {"d_model": 3}
    beside = read_checkpoint(tmp_path / "model.safetensors")
    assert (beside.config, beside.notes) == ({"d_model": 3}, ("read the options in config.json beside the file",))
    assert read_checkpoint(tmp_path / "other.pt").config == {"d_model": 3}
    assert read_checkpoint(tmp_path / "other.pt", given=True).config == {}
    (tmp_path / "other.yml").write_text("d_model: 4")
    other = read_checkpoint(tmp_path / "other.pt")
    assert (other.config, other.config_file) == ({"d_model": 4}, tmp_path / "other.yml")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"config.json: the configuration is no mapping of options"):
        read_checkpoint(tmp_path)


def test_safetensors_come_before_a_pickle(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    torch.save({"a": A + 1}, tmp_path / "pytorch_model.bin")
    found = read_checkpoint(tmp_path)
    assert both(found)
    assert found.notes == ("did not read pytorch_model.bin",)


def test_the_only_checkpoint_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("x")
    refused(tmp_path, "the folder holds no weights (model.safetensors, pytorch_model.bin, or one file *.pt, *.pth")
    torch.save({"state_dict": {"a": A, "b": B}}, tmp_path / "weights.ckpt")
    assert both(read_checkpoint(tmp_path))
    torch.save({"a": A}, tmp_path / "last.ckpt")
    refused(tmp_path, "holds several checkpoints (last.ckpt, weights.ckpt); give one of them")


def test_folders_that_contradict_themselves(tmp_path: Path) -> None:
    one, two = "model-1.safetensors", "model-2.safetensors"
    name = "model.safetensors"
    shards(tmp_path, name, {one: {"a": A}, two: {"b": B}}, {"a": one, "b": two, "c": two})
    refused(tmp_path, f"{two}: 'c', which the index says it holds, is not there")
    shards(tmp_path, name, {one: {"a": A}, two: {"a": A, "b": B}}, {"a": one, "b": two})
    refused(tmp_path, f"{two}: 'a' stands in another shard too")
    shards(tmp_path, name, {one: {"a": A}}, {"a": one, "b": "model-3.safetensors"})
    refused(tmp_path, "index.json: the shard 'model-3.safetensors', which holds 'b', is missing")
    shards(tmp_path, name, {}, {"a": "../model-1.safetensors"})
    refused(tmp_path, "index.json: 'a' stands in '../model-1.safetensors', which is no file of this folder")
    shards(tmp_path, name, {}, {})
    refused(tmp_path, "index.json: has no weight_map from keys to files")
    (tmp_path / "model.safetensors.index.json").write_text("{")
    refused(tmp_path, "index.json: the index of the shards is not valid JSON")
    safetensors.torch.save_file({"a": A}, tmp_path / name)
    refused(tmp_path, "holds both model.safetensors and model.safetensors.index.json; give model.safetensors itself")
    assert list(read_checkpoint(tmp_path / name).tensors) == ["a"]


def test_a_folder_loads_as_its_family(tiny: Callable[..., HyenaLM], tmp_path: Path) -> None:
    """Options of config.json hold, and those of --config win over them."""
    model = tiny(modulate=False)
    half = {key: value.half().contiguous() for key, value in model.state_dict().items()}
    keys = sorted(half)
    parts = {f"model-{i}.safetensors": {key: half[key] for key in keys[i::2]} for i in range(2)}
    shards(tmp_path, "model.safetensors", parts)
    (tmp_path / "config.json").write_text('{"modulate": true, "layer_norm_epsilon": 0.1}')
    (tmp_path / "mine.yaml").write_text("{modulate: false, layer_norm_epsilon: 1e-5}")
    ids = torch.arange(12)[None]
    loaded = load(str(tmp_path), config=tmp_path / "mine.yaml")
    assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.module(ids), model.half().float()(ids), rtol=0, atol=1e-5)
    assert float((load(str(tmp_path)).module(ids) - loaded.module(ids)).abs().max()) > 1e-2


def test_extra_states_are_bytes_and_dropped(tmp_path: Path) -> None:
    blob = io.BytesIO(b"fused")
    torch.save({"a": A, "b": B, "fused._extra_state": blob}, tmp_path / "model.pt")
    found = read_checkpoint(tmp_path / "model.pt")
    assert both(found)
    assert found.notes == ("dropped what layers keep beside their weights (*_extra_state)",)
    torch.save({"a": A, "b": blob}, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "'b' is a BytesIO, not a tensor; not a state dict")


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
        self.two.weight = self.one.weight


def test_a_module_on_the_meta_device_gets_memory_of_its_own(tmp_path: Path) -> None:
    torch.save({"one.weight": A.bfloat16(), "two.weight": A.bfloat16()}, tmp_path / "model.pt")
    with torch.device("meta"):
        module = Tied()
    checkpoint = read_checkpoint(tmp_path / "model.pt")
    fill(module, checkpoint, "a test")
    assert module.one.weight is module.two.weight
    assert (module.one.weight.dtype, module.one.weight.device.type) == (torch.float32, "cpu")
    assert torch.equal(module.one.weight, A)
    checkpoint.tensors["one.weight"].zero_()
    assert torch.equal(module.one.weight, A)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'one.weight' is torch.int8, expected torch.float32"):
        fill(Tied(), Checkpoint(tmp_path, {"one.weight": A.to(torch.int8), "two.weight": A}), "a test")
