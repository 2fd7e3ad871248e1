"""Loading: from a file or a factory to a torch module that maps token ids to logits, or features to values."""

from __future__ import annotations

import re
from pathlib import Path

from lhcompile.artifacts import LoadedModel, Signal
from lhcompile.errors import CheckpointError, ConfigError

__all__ = ["load"]

FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


def load(
    model: str,
    *,
    checkpoint: Path | None = None,
    config: Path | None = None,
    context: int | None = None,
    features: int | None = None,
) -> LoadedModel:
    """The model a user names.

    model: a checkpoint file or folder of a known family, a torch.export archive (.pt2), or `package.module:factory`
    checkpoint: the state dict for a factory's module
    config: YAML or JSON with options the file does not hold, or the factory's keyword arguments
    context: the longest sequence to compile for, where the source does not say or a shorter one will do
    features: channels of the continuous signal that a factory's module takes; None for token ids

    Raises CheckpointError for what is wrong with a file, ConfigError for what is wrong with the options.
    """
    if context is not None and context < 2:
        raise ConfigError(f"context {context}: a sequence of at least 2 is needed")
    path = Path(model)
    if FACTORY.match(model) and not path.exists():
        from lhcompile.load.module import load_module

        return load_module(model, checkpoint, config, context, Signal(features))
    if checkpoint is not None:
        raise ConfigError(f"{model}: --checkpoint goes with package.module:factory, not with a file")
    if features is not None:
        raise ConfigError(f"{model}: --features goes with package.module:factory; a file says what it takes")
    if path.suffix == ".pt2":
        from lhcompile.load.archive import load_archive

        if config is not None:
            raise ConfigError(f"{model}: --config has no meaning for a torch.export archive")
        return load_archive(path, context)
    return _load_family(path, config, context)


def _load_family(path: Path, config: Path | None, context: int | None) -> LoadedModel:
    from lhcompile.load.checkpoint import SUFFIXES, is_checkpoint, read_checkpoint
    from lhcompile.load.families import FAMILIES

    if path.is_file() and not is_checkpoint(path):
        raise CheckpointError(f"{path}: not a checkpoint: the name ends in none of {', '.join(SUFFIXES)}, .pt2")
    found = read_checkpoint(path, given=config is not None)
    for family in FAMILIES:
        if family.recognizes(found):
            return family.load(found, config, context)
    first = next(iter(found.tensors))
    raise CheckpointError(
        f"{path}: the keys ({first!r}, …) are of no known family; give package.module:factory and --checkpoint"
    )
