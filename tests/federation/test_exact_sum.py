"""Exact sums: the nearest float64 to what the numbers add up to, in any order and any grouping."""

import math
import random
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedkseed.federation.exact_sum import DIGIT, LARGEST, LIMBS, MAX_TERMS, ExactSum, OrderedSum

F64 = NDArray[np.float64]
GRID = 2.0**-80
numbers = st.floats(-LARGEST, LARGEST) | st.floats(-1, 1) | st.floats(-1e-20, 1e-20)
cohorts = st.lists(st.lists(numbers, min_size=3, max_size=3).map(np.array), min_size=1, max_size=12)


def summed(vectors: list[F64]) -> ExactSum:
    total = ExactSum.zeros(3)
    for vector in vectors:
        total.add(vector)
    return total


@given(vectors=cohorts)
@settings(max_examples=50, deadline=None)
def test_it_is_the_nearest_number_to_the_sum(vectors: list[F64]) -> None:
    """Of what the grid holds: a number that is finer has been rounded to it, nearest even."""
    for found, column in zip(summed(vectors).value, np.transpose(vectors).tolist(), strict=True):
        exact = sum(round(Fraction(x) / Fraction(GRID)) for x in column) * Fraction(GRID)
        assert found == float(exact)


@given(vectors=cohorts, cuts=st.lists(st.integers(0, 3), min_size=12, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_neither_order_nor_grouping_changes_a_bit(vectors: list[F64], cuts: list[int], seed: int) -> None:
    expected = summed(vectors).value
    groups = [[v for v, cut in zip(vectors, cuts, strict=False) if cut == group] for group in range(4)]
    for group in groups:
        random.Random(seed).shuffle(group)
    limbs = np.sum([summed(group).limbs for group in groups], axis=0)
    np.testing.assert_array_equal(ExactSum(limbs).value, expected)


def test_float64_sums_depend_on_both() -> None:
    """The negative control."""
    draw = np.random.default_rng(1)
    vectors = list(draw.standard_normal((40, 3)))
    orders = {tuple(in_order(draw.permutation(vectors))) for _ in range(20)}
    assert len(orders) > 1
    halves = in_order(np.array([in_order(np.array(vectors[:20])), in_order(np.array(vectors[20:]))]))
    assert not np.array_equal(halves, in_order(np.array(vectors)))


def in_order(vectors: F64) -> F64:
    total = OrderedSum(np.zeros(3))
    for vector in vectors:
        total.add(vector)
    return total.value


def test_values_at_places_are_one_term_each() -> None:
    """Added up at each place first, in float64, so that a client's steps are as one number."""
    places, values = np.array([2, 0, 2, 2]), np.array([0.1, 0.2, 0.3, -0.7])
    total = ExactSum.zeros(3)
    total.add_at(places, values)
    assert total.value.tolist() == [0.2, 0.0, 0.1 + 0.3 - 0.7]
    ordered = OrderedSum(np.array([1.0, 0.0, 1.0]))
    ordered.add_at(places, values)
    assert ordered.value.tolist() == [1.2, 0.0, 1.0 + 0.1 + 0.3 - 0.7]


def test_the_largest_number_of_the_largest_terms_fits() -> None:
    """A digit of the second and third kind is at most half of 2^40; the first holds the number's whole part."""
    limbs = ExactSum.zeros(1)
    limbs.add(np.array([-LARGEST]))
    most = math.nextafter(LARGEST, 0)
    limbs.add(np.array([most]))
    assert limbs.value[0] == most - LARGEST
    assert LARGEST * MAX_TERMS < 2**62
    assert 2 ** (DIGIT - 1) * MAX_TERMS < 2**62
    assert limbs.limbs.shape == (LIMBS, 1)
