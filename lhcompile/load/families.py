"""The families of checkpoints, each known by its keys."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lhcompile.artifacts import LoadedModel
from lhcompile.load.checkpoint import Checkpoint
from lhcompile.load.evo2_checkpoint import load_evo2, looks_like_evo2
from lhcompile.load.h3_checkpoint import load_h3, looks_like_h3
from lhcompile.load.hyenadna import load_hyenadna, looks_like_hyenadna
from lhcompile.load.long_conv_checkpoint import load_long_conv, looks_like_long_conv
from lhcompile.load.multihyena import load_multihyena, looks_like_multihyena
from lhcompile.load.s4_checkpoint import load_s4, looks_like_s4
from lhcompile.load.safari_checkpoint import load_safari, looks_like_safari
from lhcompile.load.striped_checkpoint import load_striped, looks_like_striped

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """recognizes: whether the keys are this family's; load: (checkpoint, --config, --context) → its module."""

    recognizes: Callable[[Checkpoint], bool]
    load: Callable[[Checkpoint, Path | None, int | None], LoadedModel]


FAMILIES = (
    Family(looks_like_h3, load_h3),
    Family(looks_like_multihyena, load_multihyena),  # before safari, whose keys it has, with fewer filters
    Family(looks_like_hyenadna, load_hyenadna),  # likewise: some of its files have safari's own keys
    Family(looks_like_long_conv, load_long_conv),
    Family(looks_like_safari, load_safari),
    Family(looks_like_striped, load_striped),
    Family(looks_like_evo2, load_evo2),
    Family(looks_like_s4, load_s4),
)
"""The first that recognizes a checkpoint loads it."""
