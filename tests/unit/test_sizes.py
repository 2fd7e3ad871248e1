"""Laws of sizes: found from two observations, evaluated, written as nodes."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, GraphModule

from lhcompile.sizes import BATCH, TIME, Point, Size, emit_size, solve

FIRST, SECOND = Point(5, 1020), Point(7, 1023)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (Size(0, 0, 1), "1"),
        (Size(0, 0, 768), "768"),
        (BATCH, "B"),
        (Size(1, 0, 12), "B·(12)"),
        (TIME, "T"),
        (Size(0, 1, 2), "T+2"),
        (Size(0, 1, -1), "T-1"),
        (Size(0, 2, 0), "2·T"),
        (Size(0, 2, -1), "2·T-1"),
        (Size(0, 768, 0), "768·T"),
        (Size(1, 1, 0), "B·(T)"),
        (Size(1, 4, 8), "B·(4·T+8)"),
    ],
    ids=str,
)
def test_every_law_is_found_again(size: Size, text: str) -> None:
    assert solve(size.at(FIRST), size.at(SECOND), FIRST, SECOND) == size
    assert str(size) == text
    assert size.fixed == (not size.has_batch and not size.has_time)


@pytest.mark.parametrize(
    ("first", "second"),
    [(510, 511), (32, 33), (1, 0), (3, 0), (-1020, -1023), (5 * 1020 + 1, 7 * 1023)],
)
def test_what_follows_no_law(first: int, second: int) -> None:
    assert solve(first, second, FIRST, SECOND) is None


def test_the_simplest_law_wins() -> None:
    """15 and 21 are three times the batch, and twice the time less 15: nobody means the latter."""
    assert solve(15, 21, Point(5, 15), Point(7, 18)) == Size(1, 0, 3)
    assert solve(5 * 1020, 7 * 1023, FIRST, SECOND) == Size(1, 1, 0)  # and 687 · T - 695640
    assert solve(21 * 5, 21 * 8, Point(5, 5), Point(7, 8)) == Size(0, 21, 0)  # and B · (T + 16)
    assert solve(4, 4, Point(5, 4), Point(7, 7)) == Size(0, 0, 4)
    assert solve(4, 7, Point(5, 4), Point(7, 7)) == TIME


@pytest.mark.parametrize(
    "size",
    [Size(0, 0, 3), BATCH, TIME, Size(0, 1, -1), Size(0, 3, 2), Size(1, 0, 4), Size(1, 1, 0), Size(1, 2, 6)],
    ids=str,
)
def test_emitted_nodes_compute_the_law(size: Size) -> None:
    graph = Graph()
    batch, time = graph.placeholder("batch"), graph.placeholder("time")
    result = emit_size(graph, size, batch, time)
    assert isinstance(result, int) == size.fixed
    if not isinstance(result, int):
        assert result in (batch, time) or result.meta["size"] == size
    graph.output(result)
    module = GraphModule(torch.nn.Module(), graph)
    for point in (Point(1, 1), Point(3, 17), FIRST):
        assert module(point.batch, point.time) == size.at(point)
