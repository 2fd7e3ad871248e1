"""The ruler of a reduction: the l2 norm of taps, plain or weighted by what the filter hears.

A filter whose input has the power spectrum w answers an error e of its taps with the output power

    ‖e‖_w² = (1/N) Σ_ω w(ω) |E(ω)|² = eᵀ T e,     T the Toeplitz matrix of the input's autocovariance,

E being the transform of e padded to N ≥ 2·length samples, so that nothing wraps around. Without weights
w = 1 and the norm is the l2 norm of the taps. Either way it is the norm of a vector of real *rows* that
is linear in e. The head, the first k taps, is free: k = 1 is the direct term D, which moves tap 0 alone. It is
projected out of the rows: what is left is the error after the best head has been chosen. Least squares and bounds
work on rows; `distill.closed` has the same products without any.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.errors import DistillError

__all__ = ["Norm", "fast_size", "tap_norm"]


@dataclass(frozen=True)
class Norm:
    """The norm of a bank of filters.

    taps: float64 [filters, length]
    root: float64 [filters, bins] = √(w·multiplicity/N) on the grid of N = 2·(bins − 1), or None (plain)
    head: how many of the first taps are free, 1 … length
    """

    taps: Tensor
    root: Tensor | None = None
    head: int = 1

    def __getitem__(self, part: slice | Tensor) -> Norm:
        return Norm(self.taps[part], None if self.root is None else self.root[part], self.head)

    def density(self) -> Tensor:
        """The power spectrum w of the input on the grid, [filters, bins], mean 1."""
        assert self.root is not None
        density = self.root.square() * (2 * self.root.shape[-1] - 2)
        density[:, 1:-1] /= 2
        return density

    def seen(self) -> tuple[Tensor, Tensor]:
        """g = T h, the taps seen through T [filters, length], and T's lags r_0 … r_length [filters, length + 1]."""
        assert self.root is not None
        size = 2 * self.root.shape[-1] - 2
        density = self.density()
        seen = torch.fft.irfft(torch.fft.rfft(self.taps, n=size) * density, n=size)
        return seen[:, : self.length], torch.fft.irfft(density, n=size)[:, : self.length + 1]

    @property
    def length(self) -> int:
        return self.taps.shape[-1]

    def head_rows(self) -> tuple[Tensor, Tensor]:
        """δ_0 … δ_{head−1} as rows [filters, head, rows] and R⁻¹ [filters, head, head], R Rᵀ their Gram matrix."""
        assert self.root is not None
        bins = self.root.shape[-1]
        time = torch.arange(self.head, dtype=self.root.dtype, device=self.root.device).unsqueeze(-1)
        phase = time * torch.linspace(0, math.pi, bins, dtype=self.root.dtype, device=self.root.device)
        rows = torch.cat([phase.cos(), -phase.sin()], -1) * self.root.repeat(1, 2).unsqueeze(1)
        gram = rows @ rows.mT
        largest = gram.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
        gram.diagonal(dim1=-2, dim2=-1).add_(torch.where(largest > 0, 1e-13 * largest, 1))
        eye = torch.eye(self.head, dtype=gram.dtype, device=gram.device).expand_as(gram)
        return rows, torch.linalg.solve_triangular(torch.linalg.cholesky(gram), eye, upper=False)

    def rows(self, columns: Tensor) -> Tensor:
        """Signals [filters, columns, length] to rows [filters, columns, rows] without the head."""
        if self.root is None:
            return columns[..., self.head :]
        spectra = self.root.unsqueeze(1) * torch.fft.rfft(columns, n=2 * self.root.shape[-1] - 2)
        rows = torch.cat([spectra.real, spectra.imag], dim=-1)
        head, whiten = self.head_rows()
        head = whiten @ head
        return rows.baddbmm_(rows @ head.mT, head, alpha=-1)

    def free(self, error: Tensor) -> Tensor:
        """The best head for an error of the taps [filters, length] → [filters, head]."""
        if self.root is None:
            return error[:, : self.head].clone()
        spectrum = self.root * torch.fft.rfft(error, n=2 * self.root.shape[-1] - 2)
        head, whiten = self.head_rows()
        moment = head @ torch.cat([spectrum.real, spectrum.imag], -1).unsqueeze(-1)
        return (whiten.mT @ (whiten @ moment)).squeeze(-1)

    def direct(self, error: Tensor) -> Tensor:
        """The tap at time 0 of the best head for an error of the taps [filters, length] → [filters]."""
        return self.free(error)[:, 0]

    def size(self, signal: Tensor) -> Tensor:
        """‖signal‖_w of [filters, length] → [filters]."""
        if self.root is None:
            return signal.norm(dim=-1)
        return (self.root * torch.fft.rfft(signal, n=2 * self.root.shape[-1] - 2)).abs().norm(dim=-1)

    def relative(self, error: Tensor) -> Tensor:
        """‖error‖_w / ‖taps‖_w, [filters]; 0 where the taps themselves are nothing."""
        whole = self.size(self.taps)
        return torch.where(whole > 0, self.size(error) / whole.clamp_min(1e-300), torch.zeros_like(whole))


def tap_norm(taps: Tensor, weights: Tensor | None, head: int = 1) -> Norm:
    """The norm for taps [filters, length] heard through weights [filters, bins] or [1, bins], or None.

    Bins are samples of the power spectrum from frequency 0 to π, both ends included; they are
    interpolated linearly to the grid of the norm. Only their shape counts, not their scale. head: taps that are free.
    """
    if not head >= 1:
        raise DistillError(f"a head of {head} taps: the first tap is always free")
    taps, head = taps.to(torch.float64), min(head, taps.shape[-1])
    if weights is None:
        return Norm(taps, None, head)
    if weights.dim() != 2 or weights.shape[0] not in (1, taps.shape[0]) or weights.shape[1] < 2:
        raise DistillError(
            f"weights {tuple(weights.shape)} are not a power spectrum [filters, bins] for taps {tuple(taps.shape)}"
        )
    weights = weights.detach().to(taps).expand(taps.shape[0], -1)
    wrong = ~(torch.isfinite(weights) & (weights >= 0)).all(-1)
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise DistillError(f"the weights of filter {index} are not a finite power spectrum ≥ 0")
    bins = fast_size(2 * taps.shape[-1]) // 2 + 1
    grid = torch.nn.functional.interpolate(weights.unsqueeze(1), size=bins, mode="linear", align_corners=True)
    grid = grid.squeeze(1)
    multiplicity = torch.full_like(grid, 2.0)
    multiplicity[:, [0, -1]] = 1.0
    mean = (grid * multiplicity).sum(-1, keepdim=True) / (2 * bins - 2)
    return Norm(taps, (grid * multiplicity / (2 * bins - 2) / mean.clamp_min(1e-300)).sqrt(), head)


def fast_size(size: int) -> int:
    """The smallest even 2^a·3^b·5^c that is ≥ size: lengths whose FFT is quick."""
    best = 1 << max(1, (size - 1).bit_length())
    for factor in (3, 5, 9, 15, 25, 27):
        power = max(1, (-(-size // factor) - 1).bit_length())
        best = min(best, factor << power)
    return best
