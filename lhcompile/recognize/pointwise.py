"""Trying whether an operator treats every position, and every row of the batch, on its own.

A table of known operators would be long and never complete. Instead the operator is run at a small size on random
inputs: changing the inputs at one (row, position) may change the output only there, and permuting the positions of
the inputs must permute the output. Both together say that it is one function applied at each position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from lhcompile.recognize.values import axes_of, refuse
from lhcompile.sizes import Point, Size

__all__ = ["TRIAL", "check_pointwise"]

TRIAL = Point(2, 5)
_ROW, _POSITION = 1, 3
_ORDER = [3, 0, 4, 2, 1]


def check_pointwise(
    node: Node,
    run: Callable[[list[Tensor]], object],
    inputs: Sequence[tuple[tuple[Size, ...], torch.dtype]],
    outputs: Sequence[tuple[Size, ...]],
) -> None:
    """Raise RecognizeError unless `run` is one function of each position.

    run:     the operator on its token-dependent inputs, at the trial size
    inputs:  axis laws and dtype of each input; outputs: axis laws of each result
    """
    in_axes = [axes_of(sizes, node) for sizes, _ in inputs]
    out_axes = [axes_of(sizes, node) for sizes in outputs]
    judged = False
    for draw in (_normal, _positive):
        given = [draw([size.at(TRIAL) for size in sizes], dtype) for sizes, dtype in inputs]
        base = _run(node, run, given, out_axes)
        if all(bool(out.isnan().all()) for out in base if out.is_floating_point()) and base[0].is_floating_point():
            continue
        judged = True
        cells = [_cells(x, axes) for x, axes in zip(given, in_axes, strict=True)]
        _check_local(node, run, cells, in_axes, out_axes, base, draw)
        _check_same_everywhere(node, run, cells, in_axes, out_axes, base)
    if not judged:
        raise refuse(node, "gives no number on any trial input, so it cannot be judged")


def _check_local(
    node: Node,
    run: Callable[[list[Tensor]], object],
    cells: list[Tensor],
    in_axes: list[tuple[int, int]],
    out_axes: list[tuple[int, int]],
    base: list[Tensor],
    draw: Callable[[list[int], torch.dtype], Tensor],
) -> None:
    changed = []
    for x in cells:
        x = x.clone()
        fresh = draw(list(x.shape[2:]), x.dtype)
        x[_ROW, _POSITION] = 1 - x[_ROW, _POSITION] if not x.is_floating_point() else fresh
        changed.append(x)
    after = _run(node, run, [_uncells(x, axes) for x, axes in zip(changed, in_axes, strict=True)], out_axes)
    for old, new in zip(base, after, strict=True):
        same = (old == new) | (old.isnan() & new.isnan()) if old.is_floating_point() else old == new
        differs = ~same.flatten(2).all(-1)  # [row, position]
        differs[_ROW, _POSITION] = False
        if bool(differs[_ROW, :_POSITION].any()):
            raise refuse(node, "looks ahead: a later token changes an earlier output")
        if bool(differs[_ROW].any()):
            raise refuse(node, "mixes time in a way that is not understood")
        if bool(differs.any()):
            raise refuse(node, "mixes the rows of the batch")


def _check_same_everywhere(
    node: Node,
    run: Callable[[list[Tensor]], object],
    cells: list[Tensor],
    in_axes: list[tuple[int, int]],
    out_axes: list[tuple[int, int]],
    base: list[Tensor],
) -> None:
    moved = [_uncells(x[:, _ORDER], axes) for x, axes in zip(cells, in_axes, strict=True)]
    for old, new in zip(base, _run(node, run, moved, out_axes), strict=True):
        if not torch.allclose(old[:, _ORDER].double(), new.double(), rtol=1e-4, atol=1e-5, equal_nan=True):
            raise refuse(node, "acts differently at different positions")


def _run(
    node: Node, run: Callable[[list[Tensor]], object], inputs: list[Tensor], out_axes: list[tuple[int, int]]
) -> list[Tensor]:
    try:
        result = run(inputs)
    except Exception as error:  # any operator may refuse any input in its own words
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise refuse(node, f"does not run at another length: {first}") from error
    results = list(result) if isinstance(result, (tuple, list)) else [result]
    return [_cells(out, axes) for out, axes in zip(results, out_axes, strict=True)]


def _cells(x: Tensor, axes: tuple[int, int]) -> Tensor:
    """[…] → [row, position, everything else…]; a merged axis is row-major."""
    batch, time = axes
    if batch == time:
        return x.unflatten(batch, (TRIAL.batch, TRIAL.time, -1)).movedim((batch, batch + 1), (0, 1))
    x = x.unflatten(max(axes), ((TRIAL.batch if max(axes) == batch else TRIAL.time), -1))
    x = x.unflatten(min(axes), ((TRIAL.batch if min(axes) == batch else TRIAL.time), -1))
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


def _normal(shape: list[int], dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2, shape).to(dtype)


def _positive(shape: list[int], dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return (torch.rand(shape, dtype=torch.float64) + 0.1).to(dtype)
    return _normal(shape, dtype)
