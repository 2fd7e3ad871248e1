"""Features of continuous signals, from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lhcompile.errors import ConfigError

__all__ = ["read_features"]


def read_features(path: Path, features: int) -> tuple[Tensor, Tensor]:
    """Both halves of a .npy file, float32 [sequences, time, features] each.

    The file holds [time, features], which is halved in time, or [sequences, time, features], of which the first and
    the last half of the sequences are taken.

    Raises ConfigError when the file cannot be read or holds anything else.
    """
    array = _array(path)
    if array.dtype.kind not in "fiu":
        raise ConfigError(f"{path} holds {array.dtype}; features are real numbers")
    if array.ndim not in (2, 3) or array.shape[-1] != features:
        raise ConfigError(
            f"{path} holds an array of shape {list(array.shape)}, expected [time, {features}] or "
            f"[sequences, time, {features}]"
        )
    values = torch.from_numpy(array.astype(np.float32))
    if not bool(torch.isfinite(values).all()):
        raise ConfigError(f"{path} holds NaN or infinite values")
    if values.ndim == 3 and len(values) == 1:
        values = values[0]
    half = len(values) // 2
    first, last = values[:half], values[-half:] if half else values[:0]
    return (first, last) if values.ndim == 3 else (first[None], last[None])


def _array(path: Path) -> np.ndarray:
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(f"cannot read features from {path}: {reason}; give them as .npy") from None
