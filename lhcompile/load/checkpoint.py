"""Reads state dicts from files nobody vouches for, and fills modules with them.

Only weights are read: torch's weights-only loader and safetensors, both mapped from the file, so that a tensor takes
memory when it is used. Nothing in a file is executed.
"""

from __future__ import annotations

import io
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lhcompile.errors import CheckpointError
from lhcompile.extremes import extremes
from lhcompile.load.configuration import read_mapping
from lhcompile.load.folder import options_of, weights_in
from lhcompile.load.inert import read_inert, tensors_of
from lhcompile.load.mapped import MappedFiles
from lhcompile.load.pieces import is_piece, joined, whole_name
from lhcompile.load.wrapped import options_in, weights_in_wrappers

__all__ = ["SUFFIXES", "Checkpoint", "fill", "is_checkpoint", "read_checkpoint", "shape_text", "without_prefix"]

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
PREFIXES = ("", "model.", "module.", "_orig_mod.", "module.model.", "model._orig_mod.", "_orig_mod.model.", "backbone.")
# Names from the standard library that data may hold; any other means the file wants to run something.
HARMLESS_MODULES = {"_codecs", "argparse", "collections", "copyreg", "datetime", "decimal", "enum", "pathlib", "typing"}
EXTRA = "_extra_state"  # what fused layers keep beside their weights, often as io.BytesIO
HARMLESS_BUILTINS = {"bytearray", "complex", "dict", "frozenset", "list", "object", "range", "set", "slice", "tuple"}
DAMAGE = (
    RuntimeError, EOFError, KeyError, IndexError, ValueError, TypeError, AttributeError, OSError, AssertionError,
    OverflowError, struct.error,
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """tensors: by key, as stored; notes: what else was in the file and is not used.

    path: the file or the folder; config: the options that lay beside the weights in `config_file`, which is the file
    itself where they stood in it; empty if none did
    """

    path: Path
    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    config_file: Path = Path("config.json")


def is_checkpoint(path: Path) -> bool:
    """Whether the name is one of a checkpoint, or of a piece of one."""
    return path.suffix in SUFFIXES or is_piece(path, SUFFIXES)


def read_checkpoint(path: Path, given: bool = False) -> Checkpoint:
    """The state dict of a .pt, .pth, .ckpt, .bin or .safetensors file, or of a folder of such; its wrappers removed.

    A folder has the layout of Hugging Face (`weights_in`), or holds one checkpoint. The options in it, or beside a
    single file, become `config` (`options_of`); beside a file of torch only if no configuration is `given`. Without
    either, options of the model that a training framework left in the file do. A piece stands for all of its file.
    Entries named *_extra_state belong to no weight and are dropped.

    Raises CheckpointError, in one line, when a file is missing, damaged, no checkpoint, or would run code; ConfigError
    when config.json is no mapping.
    """
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path}: the checkpoint does not exist")
    found = _read_folder(path) if path.is_dir() else _read_file(path)
    beside = options_of(path if path.is_dir() else whole_name(path))
    if beside.is_file() and (path.is_dir() or whole_name(path).suffix == ".safetensors" or not given):
        notes = () if path.is_dir() else (f"read the options in {beside.name} beside the file",)
        return replace(found, config=read_mapping(beside), config_file=beside, notes=found.notes + notes)
    if not found.config:
        return found
    if given:
        notes = ("did not use the options in the file, as --config is given",)
        return replace(found, config={}, notes=found.notes + notes)
    return replace(found, notes=(*found.notes, f"read the options in {found.config_file.name} itself"))


def _read_folder(folder: Path) -> Checkpoint:
    weights = weights_in(folder, SUFFIXES)
    tensors: dict[str, Tensor] = {}
    notes = list(weights.notes)
    parts = [_read_file(file) for file in weights.files]
    for file, part in zip(weights.files, parts, strict=True):
        for key in part.tensors:
            if key in tensors:
                raise CheckpointError(f"{file}: {key!r} stands in another shard too")
        tensors |= part.tensors
        notes += [note for note in part.notes if note not in notes]
    for key, name in weights.shards.items():
        if key not in tensors and not key.endswith(EXTRA):
            raise CheckpointError(f"{folder / name}: {key!r}, which the index says it holds, is not there")
    own = (parts[0].config, parts[0].config_file) if len(parts) == 1 else ({}, folder)
    return Checkpoint(folder, tensors, tuple(notes), *own)


