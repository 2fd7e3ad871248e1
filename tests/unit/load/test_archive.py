"""torch.export archives: those that load, and those that would do more than that."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lhcompile.artifacts import Signal
from lhcompile.errors import CheckpointError, ConfigError
from lhcompile.load import load
from lhcompile.load.safari import HyenaLM

Make = Callable[..., HyenaLM]
Edit = Callable[[dict[str, Any]], None]
IDS = torch.randint(16, (2, 7), generator=torch.Generator().manual_seed(3))


def exported(module: nn.Module, path: Path, *inputs: Tensor, dynamic: bool = True, limit: int | None = 12) -> str:
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seq", max=limit)}
    inputs = inputs or (IDS,)
    shapes = tuple(dims for _ in inputs) if dynamic else None
    torch.export.save(torch.export.export(module, inputs, dynamic_shapes=shapes), path)
    return str(path)


@pytest.fixture
def archive(tiny: Make, tmp_path: Path) -> str:
    return exported(tiny(), tmp_path / "model.pt2")


def edited(path: str, edit: Edit) -> None:
    """Rewrites the archive's program."""
    rewritten(path, lambda name, data: _changed(data, edit) if name.endswith("models/model.json") else data)


def _changed(data: bytes, edit: Edit) -> bytes:
    program = json.loads(data)
    edit(program)
    return json.dumps(program).encode()


