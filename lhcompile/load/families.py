"""The families of checkpoints, each known by its keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lhcompile.artifacts import LoadedModel
from lhcompile.load.checkpoint import Checkpoint
from lhcompile.load.safari_checkpoint import load_safari, looks_like_safari

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """recognizes: whether the keys are this family's; load: (checkpoint, --config, --context) → its module."""

    recognizes: Callable[[Checkpoint], bool]
    load: Callable[[Checkpoint, Path | None, int | None], LoadedModel]


FAMILIES = (Family(looks_like_safari, load_safari),)
"""The first that recognizes a checkpoint loads it."""
