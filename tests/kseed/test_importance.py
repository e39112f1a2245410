"""FedKSeed-Pro's probabilities against a case computed by hand, and their laws."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedkseed.kseed.importance import importances, probabilities

PHI = arrays(np.float64, st.integers(1, 50), elements=st.floats(0, 1000))


def test_importances_and_probabilities_by_hand() -> None:
    """Histories (0, 2, 4), (0, 1000), (0), (0, 1): means 2, 500, 0, 1/2; by min-max 0.004, 1, 0, 0.001."""
    phi = importances(np.array([6.0, 1000.0, 0.0, 1.0]), np.array([2, 1, 0, 1]))
    assert phi.tolist() == [2.0, 500.0, 0.0, 0.5]
    weights = [math.exp(0.004), math.e, 1.0, math.exp(0.001)]
    assert probabilities(phi) == pytest.approx([w / sum(weights) for w in weights], rel=1e-14)
    # 1.004008, 2.718282, 1 and 1.001001 over their sum, 5.723291
    assert probabilities(phi) == pytest.approx([0.175425, 0.474951, 0.174725, 0.174899], abs=1e-6)


def test_the_history_starts_with_one_zero() -> None:
    """Otherwise a seed that was drawn once would beat one that was as good many times."""
    phi = importances(np.array([10.0, 100.0]), np.array([1, 10]))
    assert phi[0] == 5
    assert phi[1] == pytest.approx(100 / 11)


def test_no_history_is_uniform() -> None:
    assert probabilities(importances(np.zeros(7), np.zeros(7, np.int64))).tolist() == [1 / 7] * 7


@given(st.integers(1, 100), st.floats(0, 1000))
def test_equal_importance_is_uniform(size: int, value: float) -> None:
    share = probabilities(np.full(size, value))
    assert share == pytest.approx(np.full(size, 1 / size), rel=1e-12)


@given(PHI)
def test_probabilities_sum_to_one_and_follow_the_importances(phi: NDArray[np.float64]) -> None:
    share = probabilities(phi)
    assert share.dtype == np.float64
    assert share.sum() == pytest.approx(1, abs=1e-12)
    assert np.all(share > 0)
    assert share.max() / share.min() <= math.e * (1 + 1e-12)
    order = np.argsort(phi)
    assert np.all(np.diff(share[order]) >= 0)


@given(st.floats(1e-6, 1e6), st.floats(0, 1e3))
def test_only_relative_importance_counts(scale: float, shift: float) -> None:
    phi = np.array([0.0, 1.0, 2.0, 5.0])
    assert probabilities(phi * scale + shift) == pytest.approx(probabilities(phi), rel=1e-5)
    spread = probabilities(phi * scale + shift)
    assert spread.max() / spread.min() == pytest.approx(math.e, rel=1e-9)


def test_arguments_are_left_alone() -> None:
    sums, counts = np.array([1.0, 2.0]), np.array([1, 1])
    probabilities(importances(sums, counts))
    assert (sums.tolist(), counts.tolist()) == ([1, 2], [1, 1])


@given(
    st.lists(st.lists(st.floats(-5000, 5000), max_size=6), min_size=1, max_size=8),
    st.floats(0.5, 2000),
    st.floats(0, 100),
)
def test_against_the_paper_written_down_slowly(gradients: list[list[float]], clip: float, begin: float) -> None:
    """Each seed's history begins with `begin`, then has min(|g|, clip); its importance is the history's mean."""
    histories = [[begin, *(min(abs(g), clip) for g in of_seed)] for of_seed in gradients]
    phi = [sum(history) / len(history) for history in histories]
    low, high = min(phi), max(phi)
    weights = [math.exp((x - low) / (high - low)) if high > low else 1.0 for x in phi]
    sums = np.array([sum(history[1:]) for history in histories])
    counts = np.array([len(of_seed) for of_seed in gradients])
    found = importances(sums, counts, begin)
    assert found == pytest.approx(np.array(phi), rel=1e-12, abs=1e-12)
    if high == low or high - low > 1e-6:  # nearer, and rounding decides which is the larger
        assert probabilities(found) == pytest.approx(np.array(weights) / sum(weights), rel=1e-6)


def test_a_start_makes_the_undrawn_seeds_worth_drawing() -> None:
    """One that was drawn twice with gradient 10 beats one that was never drawn, unless histories start above 10."""
    sums, counts = np.array([20.0, 0.0]), np.array([2, 0])
    assert np.argmax(importances(sums, counts)) == np.argmax(importances(sums, counts, 9)) == 0
    assert np.argmax(importances(sums, counts, 11)) == 1
