"""Healing: poles and residues of a distilled model, fine-tuned against the logits of its source.

Reduction fits each filter by itself. What the filters of one model do together is fitted here: over all poles and
residues, KL(source ‖ distilled) on calibration tokens descends for a bounded number of steps of Adam (of a continuous
signal: the relative squared error of the outputs),

    h_t = D δ_t + Σ_entries Re(c λ^t),   λ = exp(−e^a + iθ)

with one entry for a real pole or a conjugate pair; |λ| < 1 by construction. Steps are taken in units of what matters: a
residue in parts of itself, an angle in parts of the decay. Which poles are real, and every order, stay.

A quarter of the tokens is not trained on. The result counts only if it lowers the loss there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lhcompile.distill.convolutions import Convolutions
from lhcompile.distill.norm import Norm
from lhcompile.distill.reduction import Reduction
from lhcompile.distill.spectrum import radius_limit
from lhcompile.errors import DistillError
from lhcompile.measure import divergences, losses
from lhcompile.ssm import ModalSSM

__all__ = ["heal"]

RATE = 0.005
BATCH = 2


def heal(
    convolutions: Convolutions,
    reduction: Reduction,
    norm: Norm,
    tokens: Tensor,
    steps: int,
    sampled: bool,
    say: Callable[[str], None],
) -> tuple[Reduction, tuple[float, float]]:
    """A reduction after at most `steps` steps, or the one given where they did not help.

    norm: of the reduction's errors; tokens: int64 [sequences, time], or features float32 [sequences, time, features]
    sampled: judge by the KL divergence instead of the loss, as for tokens that were drawn from the source
    Returns with it the figure that judged, before and after, nats per token; of features, a squared relative error.
    """
    source, length = convolutions.program, convolutions.taps.shape[1]
    if len(tokens) < 2:
        raise DistillError(
            "healing needs two calibration sequences, one to train on and one to judge by: give more text"
        )
    judging = torch.arange(len(tokens)) % min(4, len(tokens)) == 1
    trained, judged = tokens[~judging], tokens[judging]

    def judge(taps: Tensor) -> float:
        model = convolutions.with_taps(taps)
        by_divergence = sampled or judged.is_floating_point()
        return float((divergences(source, model, judged) if by_divergence else losses(model, judged)).mean())

    entries = _Entries.of(reduction.system)
    head = reduction.taps(length) - reduction.system.taps(length)
    parameters = [x.requires_grad_() for x in (entries.decay, entries.angle, entries.residue, entries.direct)]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (1 + math.cos(math.pi * k / steps)) / 2)
    picks = torch.Generator().manual_seed(0)
    for step in range(steps):
        rows = trained[torch.randperm(len(trained), generator=picks)[:BATCH]]
        with torch.no_grad():
            truth = source(rows)
        with torch.enable_grad():
            found = convolutions.outputs(head + entries.taps(length), rows)
            divergence = _divergence(found, truth, continuous=rows.is_floating_point())
            optimizer.zero_grad()
            divergence.backward()
        optimizer.step()
        schedule.step()
        say(f"healing, step {step + 1} of {steps}: divergence {float(divergence.detach()):.2e}")
    system = entries.system(reduction.system, radius_limit(length))
    healed = replace(reduction, system=system, method=f"{reduction.method}, healed")
    healed = replace(healed, error=norm.relative(norm.taps - healed.taps(length)))
    before, after = (judge(each.taps(length)) for each in (reduction, healed))
    return (healed if after < before else reduction), (before, after)


def _divergence(found: Tensor, truth: Tensor, continuous: bool) -> Tensor:
    """Mean KL of logits [batch, time, vocab], or the relative squared error of values [batch, time, channels]."""
    if continuous:
        return (found - truth).square().sum() / truth.square().sum().clamp_min(1e-30)
    found, truth = found.log_softmax(-1), truth.log_softmax(-1)
    return (truth.exp() * (truth - found)).sum(-1).mean()


@dataclass(frozen=True)
class _Entries:
    """Real poles and conjugate pairs of a bank, in units of their start.

    place: (filter, slot entry) of each, int [entries, 2]; start: their poles, complex [entries]
    size: complex [entries], their residues: that of a pair counts twice; pair: bool [entries]
    decay, angle: deviations of a, and of θ in units of the decay, [entries]
    residue: deviation of c in parts of |c|, [2, entries]; direct: D [filters]
    """

    place: Tensor
    start: Tensor
    size: Tensor
    pair: Tensor
    decay: Tensor
    angle: Tensor
    residue: Tensor
    direct: Tensor

    @classmethod
    def of(cls, system: ModalSSM) -> _Entries:
        pair = system.poles.imag != 0
        place = ((system.residues != 0) & (system.poles.imag >= 0)).nonzero()
        filters, entry = place.unbind(1)
        start, residue, pair = (x[filters, entry] for x in (system.poles, system.residues, pair))
        zero = torch.zeros(len(place), dtype=torch.float64)
        size = torch.where(pair, 2 * residue, residue)
        return cls(
            place, start, size, pair, zero, zero.clone(), torch.zeros(2, len(place)).double(), system.direct.clone()
        )

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """Modulus and angle of the poles, and c, [entries] each."""
        rate = -self.start.abs().log()
        modulus = torch.exp(-rate * self.decay.exp())
        angle = self.start.angle() + torch.where(self.pair, rate * self.angle, 0.0)
        change = torch.complex(self.residue[0], torch.where(self.pair, self.residue[1], 0.0))
        return modulus, angle, self.size + self.size.abs() * change

    def taps(self, length: int) -> Tensor:
        """float64 [filters, length]"""
        modulus, angle, c = self.values()
        time = torch.arange(length, dtype=torch.float64)
        phase = angle.unsqueeze(-1) * time
        modes = modulus.unsqueeze(-1) ** time * (
            c.real.unsqueeze(-1) * phase.cos() - c.imag.unsqueeze(-1) * phase.sin()
        )
        taps = torch.zeros(len(self.direct), length, dtype=torch.float64).index_add(0, self.place[:, 0], modes)
        return taps + torch.nn.functional.pad(self.direct.unsqueeze(-1), (0, length - 1))

    @torch.no_grad()
    def system(self, before: ModalSSM, limit: float) -> ModalSSM:
        """The entries back in the slots of the system they were taken from."""
        modulus, angle, c = self.values()
        pole = torch.polar(modulus.clamp(1e-3, limit), angle)
        pole = torch.where(self.pair, pole, torch.complex(pole.real, torch.zeros_like(pole.real)))
        residue = torch.where(self.pair, c / 2, c)
        poles, residues = before.poles.clone(), before.residues.clone()
        filters, entry = self.place.unbind(1)
        poles[filters, entry], residues[filters, entry] = pole, residue
        both, twin = filters[self.pair], (entry ^ 1)[self.pair]  # the other of a pair stands in the same slot
        poles[both, twin], residues[both, twin] = pole[self.pair].conj(), residue[self.pair].conj()
        return ModalSSM(poles, residues, self.direct.clone())
