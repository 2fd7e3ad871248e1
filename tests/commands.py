"""The command line as a test sees it: what came out, the exit code, and whether a folder was touched."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from unittest import mock

from lhcompile.cli import main

__all__ = ["Outcome", "contents", "done", "refused", "run"]


@dataclass(frozen=True)
class Outcome:
    """What one command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def rows(self) -> dict[str, str]:
        """name → text of the lines `name  text` on stdout."""
        return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in self.out.splitlines() if "  " in line.strip())


def run(*arguments: object) -> Outcome:
    """`lhcompile ARGUMENTS…` through the entry point, in this process."""
    out, err, code = StringIO(), StringIO(), 0
    before = signal.getsignal(signal.SIGTERM)
    argv = ["lhcompile", *map(str, arguments)]
    try:
        with mock.patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    return Outcome(code, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Outcome:
    """A command that must succeed."""
    outcome = run(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def refused(outcome: Outcome, message: str, code: int = 2) -> None:
    """One line on stderr besides those of finished stages, it begins with error: and holds `message`, a regex."""
    lines = [line for line in outcome.err.splitlines() if not line.startswith("✓")]
    assert len(lines) == 1, outcome.err
    assert re.match("error: ", lines[0]), lines[0]
    assert re.search(message, lines[0]), lines[0]
    assert outcome.code == code
    assert outcome.out == ""


def contents(*folders: Path) -> dict[str, bytes | None]:
    """Everything below the folders, hidden or not: path → bytes, None for a folder."""
    found: Iterable[Path] = (path for folder in folders for path in (folder, *folder.rglob("*")))
    return {str(path): path.read_bytes() if path.is_file() else None for path in found}
