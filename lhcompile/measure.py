"""How close two models are: loss, KL divergence, agreement and differences of logits, in nats per token.

A model here is a function  tokens int64 [batch, time] -> logits float32 [batch, time, vocab],  or, of a continuous
signal,  features float32 [batch, time, features] -> values float32 [batch, time, channels].  Values have no loss: what
takes its place is the squared error of the outputs, relative to the reference's. Everything is computed in slices of
the batch, so that no more than `BYTES` of outputs exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lhcompile.parallel import side_by_side

__all__ = [
    "Agreement",
    "Deviation",
    "Model",
    "Reference",
    "compare",
    "divergences",
    "loss",
    "losses",
    "losses_and_divergences",
]

Model = Callable[[Tensor], Tensor]
BYTES = 1 << 28
TINY = 1e-300


@dataclass
class Agreement:
    """One model against a reference, over predicted tokens (all but the first of each sequence).

    loss: mean cross entropy of the next token; kl_mean: mean KL(reference ‖ model) over positions
    top1_agreement: share of positions with the same most likely token
    max_logit_difference: largest |Δlogit| at any position
    """

    tokens: int = 0
    loss: float = 0.0
    kl_mean: float = 0.0
    top1_agreement: float = 0.0
    max_logit_difference: float = 0.0
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0, 0.0], repr=False)

    def add(self, logits: Tensor, reference: Tensor, tokens: Tensor) -> None:
        """Take in one slice: logits and reference [batch, time, vocab], tokens [batch, time]."""
        ours, theirs = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
        positions = tokens.shape[0] * tokens.shape[1]
        predicted = tokens.shape[0] * (tokens.shape[1] - 1)
        sums = self._sums
        sums[0] += float(cross_entropy(ours[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"))
        sums[1] += float((theirs.exp() * (theirs - ours)).sum())
        sums[2] += float((logits.argmax(-1) == reference.argmax(-1)).sum())
        sums[3] += positions
        self.tokens += predicted
        self.loss = sums[0] / self.tokens
        self.kl_mean = sums[1] / sums[3]
        self.top1_agreement = sums[2] / sums[3]
        worst = float((logits - reference).abs().max())
        self.max_logit_difference = _larger(self.max_logit_difference, worst)


@dataclass
class Deviation:
    """One model of a continuous signal against a reference, over all positions.

    relative_error: ‖y − y*‖ / ‖y*‖, l2 over everything; max_difference: largest |y − y*|
    """

    positions: int = 0
    relative_error: float = 0.0
    max_difference: float = 0.0
    _squares: list[float] = field(default_factory=lambda: [0.0, 0.0], repr=False)

    def add(self, values: Tensor, reference: Tensor, features: Tensor) -> None:
        """Take in one slice: values and reference [batch, time, channels], features [batch, time, features]."""
        error, truth = values.double() - reference.double(), reference.double()
        self._squares[0] += float(error.square().sum())
        self._squares[1] += float(truth.square().sum())
        self.positions += features.shape[0] * features.shape[1]
        self.relative_error = (self._squares[0] / max(self._squares[1], TINY)) ** 0.5
        self.max_difference = _larger(self.max_difference, float(error.abs().max()))


def _larger(a: float, b: float) -> float:
    """The larger of two, NaN if b is."""
    return a if b <= a else b


class Reference:
    """What a model says to its inputs, kept in files, so that others can be compared with it when it is gone."""

    @torch.no_grad()
    def __init__(self, model: Model, inputs: Tensor, directory: Path) -> None:
        """inputs: tokens [sequences, time] or features [sequences, time, features]; directory: a new one is made"""
        directory.mkdir()
        self.continuous = inputs.is_floating_point()
        self._slices = list(_slices(model, inputs))
        self._files = [directory / f"{index}.npy" for index in range(len(self._slices))]
        pairs = zip(self._files, self._slices, strict=True)
        side_by_side(lambda pair: np.save(pair[0], model(pair[1]).numpy()), pairs)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows of the inputs and the outputs for them, slice by slice."""
        for rows, file in zip(self._slices, self._files, strict=True):
            yield rows, torch.from_numpy(np.load(file))


@torch.no_grad()
def compare(reference: Reference, models: Mapping[str, Model]) -> dict[str, Agreement | Deviation]:
    """The reference itself, under "reference", and each model against the reference.

    Tokens give an Agreement, features a Deviation.
    """
    result: dict[str, Agreement | Deviation] = {
        name: Deviation() if reference.continuous else Agreement() for name in ("reference", *models)
    }
    for rows, truth in reference:
        others = side_by_side(lambda model, rows=rows: model(rows), models.values())  # type: ignore[misc]
        for figures, outputs in zip(result.values(), (truth, *others), strict=True):
            figures.add(outputs, truth, rows)
    return result


def loss(model: Model, tokens: Tensor) -> float:
    """Mean cross entropy of the next token, nats, over tokens [sequences, time]."""
    return float(losses(model, tokens).mean())


@torch.no_grad()
def losses(model: Model, tokens: Tensor) -> Tensor:
    """Mean cross entropy of the next token in each of the tokens' rows [sequences, time], nats, float64 [sequences]."""
    return torch.cat(side_by_side(lambda rows: _loss(model(rows).double(), rows), _slices(model, tokens)))


@torch.no_grad()
def divergences(reference: Model, model: Model, inputs: Tensor) -> Tensor:
    """Mean KL(reference ‖ model) over the positions of each row [sequences, time], nats, float64 [sequences].

    Of features [sequences, time, features]: the squared error of the values in each row, relative to the mean of the
    reference's square over all rows, so that the mean over the rows is the square of the relative error.
    """

    def mean(rows: Tensor) -> Tensor:
        theirs, ours = (side(rows).double() for side in (reference, model))
        if rows.is_floating_point():
            return torch.stack([(ours - theirs).square().mean((1, 2)), theirs.square().mean((1, 2))])
        return _divergence(theirs, ours)

    found = torch.cat(side_by_side(mean, _slices(model, inputs)), dim=-1)
    if inputs.is_floating_point():
        return found[0] / found[1].mean().clamp_min(TINY)
    return found


@torch.no_grad()
def losses_and_divergences(reference: Model, model: Model, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`losses` of the model and its `divergences` from the reference, for one run of each."""

    def means(rows: Tensor) -> Tensor:
        theirs, ours = (side(rows).double() for side in (reference, model))
        return torch.stack([_loss(ours, rows), _divergence(theirs, ours)])

    loss, divergence = torch.cat(side_by_side(means, _slices(model, tokens)), dim=-1)
    return loss, divergence


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Of logits [rows, time, vocab], by row."""
    return cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)


def _divergence(theirs: Tensor, ours: Tensor) -> Tensor:
    """Of logits [rows, time, vocab], by row."""
    theirs, ours = theirs.log_softmax(-1), ours.log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1).mean(1)


def _slices(model: Model, inputs: Tensor) -> Iterator[Tensor]:
    """Rows of tokens or features in slices whose outputs in double precision stay below `BYTES`."""
    width = model(inputs[:1, :2]).shape[-1]
    rows = max(1, min(8, BYTES // (inputs.shape[1] * width * 8)))
    return iter(inputs.split(rows))
