"""The Gaussian mechanism: no vector moves a sum further than its bound, noise is normal, nothing else is left in the bits."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from tests.support.entropy import Bytes

from fedkseed.privacy import Mechanism, poisson_sample
from fedkseed.privacy.mechanism import GRID, normal, uniform

F64 = NDArray[np.float64]
NUMBERS = st.floats(width=64) | st.floats(-10, 10)
SIZE = 5
VECTORS = st.lists(NUMBERS, min_size=SIZE, max_size=SIZE).map(np.array)
CLIPS = st.sampled_from([1e-6, 0.3, 1.0, 77.0, 1e12])


@given(VECTORS, CLIPS)
def test_no_vector_is_longer_than_its_bound_to_the_last_bit(vector: F64, clip_norm: float) -> None:
    bounded = Mechanism(clip_norm, 1.0).bounded(vector)
    assert sum(int(x) ** 2 for x in bounded) <= GRID**2
    assert np.all(bounded * np.where(np.isfinite(vector), vector, 0) >= 0)  # no coordinate changes its sign


@given(st.lists(st.floats(-3, 3), min_size=SIZE, max_size=SIZE).map(np.array))
def test_a_short_vector_is_left_as_it_is_but_for_the_grid(vector: F64) -> None:
    clip_norm = 8.0
    kept = Mechanism(clip_norm, 1.0).bounded(vector) * (clip_norm / GRID)
    assert np.abs(kept - vector).max() <= clip_norm / GRID + 3 * 2.0**-29


def distance(release: Callable[[list[F64]], F64], some: list[F64], others: list[F64]) -> float:
    return float(np.linalg.norm(release(some) - release(others)))


@given(st.lists(VECTORS, max_size=6), VECTORS, VECTORS, CLIPS, st.sampled_from([1.0, 4.0]))
def test_adding_taking_away_or_replacing_a_record_moves_what_is_released_by_at_most_the_bound(
    others: list[F64], one: F64, another: F64, clip_norm: float, count: float
) -> None:
    """With the same noise. The sum in integers is exact; the last product rounds."""
    bound = clip_norm / count * (1 + 1e-12)

    def release(vectors: list[F64]) -> F64:
        return Mechanism(clip_norm, 1.0, Bytes("same noise")).release(vectors, SIZE, count)

    room = 1e-14 * clip_norm * (len(others) + 8)
    assert distance(release, others, [*others, one]) <= bound + room
    assert distance(release, [another, *others], others) <= bound + room
    assert distance(release, [*others, one], [*others, another]) <= 2 * bound + 2 * room


@pytest.mark.parametrize(
    "wrong",
    [
        lambda vectors, clip_norm: sum(vectors),
        lambda vectors, clip_norm: sum(np.clip(vector, -clip_norm, clip_norm) for vector in vectors),
        lambda vectors, clip_norm: sum(vectors) / len(vectors),
    ],
    ids=["unclipped", "each number clipped by itself", "divided by how many there are"],
)
def test_the_bound_does_not_hold_of_what_is_not_the_mechanism(wrong: Callable[[list[F64], float], F64]) -> None:
    one, other = np.full(SIZE, 9.0), np.full(SIZE, -9.0)

    def release(vectors: list[F64]) -> F64:
        return np.asarray(wrong(vectors, 1.0), np.float64)

    assert distance(release, [one], [one, other]) > 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e308])
def test_what_is_not_finite_counts_as_nothing(bad: float) -> None:
    assert not Mechanism(1.0, 1.0).bounded(np.array([bad, bad, 1.0])).any()


# --- Noise ---

DRAWS = 40_000


def fits(noise: NDArray[np.integer] | F64, deviation: float) -> float:
    """The p-value of normal noise of that deviation: of its distribution, and of its variance, whichever is less."""
    square = float(np.sum((np.asarray(noise, np.float64) / deviation) ** 2))
    tail = stats.chi2(len(noise)).cdf(square)
    return min(float(stats.kstest(noise / deviation, "norm").pvalue), 2 * min(tail, 1 - tail))


@pytest.mark.parametrize("deviation", [0.25 * GRID, 7.5 * GRID])
def test_noise_is_normal_of_its_deviation(deviation: float) -> None:
    noise = normal(DRAWS, deviation, Bytes("noise"))
    assert noise.dtype == np.int64
    assert fits(noise, deviation) > 0.01
    assert abs(np.corrcoef(noise[: DRAWS // 2], noise[DRAWS // 2 :])[0, 1]) < 0.03  # the two of a pair


def test_noise_that_is_not_does_not_pass() -> None:
    draw = np.random.default_rng(1)
    assert fits(normal(DRAWS, GRID * 1.03, Bytes("noise")), GRID) < 1e-6
    assert fits(draw.laplace(0, GRID / math.sqrt(2), DRAWS), GRID) < 1e-6
    assert fits(draw.uniform(-1, 1, DRAWS) * GRID * math.sqrt(3), GRID) < 1e-6
    assert fits(np.abs(normal(DRAWS, GRID, Bytes("noise"))), GRID) < 1e-6


@pytest.mark.parametrize("vectors", [[], [np.array([0.1, 1 / 3, 1e-9])], [np.full(3, 0.7), np.array([1e-3, -2.0, 5.0])]])
def test_all_that_can_be_released_lies_on_one_grid(vectors: list[F64]) -> None:
    """Whatever was added up: floating-point sums, the wrong variant, tell it in their last bits."""
    points = Mechanism(1.0, 0.5, Bytes("grid")).release(vectors, 3, 4.0) * 4 * GRID
    assert np.array_equal(points, np.rint(points))
    if vectors:
        wrong = (sum(vectors) + 0.5 * np.array([0.1, 0.2, 0.3])) * GRID
        assert not np.array_equal(wrong, np.rint(wrong))


def test_noise_is_the_operating_systems_and_never_the_same() -> None:
    mechanism = Mechanism(1.0, 1.0)
    assert not np.array_equal(mechanism.release([], 8, 1.0), mechanism.release([], 8, 1.0))
    quiet = Mechanism(1.0, 0.0)
    assert not quiet.release([], 8, 1.0).any()


def test_uniform_numbers_are_below_one() -> None:
    assert uniform(1, lambda count: b"\xff" * count)[0] == 1 - 2.0**-53
    assert uniform(1, bytes)[0] == 0.0
    assert np.abs(normal(2, 1.0, lambda count: b"\xff" * count)).max() <= 9


# --- Poisson samples ---


def sizes_fit(sizes: list[int], count: int, rate: float) -> float:
    """The p-value of binomial batch sizes, by chi squared over the sizes that are likely."""
    expected = stats.binom(count, rate).pmf(np.arange(count + 1)) * len(sizes)
    likely = expected >= 5
    found = np.bincount(sizes, minlength=count + 1)
    cells = [*found[likely], found[~likely].sum()]
    return float(stats.chisquare(cells, [*expected[likely], expected[~likely].sum()]).pvalue)


def test_a_batch_has_each_record_on_its_own() -> None:
    source, batches = Bytes("batches"), []
    for _ in range(4000):
        batches.append(poisson_sample(20, 0.15, source).tolist())
    sizes = [len(batch) for batch in batches]
    assert min(sizes) == 0  # an empty batch is a batch
    assert sizes_fit(sizes, 20, 0.15) > 0.01
    times = np.bincount([record for batch in batches for record in batch], minlength=20)
    assert stats.chisquare(times).pvalue > 0.01
    together = sum(3 in batch and 11 in batch for batch in batches)
    assert stats.binomtest(together, 4000, 0.15**2).pvalue > 0.01
    assert sizes_fit([3] * 4000, 20, 0.15) < 1e-6  # batches of one size, the wrong variant
    assert poisson_sample(7, 1.0, source).tolist() == list(range(7))