def _read_file(path: Path) -> Checkpoint:
    if is_piece(path, SUFFIXES):
        with joined(path) as whole:
            try:
                return replace(_read_file(whole), path=path, config_file=path)
            except CheckpointError as error:
                raise CheckpointError(str(error).replace(str(whole), str(path))) from None
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    if path.suffix == ".safetensors":
        return _unwrapped(path, _read_safetensors(path), [])
    content, notes = _read_torch(path)
    return _unwrapped(path, content, notes)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: truncated, or not a safetensors file ({_line(error)})") from None


def _read_torch(path: Path) -> tuple[Any, list[str]]:
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        start = file.read(4)
    if not zipped and start.startswith(b"PK"):
        raise CheckpointError(f"{path}: the file is truncated")
    if not zipped and not start.startswith(b"\x80"):
        raise CheckpointError(f"{path}: not a checkpoint: neither a torch file nor safetensors")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.serialization.safe_globals([io.BytesIO]):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped), []
    except pickle.UnpicklingError as error:
        return _read_beside_foreign_classes(path, zipped, error)
    except DAMAGE as error:
        if "TorchScript" in str(error):
            raise CheckpointError(f"{path}: a TorchScript archive, not a checkpoint; save its state_dict") from None
        raise CheckpointError(f"{path}: truncated, or not a checkpoint ({_line(error)})") from None


def _read_beside_foreign_classes(path: Path, zipped: bool, error: Exception) -> tuple[Any, list[str]]:
    """The pickle names classes that are no weights: refuse what could act, skip what is data."""
    names = _foreign_names(path, zipped, error)
    if not names:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint ({_line(error)})") from None
    acting = [name for name in names if _could_act(name)]
    if acting or not zipped:
        shown = ", ".join((acting or names)[:3])
        raise CheckpointError(f"{path}: opening it would run code ({shown}); save a plain state_dict") from None
    try:
        content = read_inert(path)
        weights, wrappers, _ = weights_in_wrappers(content) if isinstance(content, Mapping) else ({}, (), [])
        if not wrappers:
            raise CheckpointError(
                f"{path}: holds objects of {', '.join(names[:3])} and no state_dict; save a plain state_dict"
            )
        tensors = tensors_of(path, weights)
    except (*DAMAGE, pickle.UnpicklingError, zipfile.BadZipFile) as damage:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint ({_line(damage)})") from None
    return _with_weights(content, wrappers, tensors), [f"skipped objects of {', '.join(names)}"]


def _with_weights(content: Any, wrappers: tuple[str, ...], tensors: Mapping[str, Any]) -> Any:
    """The content with the tensors inside the wrappers."""
    if not wrappers:
        return tensors
    return {**content, wrappers[0]: _with_weights(content[wrappers[0]], wrappers[1:], tensors)}


def _foreign_names(path: Path, zipped: bool, error: Exception) -> list[str]:
    if zipped:
        try:
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except (*DAMAGE, pickle.UnpicklingError):
            pass
    return re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]


def _could_act(name: str) -> bool:
    top, _, rest = name.partition(".")
    if name == "_io.BytesIO":
        return False
    if top == "builtins" or not rest:  # torch drops the "builtins." of a name
        return (rest or top) not in HARMLESS_BUILTINS
    return top in sys.stdlib_module_names and top not in HARMLESS_MODULES


