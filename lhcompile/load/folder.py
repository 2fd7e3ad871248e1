"""Which files of a folder hold a model's weights: the layout of Hugging Face, or one checkpoint by itself."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lhcompile.errors import CheckpointError
from lhcompile.load.pieces import is_piece, pieces_of

__all__ = ["Weights", "options_of", "weights_in"]

CONFIGS = ("config.json", "config.yaml", "config.yml")
WHOLE = ("model.safetensors", "pytorch_model.bin")
"""The published names, the first preferred; each may be cut into shards listed by NAME.index.json."""


@dataclass(frozen=True)
class Weights:
    """files: to read, in order; shards: key → name of its file, where an index says so; notes: what is not read"""

    files: tuple[Path, ...]
    shards: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def weights_in(folder: Path, suffixes: Collection[str]) -> Weights:
    """The weight files of a folder: of the published names if there are any, else the only one with such a suffix.

    Raises CheckpointError, in one line, when there are none or several, or a shard that the index names is missing.
    """
    whole = [folder / name for name in WHOLE if (folder / name).is_file()]
    indices = [folder / f"{name}.index.json" for name in WHOLE if (folder / f"{name}.index.json").is_file()]
    for name in WHOLE:
        one, index = folder / name, folder / f"{name}.index.json"
        if one in whole and index in indices:
            raise CheckpointError(f"{folder}: holds both {one.name} and {index.name}; give {one.name} itself")
        others = tuple(f"did not read {path.name}" for path in (*whole, *indices) if path not in (one, index))
        if one in whole:
            return Weights((one,), notes=others)
        if index in indices:
            shards = _shards(index)
            return Weights(tuple(folder / file for file in sorted(set(shards.values()))), shards, others)
    found = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in suffixes)
    found = found or _first_pieces(folder, suffixes)
    if not found:
        wanted = f"{', '.join(WHOLE)}, or one file *{', *'.join(suffixes)}"
        raise CheckpointError(f"{folder}: the folder holds no weights ({wanted})")
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise CheckpointError(f"{folder}: holds several checkpoints ({names}); give one of them")
    return Weights((found[0],))


def options_of(model: Path) -> Path:
    """The file with the options of a checkpoint or a folder; config.json of its folder, which may not exist, if none.

    The first of: for a checkpoint, the file that is named as it is but for .json, .yaml or .yml; config.json,
    config.yaml, config.yml; the only YAML file of the folder.
    """
    folder = model if model.is_dir() else model.parent
    own = () if model.is_dir() else tuple(model.with_suffix(Path(name).suffix) for name in CONFIGS)
    for path in (*own, *(folder / name for name in CONFIGS)):
        if path.is_file():
            return path
    only = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in (".yml", ".yaml"))
    return only[0] if len(only) == 1 else folder / CONFIGS[0]


def _first_pieces(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The first piece of each file that lies there in pieces."""
    return sorted({pieces_of(path)[0] for path in folder.iterdir() if path.is_file() and is_piece(path, suffixes)})


def _shards(index: Path) -> dict[str, str]:
    """key → file name, as the index says. Raises CheckpointError."""
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CheckpointError(f"{index}: the index of the shards is not valid JSON") from None
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index}: has no weight_map from keys to files")
    for key, name in shards.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index}: {key!r} stands in {name!r}, which is no file of this folder")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index}: the shard {name!r}, which holds {key!r}, is missing")
    return shards
