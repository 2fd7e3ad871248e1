"""Modal systems: taps, the real block form, and what is refused."""

from __future__ import annotations

import pytest
import torch
from models import ORDERS, of_orders, random_modal
from torch import Tensor

from lhcompile.ssm import ModalSSM, RealModal, real_powers, swap


def system(seed: int = 0, filters: int = 4, slots: int = 3) -> ModalSSM:
    return random_modal(filters, slots, torch.Generator().manual_seed(seed))


def recurrence(real: RealModal, length: int) -> Tensor:
    """The impulse response as the real recurrence is written, [filters, length]."""
    state, taps = torch.zeros_like(real.own), []
    for t in range(length):
        state = real.own * state + real.other * swap(state) + (t == 0)
        taps.append((real.readout * state).sum(0) + real.direct * (t == 0))
    return torch.stack(taps, -1)


def matrices(own: Tensor, other: Tensor) -> Tensor:
    """The transition as one matrix per filter, [filters, order, order]."""
    return torch.diag_embed(own.T) + torch.diag_embed(other.T) @ swap(torch.eye(own.shape[0], dtype=own.dtype))


@pytest.mark.parametrize("orders", [None, ORDERS[:4], (1, 1, 1, 1), (3, 3, 1, 0)], ids=str)
def test_poles_and_residues_come_back_from_the_real_form(orders: tuple[int, ...] | None) -> None:
    s = system() if orders is None else of_orders(system(), orders)
    real = s.real()
    assert real.in_slots
    assert float(real.moduli.max()) == pytest.approx(float(s.poles[s.residues != 0].abs().max()))
    back = real.modal()
    torch.testing.assert_close(back.taps(40), s.taps(40), rtol=0.0, atol=1e-14)
    assert torch.equal(back.orders, s.orders)


@pytest.mark.parametrize(("table", "row"), [("own", 1), ("other", 1), ("other", -1)])
def test_tables_that_hold_no_slots(table: str, row: int) -> None:
    real = of_orders(system(), (3, 5, 3, 5)).real()
    getattr(real, table)[row, 1] += 0.1
    assert not real.in_slots


def test_taps_are_sums_of_powers() -> None:
    s = system()
    taps = s.taps(50)
    assert taps.shape == (4, 50)
    assert taps.dtype == torch.float64
    for t in (0, 1, 2, 17, 49):
        expected = (s.residues * s.poles**t).sum(-1).real + (s.direct if t == 0 else 0.0)
        torch.testing.assert_close(taps[:, t], expected)


def test_the_real_form_is_the_same_system() -> None:
    s = system(1)
    real = s.real()
    assert real.own.shape == real.other.shape == real.readout.shape == (6, 4)
    assert real.direct.shape == (4,)
    torch.testing.assert_close(recurrence(real, 60), s.taps(60))


def test_real_slots_do_not_mix_their_two_states() -> None:
    """Rows n and n + order/2 are a slot: here the first slot holds two real poles, the others a pair each."""
    real = system().real()
    assert not real.other[[0, 3]].any()
    torch.testing.assert_close(real.own[[1, 2]], real.own[[4, 5]])
    torch.testing.assert_close(real.other[[1, 2]], -real.other[[4, 5]])
    assert bool((real.other[[1, 2]] != 0).all())


def test_a_pole_at_zero_is_heard_once() -> None:
    poles, residues = torch.zeros(1, 2, dtype=torch.complex128), torch.ones(1, 2, dtype=torch.complex128)
    s = ModalSSM(poles, residues, torch.tensor([0.5], dtype=torch.float64))
    assert s.taps(4).tolist() == [[2.5, 0, 0, 0]]
    torch.testing.assert_close(recurrence(s.real(), 4), s.taps(4))


def test_orders_count_the_poles_in_use() -> None:
    s = system()
    residues = s.residues.clone()
    residues[1, 4:] = 0
    residues[2] = 0
    residues[3, 1] = 0
    assert ModalSSM(s.poles, residues, s.direct).orders.tolist() == [6, 4, 0, 5]
    assert s.filters == 4


