"""What is held against a budget: its formula, its errors, and how many sequences it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lhcompile.distill.judge import BLOCKS, Judge, block_error, estimate
from lhcompile.measure import divergences, losses

VOCABULARY, TIME = 16, 64


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the estimate --------------------------------------------------------------------------------------------------


def test_without_a_standard_error_the_divergence_is_the_bound() -> None:
    found = estimate(torch.tensor([9.0]), torch.tensor([0.3]))
    assert (found.measured, found.expected) == (9.0, pytest.approx(0.15))
    assert found.bound() == pytest.approx(0.3)


def test_with_many_sequences_the_loss_is_what_counts() -> None:
    rises = 0.25 + 1e-4 * normal(1000)
    found = estimate(rises, torch.full((1000,), 0.3))
    assert found.expected == pytest.approx(float(rises.mean()), abs=1e-5)
    assert found.deviation == pytest.approx(block_error(rises), rel=1e-2)


def test_estimates_are_weighed_by_their_variances() -> None:
    """The mean and the deviation of the product of both normal densities, on a grid."""
    rises, costs = 0.05 + 0.4 * normal(16), 0.3 + 0.1 * normal(16, seed=1)
    cost, noise = float(costs.mean()), block_error(rises)
    before = ((cost / 4) ** 2 + (block_error(costs) / 2) ** 2) ** 0.5  # type: ignore[operator]
    grid = torch.linspace(-2, 2, 400_001, dtype=torch.float64)
    density = torch.exp(-(((grid - cost / 2) / before) ** 2 + ((grid - rises.mean()) / noise) ** 2) / 2)
    density /= density.sum()
    mean = float((grid * density).sum())
    found = estimate(rises, costs)
    assert found.expected == pytest.approx(mean, rel=1e-6)
    assert found.deviation == pytest.approx(float(((grid - mean).square() * density).sum()) ** 0.5, rel=1e-6)


def test_few_sequences_that_agree_are_not_sure() -> None:
    """Independent tokens of a model of this divergence would differ by √(2 K)."""
    rises, costs, tokens = torch.tensor([1e-4, 1e-4]), torch.full((2,), 1e-3), 2048
    found = estimate(rises, costs, tokens)
    assert found.deviation == pytest.approx(2.5e-4, rel=0.05)  # hardly less than what is known before, K / 4
    assert estimate(rises, costs).deviation < 1e-6


@pytest.mark.parametrize("sequences", [2, 3, 4])
def test_few_sequences_hardly_accept_what_costs_too_much(sequences: int) -> None:
    """Losses that rise by half more than is allowed, of text whose tokens are independent; K is right."""
    tokens, cost = 1024, 1e-3
    rises = 1.5e-3 * 0.5 + (2 * cost / tokens) ** 0.5 * normal(4000, sequences)
    costs = torch.full((sequences,), cost, dtype=torch.float64)
    accepted = [estimate(row, costs, sequences * tokens).bound() <= 0.5e-3 for row in rises]
    assert sum(accepted) / len(accepted) < 0.01


def test_half_of_the_divergence_counts_though_the_loss_falls() -> None:
    assert estimate(torch.full((16,), -1.0), torch.full((16,), 0.3)).bound() == pytest.approx(0.15)


def test_divergences_alone_are_the_rise() -> None:
    costs = 0.3 + 0.1 * normal(16)
    assert estimate(None, costs).bound() == pytest.approx(float(costs.mean() + 2 * costs.std() / 4))
    assert estimate(None, costs[:1]).bound() == pytest.approx(float(costs[0]))


def test_the_error_of_a_mean_is_right_though_neighbours_are_alike() -> None:
    """64 files of 8 sequences that share most of their deviation: errors of single sequences are far too small."""
    files = normal(300, 64, 1) + 0.3 * normal(300, 64, 8, seed=1)
    texts = files.flatten(1)
    truth = float(texts.mean(1).square().mean().sqrt())
    found = [block_error(text) for text in texts]
    assert sum(e for e in found if e is not None) / len(found) == pytest.approx(truth, rel=0.15)
    assert float(texts.std(1).mean()) / 512**0.5 < truth / 2


def test_a_bound_is_above_what_other_text_costs_as_often_as_it_says() -> None:
    """Rises of many texts around a mean that is itself drawn as the prior says."""
    texts, sequences, cost = 2000, 32, 0.3
    truth = cost / 2 + cost / 4 * normal(texts)
    above = 0
    for mean, noise in zip(truth, normal(texts, sequences, seed=1), strict=True):
        found = estimate(mean + 0.5 * noise, torch.full((sequences,), cost))
        above += found.expected + 2 * found.deviation >= float(mean)
    assert above / texts == pytest.approx(0.977, abs=0.015)
    assert sequences > BLOCKS


# ---- the judge -----------------------------------------------------------------------------------------------------


class Table:
    """Logits that only know the token before, and how many rows were asked for."""

    def __init__(self, logits: Tensor) -> None:
        self.logits, self.rows = logits, 0

    def __call__(self, tokens: Tensor) -> Tensor:
        self.rows += len(tokens) if tokens.shape[1] > 2 else 0
        return self.logits[tokens]


def texts(count: int, source: Table) -> Tensor:
    """Sequences that the source writes."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(0, VOCABULARY, (count,), generator=generator)]
    for _ in range(TIME - 1):
        tokens.append(torch.multinomial(source.logits[tokens[-1]].softmax(-1), 1, generator=generator).squeeze(1))
    return torch.stack(tokens, 1)


