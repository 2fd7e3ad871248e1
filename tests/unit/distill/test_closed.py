"""The closed form against explicit columns, and its derivatives against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lhcompile.distill.closed import closed
from lhcompile.distill.growth import grid, grown
from lhcompile.distill.norm import Norm, tap_norm
from lhcompile.distill.spectrum import fit_residues
from lhcompile.distill.varpro import modes_of, point, to_poles, to_theta

LENGTH = 100
SPECTRA = {
    3: [[0.9 + 0.2j, 0.9 - 0.2j, 0.8, 0], [0.5, 0.3, 0.99, 0], [0.3j, -0.3j, -0.999, 0]],
    4: [[0.9 + 0.2j, 0.9 - 0.2j, 0.8, -0.5], [0.5, 0.3, 0.99, 0.2], [0.3j, -0.3j, -0.999, 0.1]],
}
CASES = [(order, weighted, head) for order in SPECTRA for weighted in (False, True) for head in (1, 3)]


def bank(weighted: bool, head: int) -> Norm:
    generator = torch.Generator().manual_seed(1)
    taps = torch.randn(3, LENGTH, generator=generator, dtype=torch.float64)
    taps *= torch.exp(-torch.arange(LENGTH) / 40)
    weights = torch.rand(3, 41, generator=generator, dtype=torch.float64) + 0.1
    return tap_norm(taps, weights if weighted else None, head)


def columns(poles: Tensor, order: int, head: int) -> Tensor:
    """M, Δ, M', Δ', S of every section as columns [filters, 5·sections, LENGTH], from their definitions."""
    first, second = poles.unflatten(-1, (-1, 2)).unbind(-1)
    time = torch.arange(LENGTH - head)
    one, two = (x.unsqueeze(-1) ** time for x in (first, second))
    slope_one, slope_two = (
        torch.where(time > 0, time * x.unsqueeze(-1) ** (time - 1).clamp_min(0), 0) for x in (first, second)
    )
    apart = (first - second).unsqueeze(-1)
    mean, delta = (one + two) / 2, (one - two) / apart
    slope, slope_delta = (slope_one + slope_two) / 2, (slope_one - slope_two) / apart
    parts = torch.stack([mean, delta, slope, slope_delta, 2 * (slope - delta) / apart.square()], 1)
    if order % 2:
        parts[:, :, -1] = 0
        parts[:, 0, -1], parts[:, 2, -1] = one[:, -1], slope_one[:, -1]
    return torch.nn.functional.pad(parts.flatten(1, 2).real, (head, 0))


@pytest.mark.parametrize(("order", "weighted", "head"), CASES)
def test_products_are_those_of_the_columns(order: int, weighted: bool, head: int) -> None:
    norm, poles = bank(weighted, head), torch.tensor(SPECTRA[order], dtype=torch.complex128)
    of = modes_of(poles, closed(norm), order)
    rows = norm.rows(columns(poles, order, head))
    size = rows.norm(dim=-1).clamp_min(1e-6)
    gram = rows @ rows.mT / size.unsqueeze(-1) / size.unsqueeze(1)
    torch.testing.assert_close(of.gram / size.unsqueeze(-1) / size.unsqueeze(1), gram, rtol=0, atol=1e-9)
    moment = (rows @ norm.rows(norm.taps.unsqueeze(1)).mT).squeeze(-1)
    torch.testing.assert_close(of.moment / size, moment / size, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("order", "weighted", "head"), CASES)
def test_gradient_is_that_of_the_cost(order: int, weighted: bool, head: int) -> None:
    form = closed(bank(weighted, head))
    theta = to_theta(torch.tensor(SPECTRA[order], dtype=torch.complex128))
    here = point(theta, form, order)
    for parameter in range(order):
        move = torch.zeros_like(theta)
        move[:, parameter % 2, parameter // 2] = 1e-5
        change = point(theta + move, form, order).cost - point(theta - move, form, order).cost
        torch.testing.assert_close(here.gradient[:, parameter], -change / 4e-5, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("order", "weighted", "head"), CASES)
def test_cost_is_the_error_of_the_fitted_taps(order: int, weighted: bool, head: int) -> None:
    norm, poles = bank(weighted, head), torch.tensor(SPECTRA[order], dtype=torch.complex128)
    cost = point(to_theta(poles), closed(norm), order).cost
    fitted = fit_residues(poles, norm)[1] * norm.size(norm.taps)
    torch.testing.assert_close(cost.sqrt(), fitted, rtol=1e-6, atol=0)


def test_parameters_and_poles_are_the_same_thing() -> None:
    poles = torch.tensor(SPECTRA[4], dtype=torch.complex128)
    torch.testing.assert_close(to_poles(to_theta(poles)), poles)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_the_pole_that_is_added_is_the_one_of_the_grid_that_helps_most(weighted: bool, pair: bool) -> None:
    norm, poles = bank(weighted, 1), torch.tensor(SPECTRA[3], dtype=torch.complex128)
    form = closed(norm)
    points = grid(form)
    found = fit_residues(grown(poles, 3, form, points, pair), norm)[1]
    at = (points.upper if pair else points.real).points[0]
    for other in at[:: 1 + len(at) // 25]:
        new = other.expand(3, 1)
        tried = torch.cat([new, new.conj(), poles], 1) if pair else torch.cat([poles[:, :3], new], 1)
        assert bool((found <= fit_residues(tried, norm)[1] * (1 + 1e-6)).all())
