"""Hankel reduction (Kung's realization, ERA): poles from the leading subspace of a window of the taps.

The window H[i, j] = s_i g_{i+j+1} s_j, i < p, j < q, p + q = length, takes every tap after h_0 once and
assumes nothing about the time after the last; s is a taper. If g comes from a system of order d, H has
rank d and its left singular vectors U_d span the tapered observability matrix s_i C A^i. Hence, row by row,

    A_d = U_↑⁺ (s_i/s_{i+1} U_↓),    poles = eig A_d,

U_↑ being U without its last row l, U_↓ without its first. U_d has orthonormal columns, so U_↑ᵀU_↑ = I − l lᵀ
and A_d = (I + l lᵀ/(1 − lᵀl)) U_↑ᵀ(s_i/s_{i+1} U_↓): every order d reads a leading block of one matrix.

*Input weights.* With w = |c|², c minimum phase and cut to m taps, an error e of the taps is heard as
e ⋆ c (correlation), whose taps k_t = Σ_s c_s e_{t+s}, t ≥ 1, come from a system with the same poles as e's.
Hence the weighted window is the plain window of the correlated taps, t = 1 … length − m.

*Bound.* A system of order d has a window of rank ≤ d, so ‖H − Ĥ‖_F² ≥ Σ_{k>d} σ_k² (Eckart–Young). Tap t
stands in H with the weight μ_t = Σ_{i+j=t−1} s_i² s_j²; so for every system of order d, stable or not, any D,

    Σ_t e_t² ≥ (1/max μ) Σ_t μ_t e_t² ≥ (1/max μ) Σ_{k>d} σ_k² = (1/max μ) (‖H‖_F² − Σ_{k≤d} σ_k²):

a lower bound of the l2 tap error over the taps given. It is tight only where μ is level, and the taper
s_i² = C(2i, i)/4^i ≈ 1/√(πi) makes μ_t = 1 for all t ≤ q, since (1 − x)^{-1/2} squared is 1 + x + x² + …
With weights the bound holds for the error heard through |c|², and ‖e‖_w² ≥ min_ω (w/|c|²) times that.

Sources: Kung 1978; Juang & Pappa 1985; block Golub–Kahan: Golub, Luk & Overton 1981. No dense matrix is
formed: products with H go by FFT for all filters at once, O(columns · length log length) per filter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.distill.norm import Norm, fast_size
from lhcompile.distill.parts import in_parts
from lhcompile.distill.spectrum import pack, radius_limit, stabilise
from lhcompile.parallel import side_by_side

__all__ = ["EVEN", "LEVEL", "HankelFactors", "Window", "factor", "order_limit"]

_RANK_CUTOFF = 1e-12  # singular values below this share of the largest are rounding
_SEED = 20231018


@dataclass(frozen=True)
class Window:
    """The taper of a window: s_i = exp(−decay · i/length), times the level taper if `level`.

    extended: the taps are zero after the last and p = q = length − 1: for `distill.balanced`, no bound
    """

    decay: float = 0.0
    level: bool = False
    extended: bool = False

    def taper(self, count: int, length: int, like: Tensor) -> Tensor:
        """s_0 … s_{count−1}, [count], in the dtype and on the device of `like`."""
        time = torch.arange(count, dtype=like.dtype, device=like.device)
        taper = torch.exp(-self.decay / length * time)
        if self.level:
            taper[1:] *= ((time[1:] - 0.5) / time[1:]).cumprod(0).sqrt()
        return taper


EVEN = Window(decay=1.0)  # every part of the filter counts: the poles of the Hankel method
LEVEL = Window(level=True)  # every tap counts alike: the bound


def order_limit(length: int) -> int:
    """The largest order a window of `length` taps supports: ⌊(length − 1)/2⌋, and 1 for two taps."""
    return 1 if length == 2 else (length - 1) // 2


@dataclass(frozen=True)
class HankelFactors:
    """The leading left singular vectors of a window, as far as poles and bounds need them.

    shift:  float64 [filters, rank, rank] = U_↑ᵀ(s_i/s_{i+1} U_↓)
    last:   float64 [filters, rank], the last row of U
    values: float64 [filters, rank], singular values, descending
    energy: float64 [filters] = ‖H‖_F²
    beyond: float64 [filters, 2]: energy outside the subspace, in all and (estimated) in one direction
    floor:  float64 [filters], what turns Σ_{k>d} σ_k² into a bound of the squared relative error
    length: taps per filter; head: how many of them are free
    """

    shift: Tensor
    last: Tensor
    values: Tensor
    energy: Tensor
    beyond: Tensor
    floor: Tensor
    length: int
    head: int

    @property
    def rank(self) -> int:
        return self.shift.shape[-1]

    def __getitem__(self, filters: Tensor | slice) -> HankelFactors:
        fields = (self.shift, self.last, self.values, self.energy, self.beyond, self.floor)
        shift, last, values, energy, beyond, floor = (field[filters] for field in fields)
        return HankelFactors(shift, last, values, energy, beyond, floor, self.length, self.head)

    def poles(self, order: int) -> Tensor:
        """Stable poles of the given order ≤ rank, complex [filters, order rounded up to even], in slots."""
        width = order + order % 2
        if order == 0:
            return torch.zeros(self.shift.shape[0], 0, dtype=torch.complex128, device=self.shift.device)
        last = self.last[:, :order]
        gain = 1 / (1 - last.square().sum(-1, keepdim=True)).clamp_min(1e-12)
        shift = self.shift[:, :order, :order]
        matrix = shift + (gain * last).unsqueeze(-1) @ (last.unsqueeze(1) @ shift)
        eigenvalues = _eigenvalues(matrix)
        return pack(stabilise(eigenvalues, radius_limit(self.length), self.head), width)

    def bound(self, order: int) -> Tensor:
        """Lower bound of the relative error of any system of the given order ≤ rank, [filters].

        The σ_k² here are of the projected window, which is at most short by what `order` directions outside
        the subspace can hold (Ky Fan): that is taken off the tail, so the bound stays on the safe side. Of an order
        above the rank nothing is known but that the error is not negative.
        """
        if order > self.rank:
            return torch.zeros_like(self.energy)
        missed = torch.minimum(self.beyond[:, 0], order * self.beyond[:, 1])
        tail = self.energy * (1 - 1e-13) - self.values[:, :order].square().sum(-1) - missed
        return (tail.clamp_min(0) * self.floor).sqrt()


def factor(norm: Norm, rank: int, window: Window = EVEN) -> HankelFactors:
    """Factors of rank min(rank, order_limit) for the taps and weights of a norm, in parts of bounded memory."""
    bytes_each = 8 * 4 * norm.length * (_columns(rank) + 8)
    parts = in_parts(lambda part: _factor_part(norm[part], rank, window), norm.taps, bytes_each)
    shift, last, values, energy, beyond, floor = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return HankelFactors(shift, last, values, energy, beyond, floor, norm.length, norm.head)


def _factor_part(norm: Norm, rank: int, window: Window) -> tuple[Tensor, ...]:
    heard, ratio = _heard(norm)
    scale = heard.abs().amax(-1).clamp_min(1e-300)
    heard = heard / scale.unsqueeze(-1)
    n = heard.shape[-1]
    p, q = (n, n) if window.extended else (n // 2 + 1, n - n // 2)
    heard = torch.nn.functional.pad(heard, (0, p + q - 1 - n))
    rank = min(rank, order_limit(n + 1))
    taper = window.taper(p, norm.length, heard)
    left, small = _project(heard, p, q, _columns(rank), taper)
    vectors, values = _singular(small)
    inside, edge = values.square().sum(-1), values[:, min(values.shape[-1], (rank + _columns(rank)) // 2) - 1]
    vectors, values = vectors[..., :rank], values[..., :rank].clone()
    kept = values > _RANK_CUTOFF * values[:, :1].clamp_min(1e-300)
    vectors = vectors * kept.unsqueeze(1)
    advance = taper[:-1] / taper[1:]
    shift = vectors.mT @ ((left[..., :-1] * advance) @ left[..., 1:].mT) @ vectors
    last = (left[..., -1:].mT @ vectors).squeeze(1) * (not window.extended)
    size = fast_size(p + q - 1)
    power = torch.fft.rfft(taper.square(), n=size) * torch.fft.rfft(taper[:q].square(), n=size)
    multiplicity = torch.fft.irfft(power, n=size)[: p + q - 1].clamp_min(0)
    energy = (multiplicity * heard.square()).sum(-1)
    beyond = torch.stack([(energy - inside).clamp_min(0), edge.square()], -1)
    whole = norm.size(norm.taps).square()
    floor = torch.where(whole > 0, scale.square() * ratio / (multiplicity.max() * whole.clamp_min(1e-300)), 0.0)
    return shift, last, values, energy, beyond, floor


def _heard(norm: Norm) -> tuple[Tensor, Tensor]:
    """The taps k_1, k_2, … the window is made of, and min_ω (w/|c|²) [filters]; see the module's text."""
    taps, length, head = norm.taps, norm.length, norm.head
    ones = torch.ones(taps.shape[0], dtype=taps.dtype, device=taps.device)
    if length - head < 2:  # two taps say nothing of the decay: half per step is assumed
        return torch.stack([taps[:, -1], taps[:, -1] / 2], -1), 0 * ones
    if norm.root is None:
        return taps[:, head:], ones
    keep = max(1, (length - head) // 8)
    size = 2 * norm.root.shape[-1] - 2
    density = norm.density()
    floored = torch.maximum(density, 1e-6 * density.amax(-1, keepdim=True)).clamp_min(1e-300)
    cepstrum = torch.fft.irfft(floored.log() / 2, n=size)
    cepstrum[:, 1 : size // 2] *= 2
    cepstrum[:, size // 2 + 1 :] = 0
    factor = torch.fft.irfft(torch.exp(torch.fft.rfft(cepstrum)), n=size)[:, :keep]
    response = torch.fft.rfft(factor, n=size)
    correlated = torch.fft.irfft(torch.fft.rfft(taps, n=size) * response.conj(), n=size)
    return correlated[:, head : length - keep + 1], (density / response.abs().square().clamp_min(1e-300)).amin(-1)


def _eigenvalues(matrices: Tensor) -> Tensor:
    """Eigenvalues of real matrices [filters, n, n]."""
    return _small(torch.linalg.eigvals, matrices)


def _singular(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors [filters, n, n] and singular values of matrices [filters, n, n or more]."""

    def both(part: Tensor) -> Tensor:
        vectors, values, _ = torch.linalg.svd(part, full_matrices=False)
        return torch.cat([vectors, values.unsqueeze(1)], 1)

    small = max(matrices.shape[-2:]) <= 32  # accelerators have a batched Jacobi method up to this size
    out = both(matrices) if small else _small(both, matrices)
    return out[:, :-1], out[:, -1]


def _small(work: Callable[[Tensor], Tensor], matrices: Tensor) -> Tensor:
    """work(matrices) on a CPU, on all its cores: accelerators take small matrices one by one."""
    if matrices.device.type == "cpu":
        return work(matrices)
    parts = matrices.cpu().split(-(-len(matrices) // torch.get_num_threads()))
    return torch.cat(side_by_side(work, parts)).to(matrices.device)


def _columns(rank: int) -> int:
    """Dimensions of the Krylov subspace that a rank is taken from."""
    return rank + rank // 2 + 16


def _project(g: Tensor, p: int, q: int, columns: int, taper: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal left vectors Q and a small S with Qᵀ H = S Vᵀ, V orthonormal too.

    g: [filters, p + q − 1] → Q [filters, columns, p], S [filters, columns, columns]. Block Golub–Kahan
    bidiagonalization with full reorthogonalization; where the window is hardly larger than the subspace,
    the whole of it.
    """
    filters = g.shape[0]
    if 2 * columns >= min(p, q):
        window = taper.unsqueeze(-1) * g.unfold(-1, q, 1) * taper[:q]
        eye = torch.eye(p, dtype=g.dtype, device=g.device).expand(filters, p, p)
        return eye, window if p <= q else torch.nn.functional.pad(window, (0, p - q))
    size = fast_size(p + q - 1)
    spectrum = torch.fft.rfft(g, n=size)
    generator = torch.Generator().manual_seed(_SEED)
    block = max(4, columns // 32)  # small blocks reach deep: what counts is converged first
    start = torch.randn(block, q, generator=generator, dtype=torch.float64).to(g)
    left = g.new_zeros(filters, columns, p)
    right = g.new_zeros(filters, columns, q)
    small = g.new_zeros(filters, columns, columns)
    fresh = _multiply(spectrum, start.expand(filters, block, q), size, taper)
    for done in range(0, columns, block):
        now = slice(done, min(done + block, columns))
        left[:, now], _ = _orthonormal(fresh[:, : now.stop - done], left[:, :done])
        image = _multiply(spectrum, taper * left[:, now], size, taper[:q])
        right[:, now], coefficients = _orthonormal(image, right[:, :done])
        small[:, now, : now.stop] = coefficients
        if now.stop < columns:
            fresh = _multiply(spectrum, taper[:q] * right[:, now], size, taper)
    return left, small


def _multiply(spectrum: Tensor, x: Tensor, size: int, taper: Tensor) -> Tensor:
    """y_i = taper_i Σ_j g_{i+j} x_j: [filters, columns, ·] → [filters, columns, len(taper)]."""
    y = torch.fft.irfft(spectrum.unsqueeze(1) * torch.fft.rfft(x, n=size).conj(), n=size)
    return y[..., : len(taper)] * taper


def _orthonormal(x: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """x = coefficients · [basis; new]: rows made orthonormal to a basis and each other, twice for rounding.

    x: [filters, block, n]; basis: [filters, done, n] → new [filters, block, n],
    coefficients [filters, block, done + block]
    """
    first = x @ basis.mT
    new, lower = _lower_rows(x - first @ basis)
    again = new @ basis.mT
    new, correction = _lower_rows(new - again @ basis)
    return new, torch.cat([first + lower @ again, lower @ correction], dim=-1)


def _lower_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x = lower · new, rows of new orthonormal whatever the rank of x: [filters, block, n ≥ block] and [filters, block,
    block]. Accelerators take QRs one by one, so they are given `_reflected`.
    """
    if x.device.type != "cpu":
        return _reflected(x)
    new, upper = torch.linalg.qr(x.mT)
    return new.mT, upper.mT


def _reflected(x: Tensor) -> tuple[Tensor, Tensor]:
    """The same by Householder reflections, one a row, for all filters at once."""
    x, block = x.clone(), x.shape[1]
    mirrors = []
    for row in range(block):
        mirror = x[:, row, row:].clone()
        mirror[:, 0] += torch.copysign(mirror.norm(dim=-1), mirror[:, 0])
        mirror = mirror / mirror.norm(dim=-1, keepdim=True).clamp_min(1e-300)
        mirrors.append(mirror.unsqueeze(1))
        x[:, row:, row:] -= 2 * (x[:, row:, row:] @ mirror.unsqueeze(-1)) @ mirrors[-1]
    new = torch.eye(block, x.shape[-1], dtype=x.dtype, device=x.device).repeat(len(x), 1, 1)
    for row in reversed(range(block)):
        new[:, :, row:] -= 2 * (new[:, :, row:] @ mirrors[row].mT) @ mirrors[row]
    return new, x[..., :block].tril()
