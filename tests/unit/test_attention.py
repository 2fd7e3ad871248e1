"""The eager bodies of attention and positions: what they compute, and that it does not depend on how time is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lhcompile.ops  # noqa: F401  (registers the operators)

lhc = torch.ops.lhc
BATCH, TIME, HEADS, GROUPS, WIDTH, VALUE_WIDTH, CAPACITY = 2, 7, 4, 2, 3, 5, 9


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def signals() -> tuple[Tensor, Tensor, Tensor]:
    return (
        draw(BATCH, TIME, HEADS, WIDTH),
        draw(BATCH, TIME, GROUPS, WIDTH, seed=1),
        draw(BATCH, TIME, GROUPS, VALUE_WIDTH, seed=2),
    )


def empty() -> tuple[Tensor, Tensor, Tensor]:
    keys, values = (torch.zeros(BATCH, GROUPS, CAPACITY, n).double() for n in (WIDTH, VALUE_WIDTH))
    return keys, values, torch.zeros(BATCH, 1, dtype=torch.int64)


def by_definition(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    y = torch.zeros(BATCH, TIME, HEADS, VALUE_WIDTH, dtype=torch.float64)
    for row in range(BATCH):
        for t in range(TIME):
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                weights = (k[row, : t + 1, group] @ q[row, t, head] * scale).softmax(0)
                y[row, t, head] = weights @ v[row, : t + 1, group]
    return y


def test_attention_by_its_definition() -> None:
    q, k, v = signals()
    y, keys, values = lhc.attention(q, k, v, None, None, None, 0.5)
    torch.testing.assert_close(y, by_definition(q, k, v, 0.5))
    torch.testing.assert_close(keys, k.transpose(1, 2))
    torch.testing.assert_close(values, v.transpose(1, 2))


@pytest.mark.parametrize("cuts", [[7], [1] * 7, [2, 1, 4], [6, 1]], ids=str)
def test_attention_in_cuts(cuts: list[int]) -> None:
    whole, (keys, values, start) = signals(), empty()
    parts = []
    for q, k, v in zip(*(x.split(cuts, dim=1) for x in whole), strict=True):
        y, keys, values = lhc.attention(q, k, v, keys, values, start, 0.5)
        start = start + q.shape[1]
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), by_definition(*whole, 0.5))
    torch.testing.assert_close(keys, F.pad(whole[1].transpose(1, 2), (0, 0, 0, CAPACITY - TIME)))
    torch.testing.assert_close(values, F.pad(whole[2].transpose(1, 2), (0, 0, 0, CAPACITY - TIME)))


def test_rows_at_different_places() -> None:
    """The second row goes on behind three positions of its own, the first begins."""
    q, k, v = signals()
    keys, values, start = empty()
    _, keys, values = lhc.attention(q[:, :3], k[:, :3], v[:, :3], keys, values, start, 0.5)
    start = torch.tensor([[0], [3]])
    y, keys, values = lhc.attention(q[:, 3:], k[:, 3:], v[:, 3:], keys, values, start, 0.5)
    alone, *_ = lhc.attention(q[:1, 3:], k[:1, 3:], v[:1, 3:], None, None, None, 0.5)
    torch.testing.assert_close(y[:1], alone)
    torch.testing.assert_close(y[1:], by_definition(q, k, v, 0.5)[1:, 3:])
    torch.testing.assert_close(keys[0, :, :4], k[0, 3:].transpose(0, 1))
    torch.testing.assert_close(values[1, :, :TIME], v[1].transpose(0, 1))


def test_past_the_capacity() -> None:
    (q, k, v), (keys, values, _) = signals(), empty()
    with pytest.raises(ValueError, match="position 9 is past the 9 that attention's caches hold"):
        lhc.attention(q, k, v, keys, values, torch.tensor([[0], [3]]), 0.5)


def test_the_caches_that_go_in_are_left_as_they_are() -> None:
    (q, k, v), (keys, values, start) = signals(), empty()
    lhc.attention(q, k, v, keys, values, start, 0.5)
    assert not keys.any()
    assert not values.any()


def test_attention_has_shapes_without_values() -> None:
    torch.library.opcheck(lhc.attention.default, (*signals(), None, None, None, 0.5))
    torch.library.opcheck(lhc.attention.default, (*signals(), *empty(), 0.5))


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2)], ids=["tokens", "features"])
def test_positions(shape: tuple[int, ...]) -> None:
    signal = torch.zeros(shape)
    places, after = lhc.position(signal, None)
    assert places.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert after.tolist() == [[5]] * 3
    places, after = lhc.position(signal, torch.tensor([[0], [7], [2]]))
    assert places[:, 0].tolist() == [0, 7, 2]
    assert places[:, -1].tolist() == [4, 11, 6]
    assert after.tolist() == [[5], [12], [7]]
    torch.library.opcheck(lhc.position.default, (signal, after))
