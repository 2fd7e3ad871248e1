"""Trying whether an operator treats every position, and every row of the batch, on its own.

A table of known operators would be long and never complete. Instead the operator is run at a small size on random
inputs: changing the inputs at one (row, position) may change the output only there, permuting the positions of the
inputs must permute the output, and more positions behind must leave the ones before as they are. Together they say
that it is one function applied at each position, whatever the length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lhcompile.recognize.values import axes_of, refuse
from lhcompile.sizes import Point, Size

__all__ = ["check_pointwise", "doubled"]

TRIAL = Point(2, 5)
LONGER = Point(2, 11)
_ROW, _POSITION = 1, 3
_ORDER = [3, 0, 4, 2, 1]
LEAK = 1e-6
"""Operators run in double precision, where kernels round to 1e-15 of the largest output, differently each time their
inputs lie elsewhere in memory. A neighbour's influence below this share is not one in single precision."""
Run = Callable[[Point, list[Tensor]], object]


def check_pointwise(
    node: Node,
    run: Run,
    inputs: Sequence[tuple[tuple[Size, ...], torch.dtype]],
    outputs: Sequence[tuple[Size, ...]],
) -> None:
    """Raise RecognizeError unless `run` is one function of each position.

    run:     the operator on its token-dependent inputs, at a trial size
    inputs:  axis laws and dtype of each input; outputs: axis laws of each result
    """
    in_axes = [axes_of(sizes, node) for sizes, _ in inputs]
    trial = _Trial(node, run, in_axes, [_one_per_token(sizes, node) for sizes in outputs])
    judged = False
    generator = torch.Generator().manual_seed(0)
    for draw in (_normal, _positive):
        given = [draw([size.at(LONGER) for size in sizes], dtype, generator) for sizes, dtype in inputs]
        longer = [_cells(x, axes, LONGER) for x, axes in zip(given, in_axes, strict=True)]
        cells = [x[:, : TRIAL.time] for x in longer]
        base = trial.outputs(cells)
        if base[0].is_floating_point() and all(bool(out.isnan().all()) for out in base if out.is_floating_point()):
            continue
        judged = True
        fresh = [draw(list(x.shape[2:]), x.dtype, generator) for x in cells]
        trial.check_local(cells, base, fresh)
        trial.check_same_everywhere(cells, base)
        trial.check_any_length(longer, base)
    if not judged:
        raise refuse(node, "gives no number on any trial input, so it cannot be judged")


def _one_per_token(sizes: tuple[Size, ...], node: Node) -> tuple[int, int]:
    """(batch axis, time axis) of a result, refused unless it has as many positions as the sequence."""
    batch, time = axes_of(sizes, node)
    if sizes[time].offset:
        raise refuse(node, f"its result has {sizes[time]} positions: it is not one per token")
    return batch, time


@dataclass(frozen=True)
class _Trial:
    """An operator on cells [row, position, everything else…] of its inputs.

    in_axes, out_axes: (batch axis, time axis) of each input and result
    """

    node: Node
    run: Run
    in_axes: list[tuple[int, int]]
    out_axes: list[tuple[int, int]]

    def outputs(self, cells: list[Tensor]) -> list[Tensor]:
        """The cells of each result; the number of positions is that of the inputs."""
        point = Point(*cells[0].shape[:2])
        inputs = [_uncells(x, axes) for x, axes in zip(cells, self.in_axes, strict=True)]
        try:
            result = self.run(point, inputs)
        except Exception as error:  # any operator may refuse any input in its own words
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise refuse(self.node, f"does not run at another length: {first}") from error
        results: list[Any] = list(result) if isinstance(result, (tuple, list)) else [result]
        return [_cells(out, axes, point) for out, axes in zip(results, self.out_axes, strict=True)]

    def check_local(self, cells: list[Tensor], base: list[Tensor], fresh: list[Tensor]) -> None:
        """Another input at one place, `fresh`, changes the output there and nowhere else."""
        changed = [x.clone() for x in cells]
        for x, other in zip(changed, fresh, strict=True):
            whole = not (x.is_floating_point() or x.is_complex())
            x[_ROW, _POSITION] = (x[_ROW, _POSITION] == 0) if whole else other
        for old, new in zip(base, self.outputs(changed), strict=True):
            differs = ~_unmoved(old, new).flatten(2).all(-1)  # [row, position]
            differs[_ROW, _POSITION] = False
            if bool(differs[_ROW, :_POSITION].any()):
                raise refuse(self.node, "looks ahead: a later token changes an earlier output")
            if bool(differs[_ROW].any()):
                raise refuse(self.node, "mixes time in a way that is not understood")
            if bool(differs.any()):
                raise refuse(self.node, "mixes the rows of the batch")

    def check_same_everywhere(self, cells: list[Tensor], base: list[Tensor]) -> None:
        """Positions in another order give the outputs in that order."""
        for old, new in zip(base, self.outputs([x[:, _ORDER] for x in cells]), strict=True):
            if not _close(old[:, _ORDER], new):
                raise refuse(self.node, "acts differently at different positions")

    def check_any_length(self, longer: list[Tensor], base: list[Tensor]) -> None:
        """The outputs of a longer sequence begin with those of its beginning."""
        for old, new in zip(base, self.outputs(longer), strict=True):
            if not _close(old, new[:, : TRIAL.time]):
                raise refuse(self.node, "depends on the length of the sequence")


def doubled(x: Tensor) -> Tensor:
    """Single precision to double; everything else as it is."""
    return x.double() if x.dtype == torch.float32 else x


def _unmoved(old: Tensor, new: Tensor) -> Tensor:
    """Which entries are the same, but for rounding."""
    same = (old == new) | (old.isnan() & new.isnan())
    if not (old.is_floating_point() or old.is_complex()):
        return same
    largest = old.abs().nan_to_num(nan=0.0, posinf=0.0).max()
    return same | ((old - new).abs() <= LEAK * largest)


def _close(a: Tensor, b: Tensor) -> bool:
    double = torch.complex128 if a.is_complex() else torch.float64
    return torch.allclose(a.to(double), b.to(double), rtol=1e-4, atol=1e-5, equal_nan=True)


def _cells(x: Tensor, axes: tuple[int, int], point: Point) -> Tensor:
    """[…] → [row, position, everything else…]; a merged axis is row-major."""
    batch, time = axes
    if batch == time:
        return x.unflatten(batch, (point.batch, point.time, -1)).movedim((batch, batch + 1), (0, 1))
    x = x.unflatten(max(axes), ((point.batch if max(axes) == batch else point.time), -1))
    x = x.unflatten(min(axes), ((point.batch if min(axes) == batch else point.time), -1))
    batch, time = (batch, time + 1) if batch < time else (batch + 1, time)
    return x.movedim((batch, time), (0, 1))


def _uncells(x: Tensor, axes: tuple[int, int]) -> Tensor:
    """The inverse of `_cells`."""
    batch, time = axes
    if batch == time:
        return x.movedim((0, 1), (batch, batch + 1)).flatten(batch, batch + 2)
    low, high = min(axes), max(axes)
    moved = (batch, time + 1) if batch < time else (batch + 1, time)
    return x.movedim((0, 1), moved).flatten(high + 1, high + 2).flatten(low, low + 1)


def _normal(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        double = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(shape, dtype=double, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _positive(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return (torch.rand(shape, dtype=torch.float64, generator=generator) + 0.1).to(dtype)
    return _normal(shape, dtype, generator)
