"""Two observations give back the law they came from."""

from __future__ import annotations

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lhcompile.sizes import Point, Size, solve


def points(context: int) -> tuple[Point, Point]:
    """The two sizes that capture exports at."""
    return Point(5, context - 4), Point(7, context - 1)


@settings(deadline=None)
@given(
    context=st.integers(16, 1 << 17),
    power=st.integers(0, 1),
    scale=st.integers(0, 4096),
    offset=st.integers(-3, 16),
)
def test_a_law_is_recovered(context: int, power: int, scale: int, offset: int) -> None:
    """The laws of real code: a multiple of the length, and little more or less than that."""
    law = Size(power, scale, offset)
    assume(scale or offset > 0)
    first, second = points(context)
    assert solve(law.at(first), law.at(second), first, second) == law


@settings(deadline=None)
@given(context=st.integers(8, 1 << 17), first=st.integers(0, 1 << 20), second=st.integers(0, 1 << 20))
def test_whatever_is_found_fits_both_observations(context: int, first: int, second: int) -> None:
    at_first, at_second = points(context)
    law = solve(first, second, at_first, at_second)
    if law is not None:
        assert (law.at(at_first), law.at(at_second)) == (first, second)
        assert law.batch in (0, 1)
        assert law.scale >= 0
