"""The constants of a chunk, against the recurrence they stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import ORDERS, of_orders, random_modal

from lhcompile.lower.tables import chunk_tables, packing, rounded
from lhcompile.ssm import RealModal, swap

FILTERS = 3


def system() -> RealModal:
    return random_modal(FILTERS, 2, torch.Generator().manual_seed(0)).real()


def advanced(s: RealModal, state: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token: state [order, filters], u [filters] → y [filters], new state"""
    state = s.own * state + s.other * swap(state) + u
    return (s.readout * state).sum(0) + s.direct * u, state


@pytest.mark.parametrize("chunk", [1, 2, 7, 32])
def test_a_chunk_is_its_tokens_one_after_the_other(chunk: int) -> None:
    s = system()
    tables = chunk_tables(s, chunk)
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(chunk, FILTERS, generator=generator, dtype=torch.float64)
    state = start = torch.randn(4, FILTERS, generator=generator, dtype=torch.float64)
    outputs = []
    for token in u:
        y, state = advanced(s, state, token)
        outputs.append(y)
    toeplitz = torch.from_numpy(tables.taps[:, tables.lags]).double()  # [F, j, i]
    y = torch.einsum("jf,fji->if", u, toeplitz)
    y += torch.einsum("df,fdi->if", start, torch.from_numpy(tables.observe).double())
    torch.testing.assert_close(y, torch.stack(outputs), rtol=1e-5, atol=1e-6)
    own, other = torch.from_numpy(tables.powers[chunk]).double()  # [d, F] each
    end = own * start + other * swap(start)
    end += torch.einsum("jf,fjd->df", u, torch.from_numpy(tables.inject).double())
    torch.testing.assert_close(end, state, rtol=1e-5, atol=1e-6)


def test_shapes_and_types() -> None:
    tables = chunk_tables(system(), 8)
    assert tables.taps.shape == (FILTERS, 9)
    assert tables.inject.shape == (FILTERS, 8, 4)
    assert tables.observe.shape == (FILTERS, 4, 8)
    assert tables.powers.shape == (9, 2, 4, FILTERS)
    assert tables.lags.dtype == np.int64
    for table in (tables.taps, tables.inject, tables.observe, tables.powers):
        assert table.dtype == np.float32
        assert table.flags.c_contiguous


def test_nothing_is_heard_before_it_is_said() -> None:
    tables = chunk_tables(system(), 5)
    assert tables.lags.tolist() == [[1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [0, 0, 0, 1, 2], [0, 0, 0, 0, 1]]
    assert not tables.taps[:, 0].any()


def test_tables_are_rounded_once() -> None:
    """The powers come from double precision: the last one is exact to float32, after 512 products."""
    s = random_modal(FILTERS, 2, torch.Generator().manual_seed(0), largest=0.9999).real()
    single = RealModal(s.own.float(), s.other.float(), s.readout.float(), s.direct.float())
    complex_pole = torch.complex(single.own[1].double(), single.other[3].double()) ** 512
    powers = torch.from_numpy(chunk_tables(single, 512).powers[512])  # [2, d, F]
    torch.testing.assert_close(powers[0, 1], complex_pole.real.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(powers[1, 3], complex_pole.imag.float(), rtol=1e-6, atol=0)


def test_packing_of_a_small_table() -> None:
    """Four rows, so that rows 0 and 2 and rows 1 and 3 are slots; filters of orders 4, 1, 0 and 2."""
    table = [
        [0, 1, -1, 2],
        [3, -1, -1, -1],
        [4, -1, -1, 5],
        [6, -1, -1, -1],
    ]
    index = packing(np.flatnonzero(np.array(table) >= 0), 4, 4)
    assert index.kept.tolist() == [0, 1, 3, 4, 8, 11, 12]
    assert index.sources.tolist() == [0, 1, 3, 0, 0, 3, 0]
    assert index.partners.tolist() == [4, 1, 5, 6, 0, 2, 3]
    assert index.positions.tolist() == [max(place, 0) for row in table for place in row]
    assert {array.dtype for array in vars(index).values()} == {np.dtype(np.int32)}


@pytest.mark.parametrize("slots", [3, 4])
def test_packed_states_step_as_rows_do(slots: int) -> None:
    s = of_orders(random_modal(len(ORDERS), slots, torch.Generator().manual_seed(0)), ORDERS).real()
    index = packing(s.kept.numpy(), *s.own.shape)
    kept, sources, partners, positions = (torch.from_numpy(array).long() for array in vars(index).values())
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(len(ORDERS), generator=generator, dtype=torch.float64)
    packed = torch.randn(len(kept), generator=generator, dtype=torch.float64)
    y, rows = advanced(s, torch.zeros_like(s.own).flatten().index_put((kept,), packed).view_as(s.own), u)
    packed = s.own.flatten()[kept] * packed + s.other.flatten()[kept] * packed[partners] + u[sources]
    torch.testing.assert_close(packed, rows.flatten()[kept])
    torch.testing.assert_close(packed[positions].view_as(s.own)[s.readout != 0], rows[s.readout != 0])
    said = (s.direct * u).index_add(0, sources, s.readout.flatten()[kept] * packed)
    torch.testing.assert_close(said, y)


def test_rounded_is_contiguous_single_precision() -> None:
    value = rounded(torch.arange(6, dtype=torch.float64).reshape(2, 3).T)
    assert value.dtype == np.float32
    assert value.flags.c_contiguous
    assert value.tolist() == [[0, 3], [1, 4], [2, 5]]
