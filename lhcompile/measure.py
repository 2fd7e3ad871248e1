"""How close two models are: loss, KL divergence, agreement and differences of logits, in nats per token.

A model here is a function  tokens int64 [batch, time] -> logits float32 [batch, time, vocab].  Everything is computed
in slices of the batch, so that no more than `BYTES` of logits exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lhcompile.parallel import side_by_side

__all__ = ["Agreement", "Model", "compare", "divergences", "loss", "losses"]

Model = Callable[[Tensor], Tensor]
BYTES = 1 << 28


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
        self.max_logit_difference = max(self.max_logit_difference, worst)


@torch.no_grad()
def compare(reference: Model, models: Mapping[str, Model], tokens: Tensor) -> dict[str, Agreement]:
    """Each model, and the reference itself under "reference", against the reference on tokens [sequences, time]."""
    everyone = {"reference": reference, **models}
    result = {name: Agreement() for name in everyone}
    for rows in _slices(reference, tokens):
        truth, *others = side_by_side(lambda model, rows=rows: model(rows), everyone.values())  # type: ignore[misc]
        for agreement, logits in zip(result.values(), (truth, *others), strict=True):
            agreement.add(logits, truth, rows)
    return result


def loss(model: Model, tokens: Tensor) -> float:
    """Mean cross entropy of the next token, nats, over tokens [sequences, time]."""
    return float(losses(model, tokens).mean())


@torch.no_grad()
def losses(model: Model, tokens: Tensor) -> Tensor:
    """Mean cross entropy of the next token in each of the tokens' rows [sequences, time], nats, float64 [sequences]."""

    def mean(rows: Tensor) -> Tensor:
        logits = model(rows)[:, :-1].double()
        return cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").mean(1)

    return torch.cat(side_by_side(mean, _slices(model, tokens)))


@torch.no_grad()
def divergences(reference: Model, model: Model, tokens: Tensor) -> Tensor:
    """Mean KL(reference ‖ model) over the positions of each row [sequences, time], nats, float64 [sequences]."""

    def mean(rows: Tensor) -> Tensor:
        theirs, ours = (side(rows).double().log_softmax(-1) for side in (reference, model))
        return (theirs.exp() * (theirs - ours)).sum(-1).mean(1)

    return torch.cat(side_by_side(mean, _slices(model, tokens)))


def _slices(model: Model, tokens: Tensor) -> Iterator[Tensor]:
    """Rows of tokens in slices whose logits in double precision stay below `BYTES`."""
    vocabulary = model(tokens[:1, :2]).shape[-1]
    rows = max(1, min(8, BYTES // (tokens.shape[1] * vocabulary * 8)))
    return iter(tokens.split(rows))