@pytest.fixture
def source() -> Table:
    return Table(normal(VOCABULARY, VOCABULARY))


def moved(source: Table, size: float) -> Table:
    return Table(source.logits + size * normal(VOCABULARY, VOCABULARY, seed=1))


@pytest.mark.parametrize("sampled", [False, True])
def test_looks_end_when_the_budget_is_decided(source: Table, sampled: bool) -> None:
    tokens = texts(64, source)
    judge = Judge(source, tokens, 1e-2, sampled)
    assert judge.share == (1.0 if sampled else 0.5)
    for size, seen, within in ((1.0, 16, False), (0.02, 16, True)):
        model = moved(source, size)
        found = judge(model)
        assert model.rows == seen
        assert (found.bound() <= judge.ruler.limit) is within


def test_what_is_close_is_measured_on_every_sequence(source: Table) -> None:
    tokens, model = texts(64, source), moved(source, 0.3)
    rises = losses(model, tokens) - losses(source, tokens)
    costs = divergences(source, model, tokens[::4])
    wanted = estimate(rises, costs, tokens.numel())
    model.rows = 0
    budget = wanted.bound() / float(losses(source, tokens).mean())
    for share in (0.99, 1.01):
        judge = Judge(source, tokens, share * budget, sampled=False)
        found = judge(model)
        assert found.measured == pytest.approx(wanted.measured)
        assert found.bound() == pytest.approx(wanted.bound())
        assert (found.bound() <= judge.ruler.limit) is (share > 1)
    assert model.rows == 2 * 64


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_sequences_are_enough_to_judge(source: Table, count: int) -> None:
    tokens, model = texts(count, source), moved(source, 0.3)
    found = Judge(source, tokens, 1e-9, sampled=False)(model)
    assert found.bound() >= float(divergences(source, model, tokens).mean()) / 2
    assert Judge(source, tokens, 0.5, sampled=False)(source).bound() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_model_that_fails_on_one_sequence_is_not_accepted(source: Table, sampled: bool) -> None:
    tokens = texts(20, source)

    def broken(rows: Tensor) -> Tensor:
        return torch.where((rows == tokens[8, : rows.shape[1]]).all(1)[:, None, None], torch.nan, source(rows))

    judge = Judge(source, tokens, 0.5, sampled)
    assert not judge(broken).bound() <= judge.ruler.limit


def test_a_signal_that_fails_is_not_accepted() -> None:
    signal = normal(12, TIME, 3).float()
    judge = Judge(lambda features: features, signal, 0.1, sampled=False)
    assert not judge(lambda features: torch.where(features > 3, torch.nan, features)).bound() <= judge.ruler.limit


def test_the_error_of_a_signal_is_relative_to_all_of_it() -> None:
    def half(features: Tensor) -> Tensor:
        return features / 2

    signal = normal(12, TIME, 3).float() * torch.linspace(0.1, 3, 12).reshape(-1, 1, 1)
    judge = Judge(lambda features: features, signal, 0.1, sampled=False)
    found = judge(half)
    assert judge.ruler.relative(found.measured) == pytest.approx(0.5)
    assert judge.ruler.limit == pytest.approx(0.01)
