"""How the sizes in a program follow from the two that may change: batch and time.

Every size is  batch^p · (scale · time + offset)  with p ∈ {0, 1}; a plain constant has p = 0, scale = 0.
Two observations at different (batch, time) decide all three numbers.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

from torch.fx import Graph, Node

__all__ = ["BATCH", "TIME", "Point", "Size", "emit_size", "solve"]


@dataclass(frozen=True)
class Point:
    """One choice of the two free sizes."""

    batch: int
    time: int


@dataclass(frozen=True)
class Size:
    """batch^p · (scale · time + offset)"""

    batch: int
    scale: int
    offset: int

    def at(self, point: Point) -> int:
        return point.batch**self.batch * (self.scale * point.time + self.offset)

    @property
    def has_time(self) -> bool:
        return self.scale != 0

    @property
    def has_batch(self) -> bool:
        return self.batch != 0

    @property
    def fixed(self) -> bool:
        return not (self.has_time or self.has_batch)

    def __str__(self) -> str:
        inner = "T" if self.scale == 1 else f"{self.scale}·T"
        body = str(self.offset) if not self.scale else inner + (f"{self.offset:+d}" if self.offset else "")
        if not self.batch:
            return body
        return "B" if body == "1" else f"B·({body})"


BATCH = Size(1, 0, 1)
TIME = Size(0, 1, 0)


def solve(first: int, second: int, at_first: Point, at_second: Point) -> Size | None:
    """The size law through two observations, or None when none of the form fits.

    Constant before batch before time, so the simplest law wins. Numbers that grow with batch · time may also lie on
    a line in time alone; the line with the smaller offset is meant.
    """
    if first == second:
        return Size(0, 0, first)
    if first * at_second.batch == second * at_first.batch and first % at_first.batch == 0:
        return Size(1, 0, first // at_first.batch)
    laws = []
    for power in (0, 1):
        (mine, rest), (theirs, more) = divmod(first, at_first.batch**power), divmod(second, at_second.batch**power)
        affine = _affine(mine, theirs, at_first.time, at_second.time)
        if not (rest or more) and affine is not None:
            laws.append(Size(power, *affine))
    return min(laws, key=lambda law: abs(law.offset), default=None)


def _affine(first: int, second: int, time_first: int, time_second: int) -> tuple[int, int] | None:
    scale, rest = divmod(second - first, time_second - time_first)
    if rest or scale <= 0:
        return None
    return scale, first - scale * time_first


def emit_size(graph: Graph, size: Size, batch: Node, time: Node) -> Node | int:
    """Nodes that compute `size` from the nodes holding batch and time; meta["size"] carries the law."""
    if size.fixed:
        return size.offset

    value: Node | int = size.offset
    if size.has_time:
        value = time if size.scale == 1 else graph.call_function(operator.mul, (time, size.scale))
        value = value if not size.offset else graph.call_function(operator.add, (value, size.offset))
    if size.has_batch:
        value = batch if value == 1 else graph.call_function(operator.mul, (batch, value))
    assert isinstance(value, Node)
    value.meta["size"] = size
    return value
