"""Programs whose poles are rounded: all decay, the residues make up for it, everything else is as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import ORDERS, TINY_MODELS, program_of, random_modal, with_modal
from torch import Tensor

from lhcompile.artifacts import Program
from lhcompile.quantize import quantize_poles
from lhcompile.quantize.poles import round_poles
from lhcompile.quantize.program import _refitted
from lhcompile.ssm import ModalSSM, RealModal

lhc = torch.ops.lhc
LENGTH = 256


@pytest.fixture(scope="module", params=["modal", "packed"])
def program(request: pytest.FixtureRequest) -> Program:
    orders = ORDERS if request.param == "packed" else None
    return with_modal(program_of(*TINY_MODELS["per channel"]), largest=0.9999, orders=orders)


def systems(program: Program) -> list[RealModal]:
    nodes = [node for node in program.graph.graph.nodes if node.target == lhc.modal_ssm.default]
    return [RealModal(*(getattr(program.graph, table.target) for table in node.args[1:5])) for node in nodes]


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_every_pole_decays_and_is_a_code(program: Program, bits: int) -> None:
    before = systems(program)
    rounded, part = quantize_poles(program, bits)
    assert part.tensors == len(before) == 2
    assert part.after == pytest.approx(part.before * bits / 32, abs=1)
    for old, kept, new in zip(before, systems(program), systems(rounded), strict=True):
        assert all(a is b for a, b in zip(vars(old).values(), vars(kept).values(), strict=True))
        assert float(new.own.hypot(new.other).max()) < 1
        assert new.in_slots
        assert new.own.shape == old.own.shape
        wanted = round_poles(old.modal(), bits).poles
        torch.testing.assert_close(new.modal().poles, wanted, rtol=0, atol=1e-6)


def test_more_bits_come_nearer(program: Program) -> None:
    tokens = torch.randint(0, 20, (2, 32), generator=torch.Generator().manual_seed(0))
    truth = program(tokens)

    def error(bits: int) -> float:
        return float((quantize_poles(program, bits)[0](tokens) - truth).norm() / truth.norm())

    errors = [error(bits) for bits in (4, 8, 16)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-3


def taps(system: ModalSSM) -> Tensor:
    return system.taps(LENGTH)


@pytest.mark.parametrize("bits", [4, 8])
def test_residues_are_the_best_for_the_rounded_poles(bits: int) -> None:
    """No small change of them comes nearer to the taps, and the first tap is as it was."""
    before = random_modal(50, 3, torch.Generator().manual_seed(0), largest=0.999)
    after = _refitted(before, round_poles(before, bits), LENGTH)
    torch.testing.assert_close(taps(after)[:, 0], taps(before)[:, 0])
    error = (taps(after) - taps(before)).norm(dim=1)
    plain = (taps(round_poles(before, bits)) - taps(before)).norm(dim=1)
    assert float((error / plain).max()) <= 1 + 1e-9
    assert float((error / plain).median()) < 0.7
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        step = 1e-3 * torch.randn(after.residues.shape[0], 1, generator=generator, dtype=torch.float64)
        moved = ModalSSM(after.poles, after.residues * (1 + step), after.direct - (after.residues * step).sum(-1).real)
        assert bool(((taps(moved) - taps(before)).norm(dim=1) >= error * (1 - 1e-9)).all())


def test_poles_that_coincide_share(built: Callable) -> None:
    """Two pairs whose codes are the same are no harder than one."""
    pole = torch.polar(torch.tensor([[0.9, 0.9000001]], dtype=torch.float64), torch.tensor([[0.5, 0.5]]).double())
    poles = torch.stack([pole, pole.conj()], -1).flatten(1)
    system = ModalSSM(poles, torch.ones_like(poles), torch.zeros(1))
    after = _refitted(system, round_poles(system, 6), LENGTH)
    assert float(after.residues.abs().max()) < 3
    assert bool(torch.isfinite(taps(after)).all())
