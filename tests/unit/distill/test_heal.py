"""Healing lowers the divergence from the source, and is dropped where it does not lower the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import CONTEXT, VOCAB, Hyena, program_of, random_modal
from torch import Tensor

from lhcompile.artifacts import Program
from lhcompile.config import DistillConfig
from lhcompile.distill import distill, factorize
from lhcompile.distill.convolutions import Convolutions
from lhcompile.distill.heal import _Entries, heal
from lhcompile.distill.norm import tap_norm
from lhcompile.distill.result import Reduction
from lhcompile.errors import DistillError
from lhcompile.measure import divergences
from lhcompile.ssm import ModalSSM


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of(Hyena)


def tokens(sequences: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (sequences, CONTEXT), generator=torch.Generator().manual_seed(seed))


def test_entries_are_the_system_they_were_taken_from() -> None:
    system = random_modal(5, 3, torch.Generator().manual_seed(0))
    entries = _Entries.of(system)
    torch.testing.assert_close(entries.taps(40), system.taps(40), rtol=1e-9, atol=1e-12)
    again = entries.system(system, 0.9999)
    torch.testing.assert_close(again.taps(40), system.taps(40), rtol=1e-9, atol=1e-12)
    entries.direct.add_(1.0)
    assert not torch.equal(entries.direct, system.direct)


def test_moved_entries_and_their_system_have_the_same_taps() -> None:
    entries = _Entries.of(random_modal(5, 3, torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(1)
    for part in (entries.decay, entries.angle, entries.residue, entries.direct):
        part += 0.1 * torch.randn(part.shape, generator=generator, dtype=torch.float64)
    system = entries.system(random_modal(5, 3, torch.Generator().manual_seed(0)), 0.9999)
    torch.testing.assert_close(entries.taps(40), system.taps(40), rtol=1e-9, atol=1e-12)


def test_healing_brings_a_damaged_model_back_to_its_source(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lhcompile.distill.heal.RATE", 0.02)
    convolutions = Convolutions(program)
    whole = factorize(convolutions.taps, 4).reduce(4)
    system = whole.system
    bent = replace(whole, system=ModalSSM(0.97 * system.poles, 0.5 * system.residues, system.direct + 0.1))
    norm = tap_norm(convolutions.taps, None)
    healed, (before, after) = heal(convolutions, bent, norm, tokens(32), 120, True, lambda _: None)
    assert healed.method == f"{whole.method}, healed"
    assert after < before / 4
    far, near = (
        float(divergences(program, convolutions.with_taps(each.system.taps(CONTEXT)), tokens(8, seed=1)).mean())
        for each in (bent, healed)
    )
    assert near < far / 4
    torch.testing.assert_close(healed.error, norm.relative(norm.taps - healed.system.taps(CONTEXT)))
    assert torch.equal(healed.system.orders, bent.system.orders)


def test_what_healing_gives_is_built(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(_: Convolutions, reduction: Reduction, *__: object) -> tuple[Reduction, tuple[float, float]]:
        whole = reduction.system
        return replace(reduction, system=ModalSSM(whole.poles, 2 * whole.residues, whole.direct)), (2.0, 1.0)

    plain = distill(program, DistillConfig(order=1), tokens(8), sampled=True)
    monkeypatch.setattr("lhcompile.distill.program.heal", doubled)
    distilled = distill(program, DistillConfig(order=1, heal=1), tokens(8), sampled=True)
    assert distilled.healed == (2.0, 1.0)
    for before, after in zip(plain.layers, distilled.layers, strict=True):
        assert before.system is not None
        assert after.system is not None
        torch.testing.assert_close(after.system.residues, 2 * before.system.residues)
    assert not torch.allclose(distilled.program(tokens(2)), plain.program(tokens(2)))


def test_healing_that_does_not_help_is_dropped(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lhcompile.distill.heal.RATE", 30.0)
    plain = distill(program, DistillConfig(order=2), tokens(8), sampled=True)
    kept = distill(program, DistillConfig(order=2, heal=3), tokens(8), sampled=True)
    assert kept.healed is not None
    assert not kept.healed[1] < kept.healed[0]
    assert kept.layers[0].method == plain.layers[0].method
    torch.testing.assert_close(kept.program(tokens(2)), plain.program(tokens(2)), rtol=0, atol=0)


def test_healing_needs_tokens_to_judge_by(program: Program) -> None:
    with pytest.raises(DistillError, match="two calibration sequences"):
        distill(program, DistillConfig(order=1, heal=1), tokens(1))
