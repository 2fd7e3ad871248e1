"""Checkpoints cut into pieces, NAME.pt.part0, NAME.pt.part1, …: files too large for one are published so."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lhcompile.errors import CheckpointError

__all__ = ["is_piece", "joined", "pieces_of", "whole_name"]

PIECE = re.compile(r"(.+)\.part(\d+)$")


def is_piece(path: Path, suffixes: Collection[str]) -> bool:
    """Whether the name is a checkpoint's, followed by .part and a number."""
    match = PIECE.match(path.name)
    return match is not None and Path(match[1]).suffix in suffixes


def whole_name(path: Path) -> Path:
    """The file that a piece is of; any other file as it is."""
    match = PIECE.match(path.name)
    return path.with_name(match[1]) if match else path


def pieces_of(piece: Path) -> tuple[Path, ...]:
    """All pieces of the file that one is of, in order.

    Raises CheckpointError when one is missing between them, or two have one number.
    """
    name = whole_name(piece).name
    numbered: dict[int, Path] = {}
    for path in sorted(piece.parent.iterdir()):
        found = PIECE.match(path.name)
        if found and found[1] == name and path.is_file():
            other = numbered.setdefault(int(found[2]), path)
            if other != path:
                raise CheckpointError(f"{piece.parent / name}: {other.name} and {path.name} are the same piece")
    first = 0 if 0 in numbered else 1
    for number in range(first, max(numbered) + 1):
        if number not in numbered:
            raise CheckpointError(f"{piece.parent / name}: the piece .part{number} is missing")
    return tuple(numbered[number] for number in sorted(numbered))


@contextmanager
def joined(piece: Path) -> Iterator[Path]:
    """The whole file that a piece is of, in a temporary folder; what is mapped from it stays when it is gone.

    Raises CheckpointError when a piece is missing or there is no room.
    """
    pieces = pieces_of(piece)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / pieces[0].with_suffix("").name
        try:
            with whole.open("wb") as out:
                for path in pieces:
                    with path.open("rb") as part:
                        shutil.copyfileobj(part, out, 1 << 24)
        except OSError as error:
            raise CheckpointError(
                f"{piece}: its {len(pieces)} pieces cannot be joined in {folder} ({error.strerror}); "
                "set TMPDIR to a folder with room"
            ) from None
        yield whole
