"""Finding out how long a sequence a module takes."""

from __future__ import annotations

import pytest
import torch
from models import VOCAB, Hyena, Mixer, tiny
from torch import Tensor, nn

from lhcompile.artifacts import LoadedModel, Signal
from lhcompile.capture import capture
from lhcompile.capture.context import UNBOUNDED_CONTEXT, probe_context
from lhcompile.errors import CaptureError


class Limited(nn.Module):
    """Takes up to `limit` positions and at least `least`; `how` says what it does with more."""

    def __init__(self, limit: int, how: str = "raise", least: int = 1) -> None:
        super().__init__()
        self.limit, self.how, self.least = limit, how, least
        self.embed = nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        time = input_ids.shape[1]
        if time < self.least:
            raise ValueError(f"too short: {time}\nand a second line")
        if time > self.limit and self.how == "raise":
            raise ValueError(f"{time} positions, the table has {self.limit}")
        return self.embed(input_ids[:, : self.limit])


@pytest.mark.parametrize("how", ["raise", "clip"])
@pytest.mark.parametrize("limit", [8, 9, 15, 16, 17, 100, 1000, 1024, UNBOUNDED_CONTEXT - 1, UNBOUNDED_CONTEXT])
def test_the_longest_length_the_module_takes(limit: int, how: str) -> None:
    assert probe_context(Limited(limit, how), Signal()) == limit


@pytest.mark.parametrize("limit", [UNBOUNDED_CONTEXT + 1, 10**9])
def test_a_module_without_a_limit(limit: int) -> None:
    assert probe_context(Limited(limit), Signal()) == UNBOUNDED_CONTEXT


class Returns(nn.Module):
    def __init__(self, answer: str) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, input_ids: Tensor) -> object:
        batch, time = input_ids.shape
        logits = torch.zeros(batch, time, VOCAB)
        answers = {"pooled": logits[:, -1], "transposed": logits.mT, "pair": (logits, logits), "nothing": None}
        return answers[self.answer]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Limited(7), r"ValueError: 8 positions, the table has 7"),
        (Limited(7, "clip"), r"its output has shape \[1, 7, 20\], not \[1, 8, vocabulary\]"),
        (Limited(100, least=9), r"ValueError: too short: 8$"),
        (Returns("pooled"), r"its output has shape \[1, 20\], not \[1, 8, vocabulary\]"),
        (Returns("transposed"), r"its output has shape \[1, 20, 8\], not \[1, 8, vocabulary\]"),
        (Returns("pair"), "it returns a tuple, not a tensor"),
        (Returns("nothing"), "it returns a NoneType, not a tensor"),
    ],
    ids=["limit", "clip", "least", "pooled", "transposed", "pair", "nothing"],
)
def test_a_module_that_refuses_everything(module: nn.Module, reason: str) -> None:
    with pytest.raises(CaptureError, match=rf"the module does not run on token ids \[1, 8\]: {reason}"):
        probe_context(module, Signal())


def test_a_module_of_features_is_probed_with_features() -> None:
    class Shifted(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features[:, :40] + torch.ones(3)

    assert probe_context(Shifted(), Signal(3)) == 40
    message = r"the module does not run on features \[1, 8, 5\]: RuntimeError: The size of tensor a \(5\)"
    with pytest.raises(CaptureError, match=message):
        probe_context(Shifted(), Signal(5))


def test_capture_probes_where_nobody_says() -> None:
    """The FFT convolution of the tiny model reads a table of 32 taps, which ends it."""

    class Bounded(Hyena):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[1] > self.taps.shape[1]:
                raise ValueError("longer than the filters")
            return super().forward(x)

    assert capture(tiny(Bounded, context=None)).context == 32


@pytest.mark.parametrize("context", [1, 2, 7])
def test_a_context_that_is_too_short(context: int) -> None:
    message = f"the context length is {context}; a model needs at least 8 positions to be compiled"
    with pytest.raises(CaptureError, match=message):
        capture(tiny(Mixer, context=context))


class Stored(nn.Module):
    """Filters of 24 taps, cut to the sequence; the module takes longer sequences without a word."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.taps = nn.Parameter(torch.randn(4, 24))
        self.embedding, self.head = nn.Embedding(8, 4), nn.Linear(4, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        time = ids.shape[1]
        u, taps = self.embedding(ids).transpose(1, 2), self.taps[:, :time]
        y = torch.fft.irfft(torch.fft.rfft(u, n=2 * time) * torch.fft.rfft(taps, n=2 * time), n=2 * time)
        return self.head(y[..., :time].transpose(1, 2))


def test_a_module_that_outlasts_its_filters_has_their_length_as_context() -> None:
    module = Stored().eval()
    program = capture(LoadedModel(module, "module", None, 0, ""))
    assert program.context == 24
    for time in (3, 12, 24):
        ids = torch.randint(0, 8, (2, time))
        with torch.no_grad():
            torch.testing.assert_close(program(ids), module(ids))
