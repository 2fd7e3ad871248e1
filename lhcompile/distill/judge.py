"""What a budget is held against: an upper bound of what a distilled model costs on text it was not measured on.

*Text.* Two estimates of the rise of the loss are at hand, each from sequences of real text that did not weigh the fit.
The difference d of the losses is without bias, but noisy: single tokens differ by √(2 KL). The KL divergence K is ten
times as sure, and is the rise on text that the source itself would write; real text, which no model predicts perfectly,
rises by some share of it. Before any loss is looked at, that share is taken to be between nothing and all, two standard
deviations of a normal distribution. Both estimates, weighed by their variances,

    rise = K/2 + w (d − K/2),   w = v / (v + s²),   v = (K/4)² + (error of K/2)²,   variance = w s²,

and two standard deviations more are held against the budget. With few tokens that is K; with many it is d + 2s. Half of
K counts in any case: a loss may fall by luck, or because text is strange to the model, and what the model writes
itself, which it reads again, rises by all of it.

*Standard errors* are those of means over `BLOCKS` stretches of the text. Sequences of one file are alike, and taken for
independent they give errors that are too small by a factor of up to two (docs/decisions/021). Few sequences may agree
by luck: s is not less than √(2 K / tokens).

*Looks.* A quarter of the sequences is looked at first, then half, then all. What costs too much by more than a standard
deviation is refused at once, which can only cost state. What is accepted early is so by 2 √(all / seen) standard
deviations, the bounds of O'Brien and Fleming (Biometrics 35, 1979), which hardly add to the error of the last look.

*Sequences that the model wrote, and continuous signals*, need no loss: K is the rise, or the relative squared error of
the outputs, and two of its standard errors are added.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.measure import Model, divergences, losses, losses_and_divergences

__all__ = ["Estimate", "Judge", "Ruler", "block_error", "estimate"]

TINY = 1e-12
"""A reference loss of zero is taken for this when a rise is relative to it."""
SURE = 2.0
"""Standard deviations between what is estimated and what is held against the budget."""
BLOCKS = 16
LOOKS = (4, 2, 1)
"""One sequence of so many is looked at, look by look."""
LEAST = 1 / 2
"""The share of the divergence that counts whatever the loss does."""


@dataclass(frozen=True)
class Ruler:
    """What a budget is measured in. Costs are divergences, nats per token, or squared relative errors of the outputs.

    budget: the rise of the loss allowed, relative to `reference`, the source's; None for a continuous signal, whose
        budget is the relative error of the outputs
    """

    budget: float
    reference: float | None

    @property
    def limit(self) -> float:
        """The cost that the budget allows."""
        return self.budget**2 if self.reference is None else self.budget * max(self.reference, TINY)

    def relative(self, cost: float) -> float:
        """A cost in the budget's own unit."""
        return max(cost, 0.0) ** 0.5 if self.reference is None else cost / max(self.reference, TINY)

    def loss(self, cost: float) -> float:
        """The loss of a model of this cost; of a continuous signal, the cost itself."""
        return cost if self.reference is None else max(self.reference, TINY) + cost

    @property
    def subject(self) -> str:
        return "error of the outputs" if self.reference is None else "rise of the loss"


@dataclass(frozen=True)
class Estimate:
    """The cost of a model, nats per token or a relative squared error.

    measured: mean over the sequences seen; expected: of other sequences; deviation: standard deviation of that;
    least: what counts in any case
    """

    measured: float
    expected: float
    deviation: float
    least: float = 0.0

    def bound(self, deviations: float = SURE) -> float:
        """What is held against the budget."""
        return max(self.expected + deviations * self.deviation, self.least)

    def refused(self, limit: float) -> bool:
        """Whether more sequences would hardly bring the bound below a limit."""
        return max(self.expected - self.deviation, self.least) > limit


def estimate(rises: Tensor | None, costs: Tensor, tokens: float = math.inf) -> Estimate:
    """The module's formula.

    tokens: in all sequences of `rises`; their error is not taken for less than that of so many independent ones
    rises: difference of the losses of single sequences, [sequences], in the order of the text; None where the costs are
    all there is to know. costs: divergences, or squared errors, of single sequences, perhaps of fewer, [sequences]
    """
    cost, error = float(costs.mean()), block_error(costs)
    if rises is None:
        return Estimate(cost, cost, error or 0.0)
    rise, noise, middle = float(rises.mean()), block_error(rises), max(cost, 0.0) / 2
    before = (middle / 2) ** 2 + ((error or 0.0) / 2) ** 2
    if noise is None:
        return Estimate(rise, middle, before**0.5, LEAST * cost)
    noise = max(noise, (2 * max(cost, 0.0) / tokens) ** 0.5)
    weight = before / max(before + noise**2, 1e-300)
    return Estimate(rise, middle + weight * (rise - middle), weight**0.5 * noise, LEAST * cost)


def block_error(values: Tensor) -> float | None:
    """Standard error of the mean of values along a text, [sequences], neighbours being alike; None of a single one."""
    if len(values) < 2:
        return None
    means = torch.stack([block.mean() for block in values.tensor_split(min(BLOCKS, len(values)))])
    return float(means.std()) / len(means) ** 0.5


class Judge:
    """Measures models on sequences, in the order of their text, as far as the budget needs it.

    source: the model that they are compared with; sequences: int64 [sequences, time], or float32 [sequences, time,
    features]; budget: in its own unit; sampled: the source drew the sequences
    share: what part of a divergence is taken for the cost before anything is measured
    """

    def __init__(self, source: Model, sequences: Tensor, budget: float, sampled: bool) -> None:
        continuous = sequences.is_floating_point()
        self._source, self._sequences = source, sequences
        self._losses = None if continuous else losses(source, sequences)
        self._paired = not (continuous or sampled)
        # errors are relative to all sequences of a look; parts of a few say nothing
        self._looks = (1,) if continuous or len(sequences) < BLOCKS else LOOKS
        self.share = 1 / 2 if self._paired else 1.0
        self.ruler = Ruler(budget, None if self._losses is None else float(self._losses.mean()))

    def __call__(self, model: Model) -> Estimate:
        """What a model costs, from as many sequences as decide whether that is within the budget."""
        limit, all_ = self.ruler.limit, torch.arange(len(self._sequences))
        rises, costs = (torch.full((len(all_),), torch.nan, dtype=torch.float64) for _ in range(2))
        seen, divergent = (torch.zeros(len(all_), dtype=torch.bool) for _ in range(2))
        for every in self._looks:
            new = all_[::every][~seen[::every]]
            if not len(new):
                continue
            rows, first = self._sequences[new], not bool(seen.any())
            seen[new] = True
            divergent[new] = first or not self._paired
            if self._losses is None or not self._paired:
                costs[new] = divergences(self._source, model, rows)
            elif first:
                found_losses, costs[new] = losses_and_divergences(self._source, model, rows)
                rises[new] = found_losses - self._losses[new]
            else:
                rises[new] = losses(model, rows) - self._losses[new]
            tokens = int(seen.sum()) * self._sequences.shape[1]
            found = estimate(rises[seen] if self._paired else None, costs[divergent], tokens)
            if found.refused(limit) or found.bound(SURE * every**0.5) <= limit:
                break
        return found
