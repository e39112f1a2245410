"""The contract table of the rules: every law over every row, and the mean as what must fail where it is not robust."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedkseed.federation.aggregators import AGGREGATORS, TRIM, Aggregator, clip_shares, mean

F64 = NDArray[np.float64]
every = pytest.mark.parametrize("rule", AGGREGATORS.values(), ids=AGGREGATORS)
HONEST = st.floats(-1, 1, allow_subnormal=False)
ANYTHING = st.floats(-1e60, 1e60, allow_subnormal=False)
quick = settings(max_examples=40, deadline=None)


def some(n: int, k: int, seed: int = 1) -> tuple[F64, F64]:
    draw = np.random.default_rng(seed)
    weights = draw.uniform(1, 2, n)
    return draw.standard_normal((n, k)), weights / weights.sum()


@every
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 10, 11])
def test_the_order_of_the_replies_does_not_matter(rule: Aggregator, n: int) -> None:
    vectors, weights = some(n, 7)
    expected, shares = rule.combine(vectors, weights)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(n)
        found, shuffled = rule.combine(vectors[order], weights[order])
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(shuffled, shares[order], rtol=1e-9, atol=1e-12)


@every
@quick
@given(data=st.data(), n=st.integers(1, 12), k=st.integers(1, 4), total=st.floats(0.1, 10))
def test_of_identical_replies_it_is_their_mean(rule: Aggregator, data: st.DataObject, n: int, k: int, total: float) -> None:
    """To the size of the weights' sum, which need not be 1."""
    vector = data.draw(arrays(np.float64, k, elements=HONEST))
    weights = data.draw(arrays(np.float64, n, elements=st.floats(0.1, 1)))
    weights *= total / weights.sum()
    found, shares = rule.combine(np.tile(vector, (n, 1)), weights)
    np.testing.assert_allclose(found, total * vector, rtol=1e-9, atol=1e-12)
    assert ((shares >= 0) & (shares <= 1 + 1e-9)).all()


@every
def test_twice_the_weights_are_twice_the_numbers(rule: Aggregator) -> None:
    vectors, weights = some(9, 5)
    np.testing.assert_allclose(rule.combine(vectors, 2 * weights)[0], 2 * rule.combine(vectors, weights)[0], rtol=1e-12)


def furthest(rule: Aggregator, n: int, honest: F64, hostile: F64) -> float:
    """How far the numbers lie from zero, relative to the longest honest reply."""
    vectors = np.vstack([honest, hostile])
    found, _ = rule.combine(vectors, np.full(n, 1 / n))
    return float(np.linalg.norm(found) / max(np.linalg.norm(honest, axis=1).max(), 1e-9))


@every
@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(1, 12), k=st.integers(1, 4))
def test_up_to_its_breakdown_point_hostile_replies_lead_nowhere(rule: Aggregator, data: st.DataObject, n: int, k: int) -> None:
    """At most n times as far as the honest lie: of a median sqrt(k), of a clipped mean 1, of krum its neighbours' distances."""
    f = rule.breakdown(n)
    honest = data.draw(arrays(np.float64, (n - f, k), elements=HONEST.filter(lambda x: abs(x) > 1e-3)))
    hostile = data.draw(arrays(np.float64, (f, k), elements=ANYTHING))
    assert furthest(rule, n, honest, hostile) <= 4 * n


