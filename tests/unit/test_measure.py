"""Figures of fidelity against sums written out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lhcompile.measure import Agreement, Deviation, Model, Reference, compare, divergences, loss

P = [0.7, 0.2, 0.1]
Q = [0.05, 0.9, 0.05]
TOKENS = torch.tensor([[0, 1, 0, 2], [2, 0, 0, 1]])


def always(probabilities: list[float]) -> Model:
    """A model that gives the same probabilities at every position, with logits shifted by 3."""
    logits = torch.tensor(probabilities).log() + 3

    def model(tokens: Tensor) -> Tensor:
        return logits.expand(*tokens.shape, 3)

    return model


def test_loss_is_the_mean_cross_entropy_of_all_but_the_first_token() -> None:
    predicted = [1, 0, 2, 0, 0, 1]
    assert loss(always(P), TOKENS) == pytest.approx(-sum(math.log(P[t]) for t in predicted) / 6, rel=1e-6)


def test_divergence_is_taken_from_the_reference_and_is_not_symmetric(tmp_path: Path) -> None:
    forwards = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))
    backwards = sum(q * math.log(q / p) for p, q in zip(P, Q, strict=True))
    assert abs(forwards - backwards) > 0.01
    found = compare(Reference(always(P), TOKENS, tmp_path / "r"), {"other": always(Q)})["other"]
    assert isinstance(found, Agreement)
    assert found.kl_mean == pytest.approx(forwards, rel=1e-6)
    assert found.tokens == 6
    assert found.loss == pytest.approx(loss(always(Q), TOKENS), rel=1e-6)
    expected = max(abs(math.log(p / q)) for p, q in zip(P, Q, strict=True))
    assert found.max_logit_difference == pytest.approx(expected, rel=1e-5)


def test_agreement_counts_positions_with_the_same_most_likely_token(tmp_path: Path) -> None:
    def half(tokens: Tensor) -> Tensor:
        """Like P in the first half of the positions, like Q in the rest."""
        logits = always(P)(tokens).clone()
        logits[:, tokens.shape[1] // 2 :] = always(Q)(tokens)[:, tokens.shape[1] // 2 :]
        return logits

    found = compare(Reference(always(P), TOKENS, tmp_path / "r"), {"half": half, "never": always(Q)})
    assert found["half"].top1_agreement == 0.5
    assert found["never"].top1_agreement == 0.0
    assert found["reference"].top1_agreement == 1.0
    assert found["reference"].kl_mean == pytest.approx(0.0, abs=1e-12)


def test_features_are_measured_by_the_error_of_the_values(tmp_path: Path) -> None:
    features = torch.randn(20, 7, 3, generator=torch.Generator().manual_seed(0))  # more than one slice

    def source(rows: Tensor) -> Tensor:
        return rows.cumsum(1)[..., :2]

    def wrong(rows: Tensor) -> Tensor:
        return source(rows) * torch.tensor([1.0, 1.1])

    found = compare(Reference(source, features, tmp_path / "r"), {"wrong": wrong})
    truth = source(features)
    error = 0.1 * truth[..., 1]
    assert found["wrong"] == Deviation(
        positions=140,
        relative_error=pytest.approx(float(error.norm() / truth.norm()), rel=1e-5),
        max_difference=pytest.approx(float(error.abs().max()), rel=1e-5),
        _squares=found["wrong"]._squares,
    )
    assert found["reference"].relative_error == 0.0
    each = divergences(source, wrong, features)
    assert each.shape == (20,)
    assert float(each.mean()) == pytest.approx(found["wrong"].relative_error ** 2, rel=1e-6)
    assert float(each[3] / each[4]) == pytest.approx(float(error[3].square().sum() / error[4].square().sum()), rel=1e-5)


@pytest.mark.parametrize("where", [0, 1])
def test_an_output_that_is_no_number_shows(tmp_path: Path, where: int) -> None:
    def broken(tokens: Tensor) -> Tensor:
        logits = always(P)(tokens).clone()
        logits[where, 2, 1] = math.nan
        return logits

    found = compare(Reference(always(P), TOKENS, tmp_path / "r"), {"broken": broken, "whole": always(P)})
    assert math.isnan(found["broken"].max_logit_difference)
    assert found["whole"].max_logit_difference == 0.0
