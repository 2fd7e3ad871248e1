"""Rational interpolation of the frequency response: the AAA algorithm on the roots of unity.

A system of order d has the response  Ĥ(z) = D + Σ_k R_k / (1 − λ_k z⁻¹),  rational of type (d, d) in z. AAA writes such
a function in barycentric form on d + 1 of the samples z_i, H_i,

    r(z) = n(z) / q(z),   n(z) = Σ_j w_j H_j / (z − z_j),   q(z) = Σ_j w_j / (z − z_j),

takes as its next support point z_j the sample where r is worst, and each time the weights w that minimise the
linearised residual  Σ_i |H_i q(z_i) − n(z_i)|²,  ‖w‖ = 1, over the samples that are no support points: the last right
singular vector of the Loewner matrix (H_i − H_j) / (z_i − z_j). The poles of r are the zeros of q.

*Samples.* z_i are the `length` roots of unity, where z^length = 1 and the transform of the taps is

    H_i = Σ_{t<length} h_t z_i^{−t} = D + Σ_k R_k (1 − λ_k^length) / (1 − λ_k z_i⁻¹):

cutting a filter off scales its residues and moves no pole, so a system of order d is recovered whether it has decayed
or not. Of other filters AAA sees the taps wrapped around (times t and t + length are one): its poles are meant for
filters that have decayed by their last tap.

*Real systems.* Support points come in conjugate pairs with conjugate weights, and one is ±1 where d is even; so w has
d + 1 real parameters, the Loewner matrix is real, [2·samples, d + 1], and q = c (zI − A)⁻¹ b with real A, b, c, whose
zeros are the eigenvalues of (I − b c/cb) A on the null space of c: `order` of them, conjugates exactly.

*Head.* Of a filter whose first k taps are free, AAA is given the taps from k − 1 on: the same poles, a delay earlier.

*Stable systems.* Poles outside the unit circle are reflected into it. Then residues and direct term are fitted to the
taps. Input weights weigh the choice of the next support point, the linearised residual and that fit.

No bound of its own and no optimum: a linearised residual is minimised, and the largest deviation lowered greedily. The
Hankel bound applies as to any system. Cost O(order³ · length) per filter.

Source: Nakatsukasa, Sète & Trefethen 2018. scipy.interpolate.AAA takes one filter at a time and knows no conjugates;
tests hold this one against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lhcompile.distill.norm import Norm
from lhcompile.distill.parts import in_parts
from lhcompile.distill.spectrum import pack, radius_limit, stabilise

__all__ = ["interpolate"]


def interpolate(norm: Norm, order: int) -> Tensor:
    """Poles of the rational interpolants, complex [filters, order rounded up to even], stable, in slots.

    order ≤ `distill.hankel.order_limit` of the length. Computed on the CPU, which has the small decompositions.
    """
    width, device = order + order % 2, norm.taps.device
    if order == 0 or norm.length - norm.head < 2:
        return torch.zeros(norm.taps.shape[0], width, dtype=torch.complex128, device=device)
    norm = Norm(norm.taps.cpu(), None if norm.root is None else norm.root.cpu(), norm.head)
    bytes_each = 8 * 4 * norm.length * (order + 4)
    poles = torch.cat(in_parts(lambda part: _interpolate_part(norm[part], order), norm.taps, bytes_each))
    return pack(stabilise(poles, radius_limit(norm.length), norm.head), width).to(device)


def _interpolate_part(norm: Norm, order: int) -> Tensor:
    samples = _sampled(norm)
    support = _Support(samples, [], [])
    approximant = samples.response.real.mean(-1, keepdim=True).to(samples.response.dtype)
    weights = norm.taps.new_zeros(norm.taps.shape[0], 0)
    while support.size < order + 1:
        real = support.size == 0 and order % 2 == 0
        support.add(samples.worst(approximant, real), real)
        weights = support.weights()
        approximant = support.value(weights)
    return support.poles(weights)


@dataclass
class _Samples:
    """The response on the upper half of the unit circle.

    points: complex [samples], z_0 = 1; ends: how many of 1 and −1 are among them, first and last
    response: complex [filters, samples]; root: float64 [filters or 1, samples], root of the weight, 0 where taken
    """

    points: Tensor
    ends: int
    response: Tensor
    root: Tensor

    def worst(self, approximant: Tensor, real: bool) -> Tensor:
        """Where the approximant is worst, among ±1 or among the others, index [filters]; no longer a sample then."""
        deviation = self.root * (self.response - approximant).abs()
        ends = torch.zeros(len(self.points), dtype=torch.bool, device=self.points.device)
        ends[0] = True
        ends[-1] = self.ends == 2
        place = torch.where(ends == real, deviation.nan_to_num(0), -1.0).argmax(-1)
        self.root = self.root.scatter(-1, place.unsqueeze(-1), 0.0)
        return place


def _sampled(norm: Norm) -> _Samples:
    taps = norm.taps[:, norm.head - 1 :]
    filters, length = taps.shape
    count = length // 2 + 1
    place = torch.arange(count, dtype=torch.float64, device=taps.device)
    response = torch.fft.rfft(taps / taps.abs().amax(-1, keepdim=True).clamp_min(1e-300))
    root = torch.ones(filters, count, dtype=torch.float64, device=taps.device)
    if norm.root is not None:
        density = norm.density()
        grid = place * (2 * (density.shape[-1] - 1) / length)
        low = grid.floor().long().clamp(max=density.shape[-1] - 2)
        share = grid - low
        root = ((1 - share) * density[:, low] + share * density[:, low + 1]).clamp_min(0).sqrt()
    points = torch.polar(torch.ones_like(place), 2 * torch.pi / length * place)
    return _Samples(points, 2 - length % 2, response, root)


@dataclass
class _Support:
    """Support points so far, each a pair with its conjugate, or real.

    terms: for each real weight, complex [filters, samples] of  Σ 1/(z − z_j)  and of  Σ H_j/(z − z_j)  it multiplies
    points: complex [filters] of each pair, or a real point
    """

    samples: _Samples
    terms: list[tuple[Tensor, Tensor]]
    points: list[tuple[Tensor, bool]]

    @property
    def size(self) -> int:
        return len(self.terms)

    def add(self, place: Tensor, real: bool) -> None:
        """A sample of each filter, index [filters], as support point."""
        points, value = self.samples.points, self.samples.response.gather(-1, place.unsqueeze(-1))
        point = points[place].unsqueeze(-1)
        self.points.append((point.squeeze(-1), real))
        gap = points - point
        taken = gap == 0
        one = torch.where(taken, 0, 1 / torch.where(taken, 1, gap))
        if real:
            self.terms.append((one, value.real * one))
            return
        two = 1 / (points - point.conj())  # both on the upper half, not both ±1
        plus, minus = value * one, value.conj() * two
        self.terms += [(one + two, plus + minus), (1j * (one - two), 1j * (plus - minus))]

    def weights(self) -> Tensor:
        """Real weights of the terms, [filters, terms], that minimise the linearised residual."""
        columns = [self.samples.root * (self.samples.response * q - n) for q, n in self.terms]
        loewner = torch.stack([torch.cat([x.real, x.imag], -1) for x in columns], -1)
        _, upper = torch.linalg.qr(loewner)
        return torch.linalg.svd(upper).Vh[:, -1]

    def value(self, weights: Tensor) -> Tensor:
        """r at the samples, [filters, samples]; anything at support points."""
        q, n = torch.zeros_like(self.samples.response), torch.zeros_like(self.samples.response)
        for weight, (below, above) in zip(weights.unsqueeze(1).unbind(-1), self.terms, strict=True):
            q += weight * below
            n += weight * above
        return n / q

    def poles(self, weights: Tensor) -> Tensor:
        """Zeros of q, complex [filters, terms − 1]: w/(z − z_j) + w̄/(z − z̄_j) is 2 (Re w, −Im w) (zI − A)⁻¹ (1, 0)ᵀ
        with A = [[Re z_j, −Im z_j], [Im z_j, Re z_j]]."""
        filters, size = weights.shape
        a = weights.new_zeros(filters, size, size)
        b, c = weights.new_zeros(size), 2 * weights
        at = 0
        for point, real in self.points:
            b[at] = 1
            if real:
                a[:, at, at] = point.real
                c[:, at] /= 2
                at += 1
            else:
                a[:, at, at] = a[:, at + 1, at + 1] = point.real
                a[:, at, at + 1], a[:, at + 1, at] = -point.imag, point.imag
                c[:, at + 1] *= -1
                at += 2
        gain = (c @ b).unsqueeze(-1)
        floor = 1e-12 * c.norm(dim=-1, keepdim=True)
        gain = torch.where(gain.abs() < floor, floor, gain)  # a pole at infinity stays finite
        matrix = a - b.unsqueeze(-1) * ((c.unsqueeze(1) @ a) / gain.unsqueeze(-1))
        mirror = c / c.norm(dim=-1, keepdim=True)
        mirror[:, 0] += torch.where(mirror[:, 0] < 0, -1.0, 1.0)
        eye = torch.eye(size, dtype=a.dtype, device=a.device)
        turn = eye - 2 * mirror.unsqueeze(-1) * mirror.unsqueeze(1) / mirror.square().sum(-1)[:, None, None]
        return torch.linalg.eigvals((turn @ matrix @ turn)[:, 1:, 1:])
