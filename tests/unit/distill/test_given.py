"""Modal systems that a model brings: left as they are and told of, or reduced like any other filter."""

from __future__ import annotations

import pytest
import torch
from models import CONTEXT, VOCAB, WIDTH, GivenModal, Hyena, RotaryAttention, operators, program_of
from torch import Tensor

from lhcompile.artifacts import Program
from lhcompile.config import DistillConfig
from lhcompile.distill import distill
from lhcompile.distill.given import as_convolutions
from lhcompile.streamify import streamify
from lhcompile.verify.summary import layers_of, poles_of, samples_of, spectra_of, state_bytes


@pytest.fixture(scope="module")
def program() -> Program:
    return program_of(GivenModal, Hyena, RotaryAttention, GivenModal)


def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (4, CONTEXT), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("config", [DistillConfig(exact=True), DistillConfig(order=4)], ids=["exact", "order"])
def test_given_systems_stay_and_are_told_of(program: Program, config: DistillConfig) -> None:
    distilled = distill(program, config, tokens())
    rows = layers_of(distilled, streamify(distilled.program).states)
    own = rows[1]
    assert [row.module for row in rows] == ["layers.0.mixer", "layers.1.mixer", "layers.3.mixer"]
    assert [row.given for row in rows] == [True, False, True]
    for row in (rows[0], rows[2]):
        assert (row.method, row.filters, row.order_max, row.order_mean) == ("modal", WIDTH, 6, 6.0)
        assert (row.tap_error, row.kept, row.state_bytes) == (0.0, False, 4 * 6 * WIDTH)
    assert own.kept == bool(config.exact)
    assert {sample.module for sample in samples_of(distilled)} == ({own.module} if config.order else set())
    assert {spectrum.module for spectrum in spectra_of(distilled)} == ({own.module} if config.order else set())
    clouds = {cloud.module: len(cloud.re) for cloud in poles_of(distilled)}
    assert clouds["layers.0.mixer"] == clouds["layers.3.mixer"] == 6 * WIDTH


def test_the_poles_that_are_told_are_those_of_the_model() -> None:
    program = program_of(GivenModal)
    (layer,) = distill(program, DistillConfig(exact=True), None).layers
    expected = as_convolutions(program).graph.get_buffer("given_0")
    torch.testing.assert_close(layer.system.taps(CONTEXT).float(), expected, rtol=1e-4, atol=1e-6)


def test_a_model_of_given_systems_alone_needs_no_search(program: Program) -> None:
    only = program_of(GivenModal)
    distilled = distill(only, DistillConfig(), tokens())
    assert distilled.program is only
    assert distilled.trials == ()
    assert [layer.method for layer in distilled.layers] == ["modal"]


def test_as_convolutions(program: Program) -> None:
    """
    before                                         after
    y, s = lhc.modal_ssm(u, …, None, None, R)      y, s = lhc.long_conv(u, taps, None, R)
    """
    expanded = as_convolutions(program)
    assert [name for name, _ in operators(program)] == ["modal_ssm", "fir", "long_conv", "modal_ssm"]
    assert operators(expanded)[0] == operators(expanded)[-1] == ("long_conv", (WIDTH, CONTEXT))
    torch.testing.assert_close(expanded.graph(tokens()), program.graph(tokens()), rtol=1e-4, atol=1e-5)


def test_reduction_makes_given_systems_smaller(program: Program) -> None:
    """The same engine and the same order for all: the state of six a filter shrinks to two."""
    distilled = distill(program, DistillConfig(order=2, reduce=True), tokens())
    assert [name for name, _ in operators(distilled.program)] == ["modal_ssm", "fir", "modal_ssm", "modal_ssm"]
    rows = layers_of(distilled, streamify(distilled.program).states)
    assert [(row.given, row.order_max) for row in rows] == [(False, 2)] * 3
    assert all(row.tap_error > 0 for row in rows)
    kept = distill(program, DistillConfig(order=2), tokens())
    before, after = (state_bytes(streamify(each.program).states) for each in (kept, distilled))
    assert before - after == 2 * 4 * WIDTH * (6 - 2)


def test_reduction_at_the_full_order_changes_nothing() -> None:
    program = program_of(GivenModal)
    distilled = distill(program, DistillConfig(order=6, reduce=True, method="hankel"), None)
    expected, found = program.graph(tokens()), distilled.program.graph(tokens())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_budget_holds_for_a_hybrid(program: Program) -> None:
    """Sensitivities are gradients through attention and given systems."""
    distilled = distill(program, DistillConfig(budget=0.05, reduce=True, method="hankel"), tokens())
    assert distilled.trials[-1].expected <= 0.05
    assert len(distilled.layers) == 3
