"""Inner products of modes in closed form: no column of the filter's length is ever made.

After an exact head of k taps the modes are e(λ) = (1, λ, …, λ^{L−1}) on the taps k … k + L − 1, and

    ⟨a, b⟩ = Σ_{s,t} a_s r_{|s−t|} b_t,    r the autocovariance of the filter's input (1, 0, 0, … for the plain norm).

Products are bilinear, without conjugation: spectra are closed under it. Three polynomials say all there is to say,

    b(λ) = ⟨h, e(λ)⟩ = Σ_t g_t λ^t,   τ_m(λ) = ⟨δ_{k−m}, e(λ)⟩ = Σ_t r_{t+m} λ^t,   σ(λ) = Σ_{t=1}^{L} r_{L−t} λ^t,

    (1 − λμ) ⟨e(λ), e(μ)⟩ = ρ(λ) + ρ(μ) − r_0 − λ^L σ(μ) − μ^L σ(λ) + (λμ)^L r_0,    ρ = τ_0,

g the taps seen through T, and τ_{m−1} = r_{m−1} + λ τ_m − r_{m−1+L} λ^L. Derivatives by λ and μ follow from the
polynomials' own. The head δ_0 … δ_{k−1} is projected out by a Schur complement of size k.

*Sections.* Two poles m ± √D form a section. A polynomial there is x + j y with j² = D, whatever the sign of D: x is
the mean of its two values, y their divided difference, and the arithmetic is real. The powers are factored,
λ^{Ba + b} = λ^{Ba} λ^b, so a polynomial of length L is one product [L/B, B] · [B, 4 · sections] and a short sum, and
the powers cost √L.

*Rounding.* 1/(1 − λμ) loses about 10⁻¹⁶/|1 − λμ|, a double pole is held a little apart. Refinement can bear that;
what it finds is judged by its taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from lhcompile.distill.norm import Norm

__all__ = ["Closed", "Jets", "at_points", "bilinear", "closed", "jets"]


@dataclass(frozen=True)
class Closed:
    """A bank of filters as the closed form sees it; L = length − head.

    tables:  float64 [filters, kinds, A, B], A·B > L: coefficients of b, and of τ_k and σ unless the norm is plain
    near:    float64 [filters, head], r_0 … r_{head−1}; far: float64 [filters, head] = r_L … r_{L+head−1}
    whiten:  float64 [filters, head, head] = R⁻¹, R Rᵀ = T of the head
    heard:   float64 [filters, head] = R⁻¹ ⟨δ_a, h⟩
    energy:  float64 [filters], ‖h‖² after the best head

    The plain norm, whose head is just left out, needs none of near, far, whiten, heard: they are empty.
    """

    tables: Tensor
    near: Tensor
    far: Tensor
    whiten: Tensor
    heard: Tensor
    energy: Tensor
    length: int

    def __getitem__(self, part: slice | Tensor) -> Closed:
        pick = {f.name: getattr(self, f.name)[part] for f in fields(self) if f.name != "length"}
        return Closed(**pick, length=self.length)

    @property
    def plain(self) -> bool:
        return self.tables.shape[1] == 1


def closed(norm: Norm) -> Closed:
    """The closed form of a norm: a few FFTs a filter."""
    head, length = norm.head, norm.length - norm.head
    energy = norm.rows(norm.taps.unsqueeze(1)).square().sum((1, 2))
    if norm.root is None:
        none = norm.taps[:, :0]
        return Closed(_table([norm.taps[:, head:]], length), none, none, none, none, energy, length)
    seen, lags = norm.seen()
    _, whiten = norm.head_rows()
    heard = (whiten @ seen[:, :head].unsqueeze(-1)).squeeze(-1)
    rows = [seen[:, head:], lags[:, head : head + length], torch.nn.functional.pad(lags[:, :length].flip(-1), (1, 0))]
    near, far = lags[:, :head], lags[:, length : length + head]
    return Closed(_table(rows, length), near, far, whiten, heard, energy, length)


def _table(rows: list[Tensor], length: int) -> Tensor:
    """Coefficients [filters, ≤ length + 1] of each kind to [filters, kinds, A, B], B about 2√length."""
    width = 1 << (math.ceil(math.log2(length) / 2) + 1)
    high = length // width + 1
    padded = [torch.nn.functional.pad(row, (0, high * width - row.shape[-1])) for row in rows]
    return torch.stack(padded, 1).unflatten(-1, (high, width))


@dataclass(frozen=True)
class Jets:
    """The polynomials at n points with their slopes, complex [filters, 2·n]: n values, n slopes.

    points: [filters, n]; moment: b; head: [filters, head, 2·n], of τ_head … τ_1 (δ_0 first)
    even: ρ − r_0/2; end: λ^L; odd: σ − r_0 λ^L/2
    """

    points: Tensor
    moment: Tensor
    head: Tensor
    even: Tensor
    end: Tensor
    odd: Tensor

    def __getitem__(self, part: slice | Tensor) -> Jets:
        return Jets(*(getattr(self, f.name)[part] for f in fields(self)))


def jets(form: Closed, mean: Tensor, discriminant: Tensor, root: Tensor) -> Jets:
    """The polynomials at the poles m ± √D of sections [filters, sections]: first all +, then all −."""
    x, y, d = mean, torch.ones_like(mean), discriminant
    high, width = form.tables.shape[-2:]
    low = _powers(x, y, d, width)
    step = _times(low[0][..., -1], low[1][..., -1], x, y, d)  # λ^B
    rise = width * low[0][..., -1:], width * low[1][..., -1:]  # its slope
    outer = _powers(*step, d, high)
    slopes = _times(*rise, *_slopes(*outer), d.unsqueeze(-1))
    inner = torch.stack([*low, *_slopes(*low)], 2).flatten(1, 2) @ form.tables.flatten(1, 2).mT
    inner = inner.unflatten(2, (-1, high)).unflatten(1, (-1, 4)).flatten(2, 3)  # [filters, sections, 4·kinds, A]
    summed = (torch.stack([*outer, *slopes], 2) @ inner.mT).unflatten(-1, (4, -1))  # [filters, sections, 4, 4, kinds]
    p = [[summed[:, :, i, j] for j in range(4)] for i in range(4)]
    e = d.unsqueeze(-1)
    value = p[0][0] + e * p[1][1], p[0][1] + p[1][0]
    slope = p[0][2] + p[2][0] + e * (p[1][3] + p[3][1]), p[0][3] + p[1][2] + p[2][1] + p[3][0]
    a, b = divmod(form.length - 1, width)
    last = _times(outer[0][..., a], outer[1][..., a], low[0][..., b], low[1][..., b], d)  # λ^{L−1}
    end = _times(*last, x, y, d)
    polynomials = _at_poles(value, slope, root.unsqueeze(-1))
    ends = _at_poles(end, (form.length * last[0], form.length * last[1]), root)
    return _jets(form, torch.cat([mean + root, mean - root], -1), polynomials, ends)


def _jets(form: Closed, points: Tensor, polynomials: Tensor, end: Tensor) -> Jets:
    """Jets from b, τ_k, σ, complex [filters, 2·n, kinds], and λ^L [filters, 2·n]; n instead of 2·n without slopes."""
    n, sets = points.shape[-1], end.shape[-1] // points.shape[-1]
    none = torch.zeros_like(points)
    one = torch.cat([torch.ones_like(points), none][:sets], -1)
    if form.plain:
        return Jets(points, polynomials[..., 0], end.unsqueeze(1)[:, :0], one / 2, end, end / 2)
    moment, tau, sigma = polynomials.unbind(-1)
    head = []
    for lag in reversed(range(form.near.shape[1])):
        head.append(tau)
        risen = points.repeat(1, sets) * tau + torch.cat([none, tau[:, :n]][:sets], -1)
        tau = form.near[:, lag : lag + 1] * one + risen - form.far[:, lag : lag + 1] * end
    half = form.near[:, :1] / 2
    return Jets(points, moment, torch.stack(head, 1), tau - half * one, end, sigma - half * end)


def at_points(form: Closed, points: Tensor) -> Jets:
    """The polynomials at the same complex points [n] for every filter, values only: last axes n instead of 2·n."""
    high, width = form.tables.shape[-2:]
    low = points.unsqueeze(0) ** torch.arange(width, device=points.device).unsqueeze(-1)
    high_powers = (low[-1] * points).unsqueeze(0) ** torch.arange(high, device=points.device).unsqueeze(-1)
    n = len(points)
    inner = form.tables @ torch.cat([low.real, low.imag], -1)
    polynomials = (torch.complex(inner[..., :n], inner[..., n:]) * high_powers).sum(2).mT
    filters = form.tables.shape[0]
    end = (points**form.length).expand(filters, n)
    return _jets(form, points.expand(filters, n), polynomials, end)


def bilinear(a: Jets, b: Jets) -> Tensor:
    """⟨e(λ_i), e(μ_j)⟩ and derivatives, complex [filters, 2·n, 2·m], the head not projected out.

    Rows are values and derivatives by λ, columns values and derivatives by μ; rows of values only, if a is so.
    """
    n, m = a.points.shape[-1], b.points.shape[-1]
    left = torch.stack([a.even, _one(a), a.end, a.odd], -1)
    right = torch.stack([_one(b), b.even, -b.odd, -b.end], -2)
    out = left @ right
    x, y = a.points.unsqueeze(-1), b.points.unsqueeze(-2)
    inverse = 1 / (1 - x * y)
    value = out[:, :n, :m] * inverse
    by_b = (out[:, :n, m:] + x * value) * inverse
    rows = torch.cat([value, by_b], -1)
    if out.shape[1] == n:
        return rows
    by_a = (out[:, n:, :m] + y * value) * inverse
    both = (out[:, n:, m:] + value + x * by_a + y * by_b) * inverse
    return torch.cat([rows, torch.cat([by_a, both], -1)], -2)


def _one(at: Jets) -> Tensor:
    """1 with its slope 0."""
    return torch.zeros_like(at.end).index_fill(-1, torch.arange(at.points.shape[-1], device=at.end.device), 1)


def _times(x: Tensor, y: Tensor, u: Tensor, v: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """(x + j y)(u + j v) with j² = d."""
    return x * u + d * y * v, x * v + y * u


def _powers(x: Tensor, y: Tensor, d: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(x + j y)^t for t = 0 … count − 1, [filters, slots, count] each, by doubling."""
    xs, ys = (torch.empty(*x.shape, count, dtype=x.dtype, device=x.device) for _ in range(2))
    xs[..., 0], ys[..., 0] = 1, 0
    x, y, d = x.unsqueeze(-1), y.unsqueeze(-1), d.unsqueeze(-1)
    done = 1
    while done < count:
        more = min(done, count - done)
        a, b, out = xs[..., :more], ys[..., :more], slice(done, done + more)
        torch.mul(a, x, out=xs[..., out]).addcmul_(b, d * y)
        torch.mul(a, y, out=ys[..., out]).addcmul_(b, x)
        x, y = x * x + d * y * y, 2 * x * y
        done += more
    return xs, ys


def _slopes(xs: Tensor, ys: Tensor) -> tuple[Tensor, Tensor]:
    """t λ^{t−1} from λ^t."""
    time = torch.arange(1, xs.shape[-1], dtype=xs.dtype, device=xs.device)
    return tuple(torch.nn.functional.pad(z[..., :-1] * time, (1, 0)) for z in (xs, ys))  # type: ignore[return-value]


def _at_poles(value: tuple[Tensor, Tensor], slope: tuple[Tensor, Tensor], root: Tensor) -> Tensor:
    """x + j y at j = ±√D: values, slopes [filters, sections, ·] to [filters, 4·sections, ·]."""
    odd, odd_slope = root * value[1], root * slope[1]
    return torch.cat([value[0] + odd, value[0] - odd, slope[0] + odd_slope, slope[0] - odd_slope], 1)
