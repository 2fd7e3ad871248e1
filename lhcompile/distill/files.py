"""Files of filters: taps as .npy in, modal systems as .npz out.

A file of systems is an uncompressed .npz with

    poles, residues         complex128 [filters, width]: h_t = Σ_k residues_k · poles_k^t, conjugates side by side,
                            unused entries 0
    direct                  float64 [filters], added to h_0
    head                    float64 [filters, k − 1], added to h_1 … h_{k−1} where a head of k taps was asked for
    error, bound            float64 [filters], as in `distill.result.Reduction`
    hankel_singular_values  float64 [filters, k]

It appears whole or not at all: it is written beside its place, flushed to disk and renamed.
"""

from __future__ import annotations

import os
import secrets
import zipfile
from pathlib import Path

import numpy as np

from lhcompile.distill.result import Reduction
from lhcompile.errors import ConfigError, DestinationError

__all__ = ["arrays", "check_writable", "read_array", "write_systems"]


def read_array(path: Path) -> np.ndarray:
    """The array of an .npy file. Raises ConfigError, one line, for everything else."""
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ConfigError(f"cannot read {path}: {reason or 'it is not an .npy file of numbers'}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise ConfigError(f"cannot read {path}: it is an archive; give one array as .npy")
    return array


def arrays(reduction: Reduction) -> dict[str, np.ndarray]:
    """What is stored of a reduction, by name."""
    system = reduction.system
    tensors = {
        "poles": system.poles,
        "residues": system.residues,
        "direct": system.direct,
        "head": reduction.head,
        "error": reduction.error,
        "bound": reduction.bound,
        "hankel_singular_values": reduction.hankel_singular_values,
    }
    return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}


def check_writable(path: Path, force: bool) -> None:
    """Raises DestinationError, one line, where `write_systems` will not write; call it before long work.

    A file is replaced only with `force`, and only if it is a file of systems.
    """
    path = _resolved(path)
    if path.suffix != ".npz":
        raise DestinationError(f"{path} does not end in .npz, as files of systems do")
    if path.is_dir():
        raise DestinationError(f"{path} is a folder; name a file to write")
    if not path.parent.is_dir():
        raise DestinationError(f"cannot write {path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise DestinationError(f"cannot write {path}: {path.parent} is read-only")
    if path.exists() and not force:
        raise DestinationError(f"{path} exists; --force replaces a file of systems")
    if path.exists() and not _holds_systems(path):
        raise DestinationError(f"{path} is no file of systems; --force will not replace it, name another")


def write_systems(path: Path, reduction: Reduction, *, force: bool = False) -> None:
    """Write a reduction as a file of systems; see the module's text. Raises DestinationError where it may not."""
    check_writable(path, force)
    path = _resolved(path)
    partial = path.parent / f".{path.name}.partial-{secrets.token_hex(6)}"
    try:
        with partial.open("xb") as stream:
            np.savez(stream, **arrays(reduction))  # type: ignore[arg-type]
            stream.flush()
            os.fsync(stream.fileno())
        check_writable(path, force)  # again: the work took time, and someone may have come first
        partial.replace(path)
    except OSError as error:
        raise DestinationError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def _resolved(path: Path) -> Path:
    """The absolute path, links followed, so that a rename replaces the file and not the link to it."""
    return Path(os.path.realpath(path))


def _holds_systems(path: Path) -> bool:
    """True if the file has the names of a file of systems."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {"poles.npy", "residues.npy", "direct.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