def rewritten(path: str, change: Callable[[str, bytes], bytes], **more: bytes) -> None:
    with zipfile.ZipFile(path) as old:
        root = old.namelist()[0].split("/")[0]
        records = {name: change(name, old.read(name)) for name in old.namelist()}
    records |= {f"{root}/{name}": data for name, data in more.items()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in records.items():
            new.writestr(name, data)


def refused(path: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_an_archive_loads(tiny: Make, archive: str) -> None:
    model, loaded = tiny(), load(archive)
    other = torch.randint(16, (3, 12))
    torch.testing.assert_close(loaded.module(other), model(other))
    assert (loaded.family, loaded.context_length) == ("export", 12)
    assert loaded.parameters == sum(p.numel() for p in model.parameters())
    torch.export.export(loaded.module, (other,))  # capture exports it again at a static length


def test_context(tiny: Make, archive: str) -> None:
    assert load(archive, context=6).context_length == 6
    with pytest.raises(ConfigError, match=r"context 13 is beyond .*model.pt2's own limit of 12"):
        load(archive, context=13)
    with pytest.raises(ConfigError, match=r"--config has no meaning for a torch\.export archive"):
        load(archive, config=Path("x.yaml"))


def test_an_archive_of_features(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    loaded = load(exported(model, tmp_path / "model.pt2", torch.randn(2, 7, 3)))
    assert loaded.signal == Signal(3)
    assert loaded.context_length == 12
    torch.testing.assert_close(loaded.module(torch.ones(1, 5, 3)), model(torch.ones(1, 5, 3)))
    dims = {axis: torch.export.Dim(f"axis{axis}") for axis in range(3)}
    free = torch.export.export(nn.Tanh(), (torch.randn(2, 7, 3),), dynamic_shapes=(dims,))
    torch.export.save(free, tmp_path / "any.pt2")
    refused(str(tmp_path / "any.pt2"), r"was exported for the shape \[s.*\]; make batch and seq dynamic")
    with pytest.raises(ConfigError, match=r"--features goes with package\.module:factory; a file says what it takes"):
        load(str(tmp_path / "model.pt2"), features=3)


class Returning(nn.Module):
    """An unlimited model that returns its logits in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 16)

    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"logits": self.table(input_ids)}


def test_structured_output_and_no_limit(tmp_path: Path) -> None:
    model = Returning()
    loaded = load(exported(model, tmp_path / "a.pt2", limit=None))
    assert loaded.context_length is None
    torch.testing.assert_close(loaded.module(IDS), model.table(IDS))


class Pair(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


def test_programs_of_other_shapes(tiny: Make, tmp_path: Path) -> None:
    static = exported(tiny(), tmp_path / "a.pt2", dynamic=False)
    refused(static, r"was exported for the shape \[2, 7\]; make batch and seq dynamic: torch.export.export\(")
    refused(exported(Pair(), tmp_path / "b.pt2", IDS, IDS), "takes 2 inputs, expected one: input_ids int64")
    floats = exported(nn.Linear(7, 3), tmp_path / "c.pt2", torch.ones(2, 7), dynamic=False)
    refused(floats, "takes torch.float32 of 2 dimensions, expected input_ids int64")
    refused(exported(tiny().double(), tmp_path / "d.pt2"), "is torch.float64; export the model in float32")
    broken = tiny()
    broken.backbone.ln_f.weight.data[0] = float("nan")
    refused(exported(broken, tmp_path / "e.pt2"), "'backbone.ln_f.weight' holds NaN or infinite values")


def test_no_archives(tmp_path: Path, archive: str) -> None:
    refused(str(tmp_path / "none.pt2"), "the archive does not exist")
    (tmp_path / "text.pt2").write_text("hello")
    refused(str(tmp_path / "text.pt2"), "truncated, or not a torch.export archive")
    data = Path(archive).read_bytes()
    Path(archive).write_bytes(data[: len(data) // 2])
    refused(archive, "truncated, or not a torch.export archive")
    torch.save({"a": torch.ones(1)}, tmp_path / "state.pt2")
    refused(str(tmp_path / "state.pt2"), "not a torch.export archive of format pt2")


class Acts:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def first_size(program: dict[str, Any], text: str) -> None:
    sizes = program["graph_module"]["graph"]["tensor_values"]["input_ids"]["sizes"]
    sizes[0]["as_expr"]["expr_str"] = text


def first_node(program: dict[str, Any], field: str, text: str) -> None:
    next(n for n in program["graph_module"]["graph"]["nodes"] if "embedding" in n["target"])[field] = text


def hide_in_metadata(program: dict[str, Any], text: str) -> None:
    values = program["graph_module"]["graph"]["sym_int_values"]
    values["metadata"] = {"as_expr": {"expr_str": text, "hint": None}}


ACTING: dict[str, tuple[Callable[[dict[str, Any], str], None], str, str]] = {
    "expression": (first_size, "__import__('os').mkdir({trace!r})", "holds the expression"),
    "attribute": (first_size, "Max.__class__", "holds the expression"),
    "attribute of a number": (first_size, "1.0.__class__.__base__.__subclasses__()", "holds the expression"),
    "name": (first_size, "Symbol('x')", "holds the expression"),
    "hidden": (hide_in_metadata, "__import__('os').mkdir({trace!r})", "holds the expression"),
    "operator": (lambda p, t: first_node(p, "target", t), "torch.os.mkdir", "holds the operator 'torch.os.mkdir'"),
    "hub": (lambda p, t: first_node(p, "target", t), "torch.hub.load", "holds the operator"),
    "dunder": (lambda p, t: first_node(p, "target", t), "torch.ops.aten.add.__class__", "holds the operator"),
    "file": (lambda p, t: first_node(p, "target", t), "torch.ops.aten.from_file.default", "holds the operator"),
    "node name": (lambda p, t: first_node(p, "name", t), "a = __import__('os').mkdir({trace!r})", "holds the name"),
    "node attribute": (lambda p, t: first_node(p, "name", t), "torch.load", "holds the name 'torch.load'"),
}


@pytest.mark.parametrize("name", ACTING)
def test_programs_that_would_act(archive: str, tmp_path: Path, name: str) -> None:
    edit, text, message = ACTING[name]
    trace = tmp_path / "ran"
    edited(archive, lambda program: edit(program, text.format(trace=str(trace))))
    refused(archive, f"loading it could run code: models/model.json {message}")
    assert not trace.exists()


def test_guards_are_not_run(archive: str, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    edited(archive, lambda program: program.update(guards_code=[f"__import__('os').mkdir({str(trace)!r}) is None"]))
    load(archive).module(IDS)
    assert not trace.exists()


def test_pickled_parts(archive: str, tmp_path: Path) -> None:
    trace = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save(((Acts(trace),), {}), buffer)
    good = Path(archive).read_bytes()
    parts = {
        "data/sample_inputs/model.pt": "a pickle that is not plain tensors",
        "data/weights/model.pt": "pickled weights",
        "data/constants/model.pt": "pickled weights",
        "data/aotinductor/model/a.so": "compiled code",
    }
    for part, message in parts.items():
        Path(archive).write_bytes(good)
        rewritten(archive, lambda name, data: data, **{part: buffer.getvalue()})
        refused(archive, f"loading it could run code: {part} holds {message}")
    for part in ("weights", "constants"):
        Path(archive).write_bytes(good)
        payload = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
        config = json.dumps({"config": {"x": payload}}).encode()
        end = f"model_{part}_config.json"
        rewritten(archive, lambda name, data, end=end, config=config: config if name.endswith(end) else data)
        refused(archive, f"data/{part}/{end} holds 'x' in pickled form")
    assert not trace.exists()


def test_the_older_format_cannot_be_slipped_in(archive: str) -> None:
    with zipfile.ZipFile(archive, "a") as file:
        file.writestr("version", "1.0")
    refused(archive, "not a torch.export archive")


def test_the_environment_is_left_as_it_was(archive: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    load(archive)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