@every
@pytest.mark.parametrize("n", [5, 8, 10, 11])
def test_beyond_its_breakdown_point_they_lead_anywhere(rule: Aggregator, n: int) -> None:
    """The negative control of the law above: one more hostile reply, and alike ones, for krum enough to be a cluster."""
    f = rule.breakdown(n) + 1
    f = {"krum": n - rule.breakdown(n), "trimmed-mean": max(f, n // 4 + 1), "clipped": n // 2 + 1, "median": n // 2 + 1}.get(
        rule.name, f
    )
    honest, _ = some(n - f, 3)
    assert furthest(rule, n, honest, np.full((f, 3), 1e9)) > 1e3


def test_one_of_ten_at_the_limit_carries_the_mean_away_and_no_other() -> None:
    honest, _ = some(9, 6)
    hostile = np.full((1, 6), 1e4)
    far = {name: furthest(rule, 10, honest, hostile) for name, rule in AGGREGATORS.items()}
    assert far.pop("mean") > 100
    assert max(far.values()) < 2


# --- Each by paper and pencil ---


def test_clipped_by_hand() -> None:
    vectors = np.array([[3.0, 4.0], [0.0, 1.0], [0.0, -20.0], [0.0, 0.0]])  # of the lengths 5, 1, 20 and 0 the median is 5
    found, shares = AGGREGATORS["clipped"].combine(vectors, np.full(4, 0.25))
    assert found == pytest.approx([3 / 3.25, 0])  # (4 + 1 - 20 / 4) / 3.25, since the weights are 1, 1, 1/4 and 1 of that
    assert shares.tolist() == [1, 1, 0.25, 1]
    assert clip_shares(np.zeros(3)).tolist() == [1, 1, 1]


def test_who_claims_many_records_counts_as_much_as_the_median_client() -> None:
    vectors, weights = np.array([[1.0]] * 4 + [[-1.0]]), np.array([0.15] * 4 + [0.4])
    found, shares = AGGREGATORS["clipped"].combine(vectors, weights)
    assert found == pytest.approx([0.6])
    assert shares == pytest.approx([1, 1, 1, 1, 0.375])
    assert mean(vectors, weights)[0] == pytest.approx([0.2])


def test_trimmed_mean_and_median_by_hand() -> None:
    vectors, weights = np.array([[1.0], [2.0], [4.0], [100.0]]), np.full(4, 0.25)
    found, shares = AGGREGATORS["trimmed-mean"].combine(vectors, weights)
    assert found == pytest.approx([3.0])
    assert shares == pytest.approx([0, 1, 1, 0])
    assert AGGREGATORS["median"].combine(vectors, weights)[0] == pytest.approx([3.0])
    assert AGGREGATORS["median"].combine(vectors[:3], np.array([0.25, 0.25, 0.5]))[0] == pytest.approx([3.0])  # between 2 and 4
    assert AGGREGATORS["median"].combine(vectors, np.array([0.1, 0.1, 0.1, 0.7]))[0] == pytest.approx([100.0])  # by weight
    heavy = AGGREGATORS["trimmed-mean"].combine(vectors[:2], np.array([0.4, 0.6]))[0]  # 0.15 of the first, 0.35 of the second
    assert heavy == pytest.approx([(0.15 * 1 + 0.35 * 2) / (1 - 2 * TRIM)])


def test_krum_by_hand() -> None:
    """Of five one may lie: the four that lie together are taken, by their weights."""
    vectors = np.array([[0.0], [1.0], [2.0], [3.0], [50.0]])
    found, chosen = AGGREGATORS["krum"].combine(vectors, np.array([0.1, 0.1, 0.1, 0.1, 0.6]))
    assert chosen.tolist() == [1, 1, 1, 1, 0]
    assert found == pytest.approx([1.5])
    assert AGGREGATORS["krum"].combine(vectors[:4], np.full(4, 0.25))[1].tolist() == [1, 1, 1, 1]


def test_the_mean_adds_up_in_the_order_of_the_rows() -> None:
    """To the bit: ledgers of before stay what they were."""
    vectors, weights = some(7, 50)
    total = np.zeros(50)
    for vector, weight in zip(vectors, weights, strict=True):
        total += weight * vector
    np.testing.assert_array_equal(mean(vectors, weights)[0], total)


def test_only_the_mean_can_do_with_a_sum() -> None:
    assert {name for name, rule in AGGREGATORS.items() if not rule.needs_each_reply} == {"mean"}
    assert {name for name, rule in AGGREGATORS.items() if not rule.same_seeds} == {"mean", "clipped"}


def test_place_by_place_rules_are_zero_where_replies_are_of_other_seeds() -> None:
    """Why they want shared seeds: each reply is alone at its places."""
    vectors = np.kron(np.eye(10), np.ones(3))
    for name, rule in AGGREGATORS.items():
        found, _ = rule.combine(vectors, np.full(10, 0.1))
        assert bool(found.any()) == (name not in ("trimmed-mean", "median"))
