"""Factories of the user's own."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lhcompile.artifacts import Signal
from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load import load
from lhcompile.load.module import logits_of

Save = Callable[..., str]
Write = Callable[[str], Path]
SOURCE = """
import dataclasses
import torch

@dataclasses.dataclass
class Output:
    hidden: object
    logits: object

class Model(torch.nn.Module):
    def __init__(self, width=4, l_max=None, kind="tensor"):
        super().__init__()
        self.kind = kind
        self.embed = torch.nn.Embedding(8, width)
        self.head = torch.nn.Linear(width, 8)
        if l_max:
            self.config = {"max_seq_len": l_max, "block_size": l_max + 1}

    def forward(self, input_ids):
        y = self.head(self.embed(input_ids))
        return {"tensor": y, "tuple": ((y, None), None), "dataclass": Output(None, y), "dict": {"x": 1, "logits": y},
                "nothing": None}[self.kind]

def broken(**options):
    raise RuntimeError("no such thing\\nand more")

def number():
    return 3

limit = 3
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder with the user's module is the current one."""
    import sys

    (tmp_path / "mine.py").write_text(SOURCE)
    (tmp_path / "wrong.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in ("mine", "wrong"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dataclass", "dict"])
def test_logits_whatever_the_module_returns(config_file: Write, kind: str) -> None:
    loaded = load("mine:Model", config=config_file(f"{{width: 6, kind: {kind}}}"))
    logits = loaded.module(torch.zeros(2, 3, dtype=torch.long))
    assert logits.shape == (2, 3, 8)
    assert loaded.family == "module"
    assert loaded.parameters == 8 * 6 + 6 * 8 + 8
    assert loaded.source == "mine:Model"
    assert loaded.config == {"width": 6, "kind": kind}
    assert loaded.module.inner.embed.weight.shape == (8, 6)
    assert not loaded.module.inner.training
    assert loaded.notes == ("no checkpoint was given: the weights are the factory's own",)


def test_features_are_the_users_word(config_file: Write) -> None:
    assert load("mine:Model").signal == Signal()
    assert load("mine:Model", features=5).signal == Signal(5)


def test_logits_of() -> None:
    a, b = torch.zeros(1), torch.ones(1)
    pair = namedtuple("pair", ["hidden", "logits"])
    assert logits_of(pair(a, b)) is b
    assert logits_of((pair(a, b), None)) is b
    assert logits_of([None, [a]]) is a
    assert logits_of(SimpleNamespace(logits=b)) is b
    assert logits_of({"x": None, "y": a}) is a
    assert logits_of("text") is None


def test_no_tensor_at_all(config_file: Write) -> None:
    loaded = load("mine:Model", config=config_file("kind: nothing"))
    with pytest.raises(ConfigError, match=r"Model\.forward returns no tensor"):
        loaded.module(torch.zeros(1, 2, dtype=torch.long))


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "module.model."])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_checkpoints_with_wrappers_and_prefixes(saved: Save, prefix: str, wrapper: str | None) -> None:
    torch.manual_seed(1)
    state: dict[str, Any] = {k: v.double() for k, v in load("mine:Model").module.inner.state_dict().items()}
    content: dict[str, Any] = {prefix + key: value for key, value in state.items()}
    path = saved({wrapper: content} if wrapper else content)
    loaded = load("mine:Model", checkpoint=Path(path)).module.inner
    assert all(torch.equal(value, state[key].float()) for key, value in loaded.state_dict().items())


def test_faults_of_the_checkpoint(saved: Save, tmp_path: Path) -> None:
    state = dict(load("mine:Model").module.inner.state_dict())
    cases: list[tuple[dict[str, Any], str]] = [
        ({"head.weight": state["head.weight"]}, r"missing key 'embed.weight' of shape \[8, 4\] and 1 more; it looked"),
        ({**state, "x": torch.ones(1)}, "unexpected key 'x'; it looked like a state dict of Model"),
        ({**state, "head.bias": torch.ones(9)}, r"'head.bias' has shape \[9\], expected \[8\]"),
    ]  # fmt: skip
    for content, message in cases:
        with pytest.raises(CheckpointError, match=message):
            load("mine:Model", checkpoint=Path(saved(content)))
    with pytest.raises(CheckpointError, match=r"none\.pt: the checkpoint does not exist"):
        load("mine:Model", checkpoint=tmp_path / "none.pt")


def test_context_length(config_file: Write) -> None:
    assert load("mine:Model").context_length is None
    assert load("mine:Model", config=config_file("l_max: 32")).context_length == 32
    assert load("mine:Model", config=config_file("l_max: 32"), context=16).context_length == 16


def test_faults_of_the_factory(config_file: Write) -> None:
    cases = [
        ("absent:Model", "importing absent failed: ModuleNotFoundError: No module named 'absent'"),
        ("wrong:Model", "importing wrong failed: ModuleNotFoundError: No module named 'nothing_of_this_name'"),
        ("mine:Other", "mine has no 'Other'"),
        ("mine:broken", "calling broken failed: RuntimeError: no such thing$"),
        ("mine:number", "returned a int, not a torch.nn.Module"),
        ("mine:limit", "is a int, not a factory of a torch.nn.Module"),
    ]
    for spec, message in cases:
        with pytest.raises(ConfigError, match=message) as caught:
            load(spec)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"calling Model failed: TypeError: .*unexpected keyword argument 'depth'"):
        load("mine:Model", config=config_file("depth: 3"))
    with pytest.raises(ConfigError, match="the option width has an interpolation"):
        load("mine:Model", config=config_file("width: '${a.b}'"))


def test_checkpoint_beside_a_file(saved: Save) -> None:
    path = saved({"a": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"--checkpoint goes with package\.module:factory, not with a file"):
        load(path, checkpoint=Path(path))
