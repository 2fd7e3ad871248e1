"""Every way lhcompile can fail, one class per kind.

A message is one line a user can act on: what is wrong, where, and what to do. `exit_code` is what the
command line returns: 2 for the user's mistake, 3 for a budget or a parity gate that was not met.
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CaptureError",
    "CheckpointError",
    "ConfigError",
    "DestinationError",
    "DistillError",
    "LhcompileError",
    "LowerError",
    "ParityError",
    "RecognizeError",
]


class LhcompileError(Exception):
    """Base of all errors that are meant for the user."""

    exit_code = 2


class ConfigError(LhcompileError):
    """A configuration value is missing, unknown or contradicts another."""


class CheckpointError(LhcompileError):
    """A checkpoint cannot be read or does not hold the weights its family needs."""


class CaptureError(LhcompileError):
    """A module cannot be turned into a program of its sizes."""


class RecognizeError(LhcompileError):
    """An operator mixes time in a way that is not understood, or looks ahead.

    `module`, `operator` and `line` say where; the message holds all three.
    """

    def __init__(self, reason: str, *, module: str, operator: str, line: str) -> None:
        self.reason, self.module, self.operator, self.line = reason, module, operator, line
        super().__init__(f"{module or 'the model'}: {operator}: {reason} ({line})")


class DistillError(LhcompileError):
    """Taps that no stable system of the allowed order can stand for."""


class LowerError(LhcompileError):
    """A program has no ONNX form for the chosen target."""


class DestinationError(LhcompileError):
    """The output directory cannot be written or would overwrite something."""


class BudgetError(LhcompileError):
    """No order keeps the model within the budget; the message names the best that was reached."""

    exit_code = 3


class ParityError(LhcompileError):
    """A stage's output differs from the stage before by more than its tolerance."""

    exit_code = 3
