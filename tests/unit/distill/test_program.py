"""The stage: what filters hear weighs the fit, and the budget is kept by what is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lhcompile.artifacts import LoadedModel, Program
from lhcompile.capture import capture
from lhcompile.config import DistillConfig
from lhcompile.distill import distill, factorize
from lhcompile.distill.convolutions import Convolutions
from lhcompile.errors import BudgetError
from lhcompile.measure import divergences, losses
from lhcompile.recognize import recognize
from lhcompile.streamify import streamify

CONTEXT, VOCABULARY, WIDTH = 64, 16, 4


class Model(nn.Module):
    """One long convolution of embedded tokens, its filters a slow decay and a fast oscillation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        time = torch.arange(CONTEXT)
        slow, fast = 0.9**time, (-0.8) ** time
        self.taps = nn.Parameter((slow + fast) * torch.linspace(0.5, 1.5, WIDTH)[:, None])
        self.embedding, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        u, time = self.embedding(ids).transpose(1, 2), ids.shape[1]
        spectrum = torch.fft.rfft(u, n=2 * time) * torch.fft.rfft(self.taps[:, :time], n=2 * time)
        return self.head(torch.fft.irfft(spectrum, n=2 * time)[..., :time].transpose(1, 2))


@pytest.fixture(scope="module")
def program() -> Program:
    return recognize(capture(LoadedModel(Model().eval(), "module", CONTEXT, 0, "")))


def poles_after(program: Program, tokens: Tensor) -> Tensor:
    layer = distill(program, DistillConfig(order=1), tokens).layers[0]
    assert layer.system is not None
    return layer.system.poles[:, 0].real


def test_the_pole_that_is_heard_is_kept(program: Program) -> None:
    constant = torch.zeros(4, CONTEXT, dtype=torch.int64)
    alternating = torch.arange(CONTEXT).remainder(2).repeat(4, 1)
    with torch.no_grad():
        table = program.graph.get_buffer(next(n for n, b in program.graph.named_buffers() if b.shape == (16, 4)))
        table[1] = -table[0]  # a sign that changes at every token: the highest frequency
    assert bool((poles_after(program, constant) > 0).all())
    assert bool((poles_after(program, alternating) < 0).all())


def random_tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_the_orders_that_are_chosen_keep_the_budget(program: Program, sampled: bool, same: bool) -> None:
    tokens = random_tokens(1)
    config = DistillConfig(budget=1e-4, uniform=same)
    distilled = distill(program, config, tokens, sampled=sampled)
    reference = losses(program, tokens)
    divergence = divergences(program, distilled.program, tokens)
    rises = divergence if sampled else losses(distilled.program, tokens) - reference
    assert float(rises.mean() / reference.mean()) <= config.rise
    layer = distilled.layers[0]
    assert layer.orders is not None
    chosen = [trial for trial in distilled.trials if trial.order == pytest.approx(float(layer.orders.double().mean()))]
    assert chosen[0].expected <= config.rise
    assert all(trial.expected > config.rise for trial in distilled.trials if trial.order < chosen[0].order)
    assert len(layer.orders.unique()) == 1 or not same


def test_a_budget_that_no_order_keeps_names_the_best(program: Program) -> None:
    with pytest.raises(BudgetError, match=r"no order up to 1 .* the best is \+.*% at mean order 1;"):
        distill(program, DistillConfig(budget=1e-9, max_order=1), random_tokens(1))


