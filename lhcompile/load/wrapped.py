"""What training frameworks put around a state dict: wrappers, one inside the other, and the options of the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lhcompile.load.inert import StandIn

__all__ = ["options_in", "weights_in_wrappers"]

WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
OPTIONS = ("hyper_parameters", "hparams", "config")
"""Names under which files keep options, the first preferred."""
MARKS = frozenset({"model", "model_config", "layer", "d_model", "hidden_size"})
"""Options are a model's if one of these is among them; others are of the training alone."""
DEEPEST, LARGEST = 20, 100_000
"""Levels and values of options that are read at most: a pickle can hold itself, or one list a million times."""


def weights_in_wrappers(content: Mapping[Any, Any]) -> tuple[Mapping[Any, Any], tuple[str, ...], list[str]]:
    """(the innermost mapping, the names of the wrappers around it, notes on what else they hold)."""
    names: tuple[str, ...] = ()
    notes: list[str] = []
    for _ in range(DEEPEST):
        name = next((name for name in WRAPPERS if isinstance(content.get(name), Mapping)), None)
        if name is None:
            break
        others = sorted(str(key) for key in content if key != name)
        if others:
            notes.append(f"used only {name!r} of the file, not {', '.join(others)}")
        content, names = content[name], (*names, name)
    return content, names, notes


def options_in(content: Any) -> tuple[dict[str, Any], str]:
    """(the options of the model that a file holds beside its weights, the name they stand under); none: ({}, "").

    Only numbers, texts, and lists and mappings of them are options, also inside objects of foreign classes that were
    read as `StandIn`; anything else is left out.
    """
    for name in OPTIONS if isinstance(content, Mapping) else ():
        try:
            found = _Plain().of(content.get(name), DEEPEST)
        except ValueError:
            continue
        if isinstance(found, dict) and not MARKS.isdisjoint(found):
            return found, name
    return {}, ""


class _Plain:
    def __init__(self) -> None:
        self.left = LARGEST

    def of(self, value: Any, depth: int) -> Any:
        """The value without anything that is no plain data. Raises ValueError when nothing is left, or too much."""
        self.left -= 1
        if not depth or self.left < 0:
            raise ValueError("too deep or too large")
        if isinstance(value, StandIn):
            value = _held(value)
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, Mapping):
            return dict(self._kept(value.items(), depth))
        if isinstance(value, list | tuple):
            return [part for _, part in self._kept(enumerate(value), depth)]
        raise ValueError("no plain data")

    def _kept(self, pairs: Any, depth: int) -> Any:
        for name, part in pairs:
            try:
                yield str(name), self.of(part, depth - 1)
            except ValueError:
                if self.left < 0:
                    raise


def _held(value: StandIn) -> Any:
    """What an object of a foreign class held: the entries of a mapping, the value of a node, or its attributes."""
    state = value.state
    if isinstance(state, Mapping):
        return next((state[name] for name in ("_content", "_val") if name in state), state)
    return value.entries or state