def test_states_are_the_poles_in_use() -> None:
    s = of_orders(system(filters=len(ORDERS)), ORDERS)
    real = s.real()
    kept = real.kept
    assert (kept.dtype, len(kept)) == (torch.int64, sum(ORDERS))
    assert torch.equal(kept, kept.unique())
    table = torch.zeros_like(real.own).flatten()
    table[kept] = 1
    assert table.unflatten(0, real.own.shape).sum(0).tolist() == list(ORDERS)
    for values in (real.own, real.other, real.readout):
        assert not values.flatten()[table == 0].any()


def test_both_rows_of_a_pair_are_states() -> None:
    """Whatever else is zero: the angle a right one, or one row not read."""
    real = RealModal(
        own=torch.tensor([[0.0, 0.5, 0.5, 0.0], [0.0, 0.5, 0.0, 0.0]]),
        other=torch.tensor([[-0.5, -0.1, 0.0, 0.0], [0.5, 0.1, 0.0, 0.0]]),
        readout=torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0]]),
        direct=torch.zeros(4),
    )
    assert real.kept.tolist() == [0, 1, 2, 4, 5, 7]


@pytest.mark.parametrize("order", [2, 3])
def test_a_bank_without_states_keeps_one(order: int) -> None:
    zero = torch.zeros(order, 4)
    assert RealModal(zero, zero, zero, torch.ones(4)).kept.tolist() == [0]


@pytest.mark.parametrize(
    ("poles", "residues", "message"),
    [
        ([[0.5, 1.0]], [[1.0, 1.0]], r"a pole has modulus 1\.0, not below 1"),
        ([[0.6 + 0.9j, 0.6 - 0.9j]], [[1.0, 1.0]], r"a pole has modulus 1\.08\d*, not below 1"),
        ([[float("nan"), 0.0]], [[1.0, 1.0]], "a pole has modulus nan, not below 1"),
        ([[0.5, 0.2, 0.1]], [[1.0] * 3], r"poles \(1, 3\) and residues \(1, 3\) must agree and have an even order"),
        ([[0.5, 0.2]], [[1.0]], r"poles \(1, 2\) and residues \(1, 1\) must agree and have an even order"),
    ],
    ids=["on the circle", "outside", "nan", "odd", "shapes"],
)
def test_what_is_no_stable_system(poles: list, residues: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModalSSM(
            torch.tensor(poles, dtype=torch.complex128), torch.tensor(residues, dtype=torch.complex128), torch.zeros(1)
        )


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7, 8, 33])
def test_powers(count: int) -> None:
    real = system().real()
    own, other = real_powers(real.own, real.other, count)
    assert own.shape == other.shape == (count + 1, *real.own.shape)
    whole = matrices(real.own, real.other)
    for k in range(count + 1):
        torch.testing.assert_close(matrices(own[k], other[k]), torch.linalg.matrix_power(whole, k))


def test_swap_exchanges_the_rows_of_every_slot() -> None:
    assert swap(torch.arange(6)).tolist() == [3, 4, 5, 0, 1, 2]
    x = torch.randn(2, 6, 3)
    assert torch.equal(swap(x, 1), torch.cat([x[:, 3:], x[:, :3]], 1))
    assert torch.equal(swap(swap(x, 1), 1), x)


def test_noise_is_that_of_a_recurrence_in_single_precision() -> None:
    """White input through the recurrence with states in float32, against float64: the right size, cancelling or not."""
    poles = torch.tensor([[0.9, 0.5], [1e-3, 2e-3], [0.99, 0.9899]], dtype=torch.complex128)
    residues = torch.tensor([[1.0, -0.5], [1e5, -1e5], [3e3, -3e3]], dtype=torch.complex128)
    system = ModalSSM(poles, residues, torch.zeros(3, dtype=torch.float64))
    real = system.real()
    u = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for dtype in (torch.float32, torch.float64):
        own, readout = real.own.float().to(dtype), real.readout.to(dtype)
        state, out = torch.zeros_like(own), []
        for x in u.float().to(dtype):
            state = own * state + x
            out.append((readout.double() * state.double()).sum(0))
        found.append(torch.stack(out))
    measured = (found[0] - found[1]).square().mean(0).sqrt()
    ratio = system.noise(2.0**-24) / measured
    assert bool(((ratio > 0.5) & (ratio < 20)).all()), ratio