def _unwrapped(path: Path, content: Any, notes: list[str]) -> Checkpoint:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")
    options, name = options_in(content)
    content, _, others = weights_in_wrappers({key: value for key, value in content.items() if not name or key != name})
    notes = [*notes, *others]
    tensors: dict[str, Tensor] = {}
    dropped = 0
    for key, value in content.items():
        if str(key).endswith(EXTRA):
            dropped += 1
        elif isinstance(value, Tensor):
            tensors[str(key)] = value
        else:
            raise CheckpointError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor; not a state dict")
    if dropped:
        notes = [*notes, f"dropped what layers keep beside their weights (*{EXTRA})"]
    if not tensors:
        raise CheckpointError(f"{path}: the state dict is empty")
    return Checkpoint(path, tensors, tuple(notes), options, path)


def without_prefix(checkpoint: Checkpoint, known: Collection[str]) -> Checkpoint:
    """Removes the wrapper's prefix from the keys: the first prefix under which a known key is found."""
    for prefix in PREFIXES:
        tensors = {k.removeprefix(prefix): v for k, v in checkpoint.tensors.items() if k.startswith(prefix)}
        if not tensors.keys().isdisjoint(known):
            left = sorted(k for k in checkpoint.tensors if not k.startswith(prefix))
            notes = (f"skipped keys outside {prefix!r}: {', '.join(left)}",) if left else ()
            return replace(checkpoint, tensors=tensors, notes=checkpoint.notes + notes)
    return checkpoint


def fill(module: nn.Module, checkpoint: Checkpoint, kind: str) -> None:
    """Copies the tensors into the module, strictly, widened to its dtypes. `kind` says what the keys looked like.

    A module made on the meta device gets its memory here, tensor by tensor; parameters that it shares stay shared.

    Raises CheckpointError naming the key when one is missing, unexpected, of a wrong shape or kind, or not finite.
    """
    wanted = module.state_dict(keep_vars=True)
    _check_keys(wanted, checkpoint, kind)
    files, own = MappedFiles(), dict[int, Tensor]()
    for key, value in wanted.items():
        stored = checkpoint.tensors[key]
        _check_tensor(key, value, checkpoint, kind)
        if not value.is_meta:
            value.data.copy_(stored)
        elif id(value) not in own:
            widened = stored.to(value.dtype, copy=True)
            own[id(value)] = nn.Parameter(widened) if isinstance(value, nn.Parameter) else widened
        files.let_go(stored)
    if own:
        module.load_state_dict({key: own.get(id(value), value) for key, value in wanted.items()}, assign=True)


def _check_keys(wanted: Mapping[str, Tensor], checkpoint: Checkpoint, kind: str) -> None:
    missing = [key for key in wanted if key not in checkpoint.tensors]
    if missing:
        expected = f"of shape {shape_text(wanted[missing[0]].shape)}"
        raise CheckpointError(
            f"{checkpoint.path}: missing key {missing[0]!r} {expected}{_more(missing)}; it looked like {kind}"
        )
    unexpected = sorted(key for key in checkpoint.tensors if key not in wanted)
    if unexpected:
        raise CheckpointError(
            f"{checkpoint.path}: unexpected key {unexpected[0]!r}{_more(unexpected)}; it looked like {kind}"
        )


def _check_tensor(key: str, value: Tensor, checkpoint: Checkpoint, kind: str) -> None:
    found, path = checkpoint.tensors[key], checkpoint.path
    if found.shape != value.shape:
        shapes = f"{shape_text(found.shape)}, expected {shape_text(value.shape)}"
        raise CheckpointError(f"{path}: {key!r} has shape {shapes}; it looked like {kind}")
    if found.is_complex() and not value.is_complex():
        raise CheckpointError(f"{path}: {key!r} is complex, expected {value.dtype}")
    if value.is_floating_point() and not found.is_floating_point():
        raise CheckpointError(f"{path}: {key!r} is {found.dtype}, expected {value.dtype}")
    if not bool(extremes(found).isfinite().all()):
        raise CheckpointError(f"{path}: {key!r} holds NaN or infinite values")


def shape_text(shape: Collection[int]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 1} more" if len(keys) > 1 else ""


def _line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]
