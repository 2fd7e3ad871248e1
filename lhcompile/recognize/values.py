"""What a node of a captured program stands for while it is being recognized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lhcompile.artifacts import module_path, source_line
from lhcompile.errors import RecognizeError
from lhcompile.sizes import Size

__all__ = [
    "Factor",
    "FirTaps",
    "LongTaps",
    "Parts",
    "Plain",
    "Scores",
    "Spectrum",
    "Value",
    "Window",
    "axes_of",
    "refuse",
    "tensor_sizes",
]

Taps = Callable[[int], Tensor]
"""length of the sequence → a tensor that depends on weights and length alone"""


@dataclass(frozen=True)
class Plain:
    """An ordinary tensor of the new graph, over times 0 … t-1.

    `extra` positions follow in the old graph that the new one never computes; a later cut removes them there.
    Where it is negative, that many at the end are not in the old graph; a later shift fills their place.
    """

    node: Node
    extra: int = 0


@dataclass(frozen=True)
class FirTaps:
    """weight [out, channels / groups, taps] in torch's order (the last is the current token), bias, groups"""

    weight: Tensor
    bias: Tensor | None
    groups: int


@dataclass(frozen=True)
class LongTaps:
    """at(t): taps aligned with the signal's axes (1 where shared); along the time axis index is the lag, and the
    last t - 1 entries of `size(t)` are the negative lags of the transform."""

    at: Taps
    size: Callable[[int], int]
    complex: bool = False


@dataclass(frozen=True)
class Window:
    """Times start … stop-1 of (taps * source), source extended by zeros; taps None is the source itself.

    `origin` is the old node that holds the taps: the operator is named after it.
    """

    source: Node
    axis: int
    start: int
    stop: int
    taps: FirTaps | LongTaps | None = None
    origin: Node | None = None


@dataclass(frozen=True)
class Spectrum:
    """The transform of `source` along `axis`, times gain(t); `size(t)` is the transform's length."""

    source: Node
    axis: int
    size: Callable[[int], int]
    onesided: bool
    scale: Callable[[int], float]
    gain: Taps | None = None


@dataclass(frozen=True)
class Parts:
    """view_as_real of a complex window: its last axis holds real and imaginary part."""

    window: Window


@dataclass(frozen=True)
class Factor:
    """A tensor of the new graph with a letter for each of its axes."""

    node: Node
    letters: str

    def size(self, letter: str) -> Size:
        return tensor_sizes(self.node)[self.letters.index(letter)]


@dataclass(frozen=True)
class Scores:
    """Every position against every other: scale · left · right, summed over the letters that `axes` lacks.

    axes: letters of each axis of the old graph's tensor, several where they are merged, none where its size is 1
    keys: the letter that counts the positions looked back at, once a causal mask has said which; "" before
    weights: softmax has been taken over `keys`
    """

    left: Factor
    right: Factor
    axes: tuple[str, ...]
    scale: float = 1.0
    keys: str = ""
    weights: bool = False

    def size(self, letter: str) -> Size:
        return (self.left if letter in self.left.letters else self.right).size(letter)

    @property
    def times(self) -> tuple[str, str]:
        """The letters of the two time axes, in the order of the axes."""
        first, second = (letter for letter in "".join(self.axes) if self.size(letter).has_time)
        return first, second


Value = Plain | Window | Spectrum | Parts | Scores | list[Any]


def refuse(node: Node, reason: str) -> RecognizeError:
    """The error for `node`, with where it comes from."""
    target: Any = node.target
    name = target._opname if isinstance(target, torch._ops.OpOverload) else getattr(target, "__name__", str(target))
    return RecognizeError(reason, module=module_path(node), operator=name, line=source_line(node))


def axes_of(sizes: tuple[Size, ...], node: Node) -> tuple[int, int]:
    """(batch axis, time axis) of a tensor; the same axis twice where both are merged.

    Raises RecognizeError naming `node` when there is not exactly one of each.
    """
    batch = [i for i, size in enumerate(sizes) if size.has_batch]
    time = [i for i, size in enumerate(sizes) if size.has_time]
    shape = "[" + ", ".join(map(str, sizes)) + "]"
    if not time:
        raise refuse(node, f"its result {shape} has no time axis: it reduces or picks over time")
    if len(time) > 1:
        raise refuse(node, f"its result {shape} has {len(time)} time axes: it compares positions with one another")
    if len(batch) != 1:
        raise refuse(node, f"its result {shape} has {len(batch)} batch axes instead of one")
    return batch[0], time[0]


def tensor_sizes(node: Node) -> tuple[Size, ...]:
    """The axis laws of a tensor node."""
    sizes = node.meta.get("sizes")
    if not isinstance(sizes, tuple):
        raise refuse(node, "is not one tensor")
    return sizes


def as_spectrum_gain(value: Tensor) -> Tensor:
    """Constants that multiply spectra, in double precision."""
    return value.to(torch.complex128 if value.is_complex() else torch.float64)
