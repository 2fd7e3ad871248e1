"""The gradient fit of the paper (arXiv 2310.18780) as one of its authors published it, against the default method.

The code is notebooks/distill.ipynb of github.com/Zymrael/savanna, of February 2025. This is the same procedure, written
anew. Tap 0 is taken as it is; the others are

    ĥ_t = Re Σ_n R_n λ_n^(t−1),   λ_n = r_n e^{iθ_n},   1 ≤ t < L,

and the mean of (h_t − ĥ_t)² descends in r, θ, Re R and Im R together, for 30 000 steps of AdamW without weight decay,
β = (0.9, 0.99), at a rate that falls as a cosine from 6·10⁻⁴ to 10⁻⁶. It starts with r uniform in 0.9 … 0.99, θ uniform
in 0 … 2π, and Re R and Im R normal with variance 1 / modes. A mode is a conjugate pair, so their 16 modes are order 32.
Nothing keeps r below 1.

Two things differ, both in its favour: float64 instead of float32, and a mean over each filter's taps instead of all
taps of a layer, so that Adam's ε = 10⁻⁸ never weighs. Gradients by hand and powers by doubling make a step many times
as fast as it is written there, by automatic differentiation through complex powers; `plain_seconds` times that form.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lhcompile.distill import reduce
from lhcompile.distill.gradient import descend
from lhcompile.distill.norm import tap_norm
from lhcompile.distill.spectrum import powers
from lhcompile.parallel import one_thread

__all__ = ["STEPS", "compare", "plain_seconds", "published_fit"]

STEPS = 30_000
RATE, LAST_RATE, BETAS, MODULI = 6e-4, 1e-6, (0.9, 0.99), (0.9, 0.99)
ORDERS = {"published": (2, 4, 8, 16, 32), "tuned": (2, 4, 8)}
Row = dict[str, Any]


def compare(taps: Tensor, layer: Tensor, quick: bool) -> Iterator[Row]:
    """Both gradient fits, the published one and `distill.gradient`'s with as many steps, against the default.

    taps: float64 [filters, length]; layer: of each filter [filters]. Seconds are the processor's, of all threads: other
    work on the machine weighs less on them than on the clock.
    """
    steps, norm = 300 if quick else STEPS, tap_norm(taps, None)
    for settings, orders in ORDERS.items():
        for order in orders[:1] if quick else orders:
            runs = [_timed(reduce, taps, order) for _ in range(5)]
            default, default_seconds = runs[0][0], median(seconds for _, seconds in runs)
            row: Row = {"settings": settings, "order": order, "filters": len(taps), "steps": steps}
            if settings == "published":
                (error, moduli), seconds = _timed(published_fit, taps, order, steps)
                row |= {"unstable": int((moduli >= 1).any(-1).sum())}
                row |= {"plain_seconds": plain_seconds(taps, order, steps)}
            else:
                (_, error), seconds = _timed(descend, norm, order, steps)
            row |= {"error": float(error.mean()), "seconds": seconds}
            row |= {"default_error": float(default.error.mean()), "default_seconds": default_seconds}
            for name, errors in (("layers", error), ("default_layers", default.error)):
                row[name] = [float(errors[layer == each].mean()) for each in layer.unique()]
            yield row | {"reached": int((error <= 1.01 * default.error).sum())}


def _timed(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What the work returns, and the processor's seconds that it took."""
    started = time.process_time()
    found = work(*arguments)
    return found, time.process_time() - started


def _start(taps: Tensor, modes: int, seed: int) -> list[Tensor]:
    """r, θ, Re R and Im R, float64 [filters, modes] each, where the taps are."""
    generator = torch.Generator().manual_seed(seed)
    r, theta = torch.rand(2, len(taps), modes, generator=generator, dtype=torch.float64)
    real, imag = torch.randn(2, len(taps), modes, generator=generator, dtype=torch.float64) / math.sqrt(modes)
    starts = MODULI[0] + (MODULI[1] - MODULI[0]) * r, 2 * math.pi * theta, real, imag
    return [x.to(taps.device) for x in starts]


def _optimizer(parameters: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, betas=BETAS, weight_decay=0.0)


@one_thread()
def published_fit(taps: Tensor, order: int, steps: int = STEPS, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The relative error over the taps [filters], and the moduli of the poles [filters, order/2].

    taps: float64 [filters, length]; order: even
    """
    r, theta, real, imag = parameters = _start(taps, order // 2, seed)
    optimizer, target = _optimizer(parameters), taps[:, 1:]
    lag = torch.arange(target.shape[1], dtype=torch.float64, device=taps.device)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = LAST_RATE + (RATE - LAST_RATE) * (1 + math.cos(math.pi * step / steps)) / 2
        span, missed = _missed(target, parameters)
        slope = 2 / target.shape[1] * missed
        moments = span @ torch.stack([slope, lag * slope], -1)  # Σ_t slope_t · (1, t) · (Re λ^t, Im λ^t)
        (by_real, of_real), (by_imag, of_imag) = (x.unbind(-1) for x in moments.unflatten(1, (-1, 2)).unbind(2))
        r.grad, theta.grad = (real * of_real - imag * of_imag) / r, -(real * of_imag + imag * of_real)
        real.grad, imag.grad = by_real, -by_imag
        optimizer.step()
    return _missed(target, parameters)[1].norm(dim=-1) / taps.norm(dim=-1), r


def _missed(target: Tensor, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Re λ^t and Im λ^t [filters, 2·modes, time], and ĥ − h [filters, time]."""
    r, theta, real, imag = parameters
    poles = torch.polar(r, theta)
    span = powers(torch.stack([poles, poles.conj()], -1).flatten(1), target.shape[1])
    weights = torch.stack([real, -imag], -1).flatten(1)
    return span, (weights.unsqueeze(1) @ span).squeeze(1) - target


@one_thread()
def plain_seconds(taps: Tensor, order: int, steps: int) -> float:
    """The processor's seconds for so many steps in float32 and in the plain form, reckoned from 20 of them."""
    r, theta, real, imag = parameters = [x.float().requires_grad_() for x in _start(taps, order // 2, 0)]
    optimizer, target = _optimizer(parameters), taps[:, 1:].float()
    lag = torch.arange(target.shape[1], device=taps.device).view(-1, 1, 1)

    def step() -> None:
        optimizer.zero_grad()
        found = (torch.complex(real, imag) * (r * torch.exp(1j * theta)) ** lag).sum(-1).real.T
        (found - target).square().mean().backward()
        optimizer.step()

    _timed(step)  # what only the first call pays is not measured
    return steps * median(_timed(step)[1] for _ in range(20))
