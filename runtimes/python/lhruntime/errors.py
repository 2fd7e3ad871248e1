"""Every way lhruntime can fail, one class per kind; each message is one line a user can act on."""

from __future__ import annotations

__all__ = ["ArgumentError", "BusyError", "EngineError", "FormatError", "LhruntimeError", "SnapshotError"]


class LhruntimeError(Exception):
    """Base of all errors that are meant for the user."""


class FormatError(LhruntimeError):
    """A built directory is incomplete, altered, or contradicts its manifest."""


class ArgumentError(LhruntimeError, ValueError):
    """A call was given a value it cannot use: a wrong shape, a token id out of range, a bad option."""


class SnapshotError(LhruntimeError):
    """A snapshot is damaged or belongs to another model or another batch."""


class EngineError(LhruntimeError):
    """An engine is closed, or what runs in it failed."""


class BusyError(EngineError):
    """An engine has no room for one more waiting prompt: try again later."""
