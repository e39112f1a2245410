"""The running scale: what few clients cannot move, and what it bounds."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedkseed.kseed import scale
from fedkseed.kseed.scale import FACTOR, WORDS, largest, word

F64 = NDArray[np.float64]
NONE = np.zeros(0)


def followed(words: F64, scalars: Sequence[F64]) -> F64:
    return scale.followed(words, np.array([word(one) for one in scalars]))


def test_a_word_is_the_median_magnitude_of_what_is_not_zero() -> None:
    words = followed(NONE, [np.array([3.0, 0, -1, 2, 0]), np.zeros(4), np.array([-8.0, 1e4])])
    assert words.tolist() == [2.0, (8 + 1e4) / 2]
    assert largest(words) == FACTOR * np.median(words)
    assert largest(NONE) == np.inf


def test_the_last_words_are_kept_and_a_cohort_as_a_whole() -> None:
    words = NONE
    for i in range(100):
        words = followed(words, [np.array([1.0 + i])])
    assert words.tolist() == [float(i) for i in range(101 - WORDS, 101)]
    assert len(followed(words, [np.ones(2)] * (WORDS + 7))) == WORDS + 7


@settings(max_examples=50, deadline=None)
@given(
    honest=st.lists(st.floats(1, 3), min_size=1, max_size=40),
    hostile=st.lists(st.floats(1e-30, 1e30), max_size=39),
    few=st.lists(st.floats(0, 1e30), max_size=3),
)
def test_less_than_half_of_the_words_do_not_lead_it_away(honest: list[float], hostile: list[float], few: list[float]) -> None:
    """Nor do fewer than half of a client's own scalars. Half and more do: the control."""
    lies = hostile[: len(honest) - 1]
    words = followed(NONE, [*(np.array([x, -x, x, x, *few]) for x in honest), *(np.full(4, x) for x in lies)])
    assert FACTOR <= largest(words) <= 3 * FACTOR
    assert largest(followed(NONE, [np.full(4, x) for x in [*honest, *[1e9] * (len(honest) + 1)]])) > 3 * FACTOR


@pytest.mark.parametrize("lie", [1e-3, 1e4])
def test_it_follows_honest_scalars_that_all_change(lie: float) -> None:
    """By more than half of the words: a run is not held where it began."""
    words = NONE
    for _ in range(20):
        words = followed(words, [np.full(3, 1.0)] * 5 + [np.full(3, lie)])
    for _ in range(8):
        words = followed(words, [np.full(3, 7.0)] * 5 + [np.full(3, lie)])
    assert largest(words) == 7 * FACTOR