@pytest.mark.parametrize("order", [0, 1])
def test_sensitivities_predict_the_divergence_of_small_deviations(
    program: Program, monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    """Filter by filter, a tenth of a system's deviation costs a hundredth of sensitivity times squared error."""
    monkeypatch.setattr("lhcompile.distill.convolutions.DRAWS", 2000)  # of a mean of squares: known to 5 %
    tokens = random_tokens(3)
    convolutions = Convolutions(program)
    probe = factorize(convolutions.taps, 2, convolutions.heard(tokens)).reduce(order, "hankel")
    predicted = convolutions.sensitivity(tokens, [probe]) * probe.error.square() / 100
    for index in range(WIDTH):
        taps = convolutions.taps.clone()
        taps[index] += 0.1 * (probe.system.taps(CONTEXT)[index] - taps[index])
        found = divergences(program, convolutions.with_taps(taps), tokens).mean()
        assert float(predicted[index]) == pytest.approx(float(found), rel=0.2)


def test_states_of_mixed_orders_are_packed_where_that_halves_them() -> None:
    model = Model().eval()
    with torch.no_grad():
        model.taps[0], model.taps[1:] = model.taps[0], 0.9 ** torch.arange(CONTEXT)
        model.taps[0] += (-0.5) ** torch.arange(CONTEXT) + 0.3 ** torch.arange(CONTEXT)
    source = recognize(capture(LoadedModel(model, "module", CONTEXT, 0, "")))
    states = {}
    for same in (False, True):
        distilled = distill(source, DistillConfig(budget=1e-7, uniform=same), random_tokens(4), sampled=True)
        streamed = streamify(distilled.program)
        states[same] = streamed.states[0].shape
        torch.testing.assert_close(streamed(random_tokens(5)), source(random_tokens(5)), rtol=1e-3, atol=1e-3)
    assert states[True][1] == WIDTH
    assert states[False][0] == 1
    assert states[False][1] < WIDTH * states[True][0]


def abrupt(free: int) -> Program:
    """A model whose filters begin with `free` taps without any rule and then decay: one pole is enough behind them."""
    model = Model().eval()
    with torch.no_grad():
        model.taps[:] = 0.2 * 0.9 ** torch.arange(CONTEXT)
        model.taps[:, :free] = torch.randn(WIDTH, free, generator=torch.Generator().manual_seed(0))
    return recognize(capture(LoadedModel(model, "module", CONTEXT, 0, "")))


def test_a_head_is_kept_where_it_makes_the_state_smaller() -> None:
    source, tokens, states = abrupt(8), random_tokens(4), {}
    allowed = 1e-3 * float(losses(source, tokens).mean())
    for head in (1, 8):
        distilled = distill(source, DistillConfig(budget=1e-3, head=head), tokens, sampled=True)
        streamed = streamify(distilled.program)
        states[head] = sum(math.prod(state.shape) for state in streamed.states)
        assert float(divergences(source, streamed, tokens).mean()) < allowed  # as built, in float32
        whole = streamed(tokens)
        halves = [torch.zeros(8, *state.shape) for state in streamed.states]
        first, *halves = streamed.graph(tokens[:, :20], *halves)
        second = streamed.graph(tokens[:, 20:], *halves)[0]
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-3, atol=1e-3)
    layer = distilled.layers[0]
    assert layer.head is not None
    assert layer.head.shape[1] > 0
    assert states[8] < states[1]


def test_a_head_keeps_what_poles_in_float32_cannot() -> None:
    source, tokens = abrupt(12), random_tokens(4)
    with pytest.raises(BudgetError, match="no order up to 64 keeps"):
        distill(source, DistillConfig(budget=1e-6), tokens, sampled=True)
    layer = distill(source, DistillConfig(budget=1e-6, head=12), tokens, sampled=True).layers[0]
    assert layer.orders is not None
    assert layer.orders.tolist() == [1] * WIDTH
    assert layer.head is not None
    assert layer.head.shape[1] == 11
    assert layer.error is not None
    assert float(layer.error.max()) < 1e-5


def test_errors_of_a_layer_are_those_of_its_taps(program: Program) -> None:
    tokens = torch.randint(0, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(2))
    layer = distill(program, DistillConfig(order=1), tokens).layers[0]
    assert layer.system is not None
    assert layer.error is not None
    assert layer.bound is not None
    taps = layer.taps.double()
    plain = (taps - layer.system.taps(CONTEXT)).norm(dim=-1) / taps.norm(dim=-1)
    torch.testing.assert_close(layer.error, plain, rtol=1e-6, atol=1e-9)
    assert bool((layer.bound <= layer.error).all())
