"""Operators that treat every position on its own pass through, whatever they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import HEADS, WIDTH, Mixer, operators, tiny
from streams import assert_same_model
from torch import Tensor, nn

from lhcompile.capture import capture
from lhcompile.recognize import recognize


class Norms(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.batch = nn.BatchNorm1d(WIDTH)
        self.batch.running_mean += torch.randn(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        u, v, w = x.chunk(3, dim=-1)
        by_hand = w * torch.rsqrt(w.pow(2).mean(-1, keepdim=True) + 1e-6) * self.direct
        normal = self.batch(w.transpose(1, 2)).transpose(1, 2)
        return self.layer(u) + self.rms(v) + by_hand + F.normalize(w, dim=-1) + normal


class GatedUnits(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.chunk(3, dim=-1)
        return F.glu(torch.cat([a, b], dim=-1), dim=-1) + F.silu(b) * c + F.gelu(a, approximate="tanh") * c


class Activations(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        a, b, c = x.chunk(3, dim=-1)
        return torch.where(a > 0, a, 0.1 * a) + b.clamp(-1, 1).abs().sqrt() + c.softmax(-1) + F.relu(a).square()


class UndefinedForHalfOfItsInputs(Mixer):
    """Logarithms and minus infinity are judged where they are numbers."""

    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH]
        return torch.exp(torch.where(u > 0, u.log(), u.masked_fill(u > 0, float("-inf")) - 1.0).clamp(max=0))


class RestingDropout(Mixer):
    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Sequential(nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.Dropout1d(0.5), nn.RReLU())

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.kinds(x[..., :WIDTH]), 0.0, training=True)


class AttentionOverHeads(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = (part.view(batch, time, HEADS, -1) for part in x.split(WIDTH, dim=-1))
        return ((q @ k.transpose(-1, -2)).softmax(-1) @ v).reshape(batch, time, WIDTH)


class BatchAndTimeMerged(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        batch, time, channels = x.shape
        y = F.group_norm(x.reshape(batch * time, channels), 3) @ self.taps[:, : 3 * WIDTH].T
        return y.view(batch, time, WIDTH)


class TimeFirst(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        y = x.permute(1, 2, 0)[:, :WIDTH]
        return (y * self.direct[:, None]).permute(2, 0, 1)


class SeveralResults(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        values, places = x.topk(WIDTH, dim=-1)
        low, high = values.aminmax(dim=-1, keepdim=True)
        return values / (high - low) + (places % 3).float()


class InPlace(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH].clone()
        u *= 2
        u.add_(1).tanh_()
        u[..., 0] = 0
        u[:, :, 1:3] += 1
        return F.relu(u, inplace=True)


class OtherPrecisions(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        u = x[..., :WIDTH]
        return u.half().float() + u.to(torch.bfloat16).to(x) + (u.double() * 2).type_as(x)


class ConstantOfEqualPositions(Mixer):
    """A table over positions whose rows are all alike is a bias."""

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        table = torch.ones(time, 1) * self.direct
        return x[..., :WIDTH] + table + x.new_zeros(batch, time, WIDTH) + torch.full((batch, 1, 1), 2.0)


class Expanded(Mixer):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :1].expand(-1, -1, WIDTH) + x[..., 1:2].repeat(1, 1, WIDTH)


PASSING = [
    Norms,
    GatedUnits,
    Activations,
    UndefinedForHalfOfItsInputs,
    RestingDropout,
    AttentionOverHeads,
    BatchAndTimeMerged,
    TimeFirst,
    SeveralResults,
    InPlace,
    OtherPrecisions,
    ConstantOfEqualPositions,
    Expanded,
]


@pytest.mark.parametrize("mixer", PASSING, ids=lambda mixer: mixer.__name__)
def test_passes_through(mixer: type[Mixer]) -> None:
    loaded = tiny(mixer)
    program = recognize(capture(loaded))
    assert_same_model(program, loaded.module)
    assert operators(program) == []


def test_the_verdict_does_not_depend_on_the_random_state() -> None:
    captured = [capture(tiny(Activations)) for _ in range(2)]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = recognize(captured[0])
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    second = recognize(captured[1])
    assert first.graph.code == second.graph.code


@pytest.mark.parametrize("context", [31, 32, 33, 64])
def test_batch_and_time_merged_at_any_context(context: int) -> None:
    """At a third of all contexts the merged size also lies on a line in time alone."""
    loaded = tiny(BatchAndTimeMerged, context=context)
    assert_same_model(recognize(capture(loaded)), loaded.module)
