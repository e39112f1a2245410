"""The coding of secure sums: exact, of any order, never over its range."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedkseed.errors import ProtocolError
from fedkseed.federation import shares
from fedkseed.federation.envelope import LARGEST_CLIP, SMALLEST_CLIP
from fedkseed.secure.fixed_point import MAX_COHORT, FixedPoint

CLIPS = st.floats(SMALLEST_CLIP, LARGEST_CLIP)
SIZES = st.lists(st.integers(1, 2**40), min_size=3, max_size=40)
COHORTS = st.one_of(SIZES, st.just([1] * MAX_COHORT))


@given(CLIPS, COHORTS, st.sampled_from([1.0, -1.0]))
def test_no_cohort_runs_over(clip: float, sizes: list[int], sign: float) -> None:
    """The worst case: all send the largest number; as integers of Python their sum is one of 32 bits."""
    coding = FixedPoint(clip, len(sizes))
    weights = shares({str(i): size for i, size in enumerate(sizes)}, 0.5).values()
    sent = [int(coding.encode(np.array([sign * 2 * clip]), weight).view(np.int32)[0]) for weight in set(weights)]
    counts = [list(weights).count(weight) for weight in set(weights)]
    total = sum(number * count for number, count in zip(sent, counts, strict=True))
    assert -(2**31) < total < 2**31
    assert coding.decode(np.array([total], np.int64).astype(np.uint32), sum(weights))[0] == pytest.approx(sign * clip, rel=1e-5)


def test_a_coding_with_no_room_left_does_run_over() -> None:
    """The control: with the weights of twice as many clients the same sum has another sign."""
    coding = FixedPoint(1.0, 3)
    one = coding.encode(np.array([1.0]), 0.5)
    assert coding.decode(one + one, 1.0)[0] == pytest.approx(1.0)
    assert coding.decode(one + one + one, 1.0)[0] < 0


@given(
    arrays(np.float64, (5, 7), elements=st.floats(-50, 50)),
    st.lists(st.integers(1, 1000), min_size=5, max_size=5),
    st.permutations(range(5)),
)
def test_the_mean_is_within_the_rounding_whatever_the_order(vectors: np.ndarray, sizes: list[int], order: list[int]) -> None:
    coding = FixedPoint(20.0, 5)
    weights = list(shares({str(i): size for i, size in enumerate(sizes)}, 0.5).values())
    sent = [coding.encode(vector, weight) for vector, weight in zip(vectors, weights, strict=True)]
    total = np.sum(sent, axis=0, dtype=np.uint32)
    assert np.array_equal(total, np.sum([sent[i] for i in order], axis=0, dtype=np.uint32))
    mean = sum(weight * np.clip(vector, -20, 20) for vector, weight in zip(vectors, weights, strict=True))
    assert np.abs(coding.decode(total, sum(weights)) - mean).max() <= 5 / 2 / coding.scale * (1 + 1e-6)


def test_what_has_no_place_in_a_sum_is_refused() -> None:
    coding = FixedPoint(1.0, 3)
    with pytest.raises(ProtocolError, match=r"^a number to be summed is nan; all must be finite"):
        coding.encode(np.array([0.0, np.nan]), 0.5)
    for weight in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ProtocolError, match="weight is"):
            coding.encode(np.array([0.0]), weight)
    with pytest.raises(ProtocolError, match=r"^a secure sum of 10001 clients; expected 1 to 10000"):
        FixedPoint(1.0, MAX_COHORT + 1)
    for clip in (0.0, float("inf"), float("nan"), 1e10):
        with pytest.raises(ProtocolError, match="clip is"):
            FixedPoint(clip, 3)
