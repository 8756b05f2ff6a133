"""The tail of the hypergeometric distribution, against counting and against SciPy."""

from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from analysis.hypergeometric import hypergeometric_tail


@st.composite
def draws(draw: st.DrawFn, largest: int, smallest: int = 0) -> tuple[int, int, int, int]:
    """(k, population, marked, drawn), k also where no number of marked ones can be."""
    population = draw(st.integers(smallest, largest))
    marked, drawn = (draw(st.integers(0, population)) for _ in range(2))
    return draw(st.integers(-1, min(marked, drawn) + 1)), population, marked, drawn


def tail(*rows: tuple[int, int, int, int]) -> np.ndarray:
    return hypergeometric_tail(*np.array(rows).T)


@given(st.lists(draws(40), min_size=1, max_size=8))
def test_the_tail_is_the_share_of_all_ways_to_draw(rows: list[tuple[int, int, int, int]]) -> None:
    for (k, population, marked, drawn), found in zip(rows, tail(*rows), strict=True):
        ways = sum(
            comb(marked, x) * comb(population - marked, drawn - x)
            for x in range(max(k, 0), drawn + 1)
        )
        assert found == pytest.approx(ways / comb(population, drawn), rel=1e-13)


@given(st.lists(draws(14_336, smallest=1), min_size=1, max_size=8))
def test_the_tail_of_a_layer_is_that_of_scipy(rows: list[tuple[int, int, int, int]]) -> None:
    k, population, marked, drawn = np.array(rows).T
    expected = hypergeom.sf(k - 1, population, marked, drawn)
    # Below the smallest normal number neither has all of its digits.
    np.testing.assert_allclose(tail(*rows), expected, rtol=1e-11, atol=1e-290)


def test_of_a_whole_model_the_tail_keeps_its_digits_where_it_is_tiny() -> None:
    (found,) = tail((20_500, 458_752, 91_750, 91_750))
    # SciPy multiplies factorials here, and keeps some ten digits.
    assert found == pytest.approx(hypergeom.sf(20_499, 458_752, 91_750, 91_750), rel=1e-9)
    assert 0 < found < 1e-80
