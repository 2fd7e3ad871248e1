"""Python source text for training: what is installed on the machine that runs this, and nothing else.

Files are deduplicated by content. The held-out text is whole files of the standard library, chosen by the
hash of their content; a training file that shares a fifth of its long lines with them is dropped, so that a
copy of a held-out file vendored by some package is not trained on.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SMALLEST, LARGEST = 512, 300_000  # bytes of a file worth reading
LONG_LINE = 40  # characters; shorter lines are common to unrelated files
SHARED_LINES = 0.2
HELDOUT_LARGEST = 40_000


@dataclass(frozen=True)
class Source:
    """One file: its path below its root, its text, the SHA-256 of the text, and whether it is standard library."""

    name: str
    text: str
    digest: str
    standard: bool


def _sources(root: Path, standard: bool) -> Iterator[Source]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if standard and {"site-packages", "dist-packages"} & set(relative.parts):
            continue
        try:
            data = path.read_bytes()
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if SMALLEST <= len(data) <= LARGEST:
            yield Source(relative.as_posix(), text, hashlib.sha256(data).hexdigest(), standard)


def installed_sources() -> list[Source]:
    """Every distinct file of the standard library and of the installed packages, by hash order."""
    paths = sysconfig.get_paths()
    roots = [(Path(paths["stdlib"]), True)]
    roots += [(Path(p), False) for p in sorted({paths["purelib"], paths["platlib"]})]
    distinct: dict[str, Source] = {}
    for root, standard in roots:
        for source in _sources(root, standard):
            distinct.setdefault(source.digest, source)
    return [distinct[digest] for digest in sorted(distinct)]


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= LONG_LINE}


def split(sources: list[Source], heldout_bytes: int, train_bytes: int) -> tuple[list[Source], list[Source]]:
    """(training files, held-out files), each up to its number of bytes."""
    heldout: list[Source] = []
    total = 0
    for source in sources:
        size = len(source.text.encode())
        testing = {"test", "tests", "idlelib", "lib2to3", "encodings"} & set(Path(source.name).parts)
        if source.standard and not testing and size <= HELDOUT_LARGEST and total + size <= heldout_bytes:
            heldout.append(source)
            total += size
    kept_out = {source.digest for source in heldout}
    lines = set().union(*(_long_lines(source.text) for source in heldout)) if heldout else set()
    train: list[Source] = []
    total = 0
    for source in sorted(sources, key=lambda s: not s.standard):  # standard library first
        own = _long_lines(source.text)
        if source.digest in kept_out or len(own & lines) > SHARED_LINES * max(len(own), 1):
            continue
        if total >= train_bytes:
            break
        train.append(source)
        total += len(source.text.encode())
    return train, heldout


def joined(sources: list[Source]) -> bytes:
    """The files one after another, each ending in a newline."""
    return b"".join(source.text.rstrip("\n").encode() + b"\n" for source in sources)
