"""Checkpoints cut into pieces, NAME.pt.part0, NAME.pt.part1, …: files too large for one are published so."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lhcompile.errors import CheckpointError

__all__ = ["is_piece", "joined", "pieces_of"]

PIECE = re.compile(r"(.+)\.part(\d+)$")


def is_piece(path: Path, suffixes: Collection[str]) -> bool:
    """Whether the name is a checkpoint's, followed by .part and a number."""
    match = PIECE.match(path.name)
    return match is not None and Path(match[1]).suffix in suffixes


def pieces_of(piece: Path) -> tuple[Path, ...]:
    """All pieces of the file that one is of, in order. Raises CheckpointError when one is missing between them."""
    match = PIECE.match(piece.name)
    name = match[1] if match else piece.name
    numbered = {
        int(found[2]): path
        for path in piece.parent.iterdir()
        if (found := PIECE.match(path.name)) and found[1] == name and path.is_file()
    }
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
