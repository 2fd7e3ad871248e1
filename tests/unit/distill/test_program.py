"""The stage: what filters hear weighs the fit, and the budget is kept by what is chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lhcompile.artifacts import LoadedModel, Program
from lhcompile.capture import capture
from lhcompile.config import DistillConfig
from lhcompile.distill import distill
from lhcompile.measure import compare, loss
from lhcompile.recognize import recognize

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


@pytest.mark.parametrize("sampled", [False, True])
def test_the_order_that_is_chosen_keeps_the_budget(program: Program, sampled: bool) -> None:
    tokens = torch.randint(0, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(1))
    config = DistillConfig(budget=1e-4)
    distilled = distill(program, config, tokens, sampled=sampled)
    reference = loss(program, tokens)
    found = compare(program, {"distilled": distilled.program}, tokens)["distilled"]
    rise = found.kl_mean if sampled else found.loss - reference
    assert rise / reference <= config.rise
    chosen = int(distilled.layers[0].orders.max())  # type: ignore[union-attr]
    below = [trial for trial in distilled.trials if trial.order < chosen]
    assert all(trial.rise > config.rise for trial in below)


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
