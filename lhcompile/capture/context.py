"""Finding out how long a sequence a module takes, when nobody says."""

from __future__ import annotations

import torch

from lhcompile.errors import CaptureError

__all__ = ["UNBOUNDED_CONTEXT", "probe_context"]

UNBOUNDED_CONTEXT = 2048
"""Context assumed for a module that takes any length; `--context` sets another."""


def probe_context(module: torch.nn.Module) -> int:
    """The longest length at which module(ids [1, length]) returns values for each position.

    Doubles the length until the module refuses or `UNBOUNDED_CONTEXT` is reached, then bisects.
    Raises CaptureError, with the module's own words, when even a short sequence is refused.
    """
    good, bad, refusal = 0, UNBOUNDED_CONTEXT + 1, ""
    length = 8
    while length < bad:
        refusal_here = _refusal(module, length)
        if refusal_here is None:
            good, length = length, min(length * 2, UNBOUNDED_CONTEXT)
            if good == UNBOUNDED_CONTEXT:
                return good
        else:
            bad, refusal = length, refusal_here
            break
    if not good:
        raise CaptureError(f"the module does not run on token ids [1, 8]: {refusal}")
    while bad - good > 1:
        middle = (good + bad) // 2
        if _refusal(module, middle) is None:
            good = middle
        else:
            bad = middle
    return good


def _refusal(module: torch.nn.Module, length: int) -> str | None:
    """Why the module does not take this length, or None when it does."""
    try:
        out = module(torch.zeros(1, length, dtype=torch.int64))
    except Exception as error:  # the module is the user's: it may raise anything
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not isinstance(out, torch.Tensor):
        return f"it returns a {type(out).__name__}, not a tensor"
    if out.ndim != 3 or out.shape[:2] != (1, length):
        return f"its output has shape {list(out.shape)}, not [1, {length}, vocabulary]"
    return None
