"""Steps on scores, against theory, on functions of which everything is known (float64)."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

import fedkseed as fk
from fedkseed.federation.config import FederationConfig
from fedkseed.kseed.population import population_steps, slopes
from fedkseed.kseed.steps import StepSettings, largest_grad, update

F64 = NDArray[np.float64]
EPS = 2.0**-6
scaled = pytest.mark.parametrize("scaling", ["z-scores", "ranks"])
# losses of whole numbers, as shares of right answers are but for their denominator: what comes of them is exact
PROBES = st.integers(1, 12).flatmap(lambda n: arrays(np.float64, (n, 2), elements=st.integers(-40, 40).map(float)))


class Toy:
    """Float64 weights that move along a pool's perturbations."""

    def __init__(self, n: int = 96) -> None:
        self.pool, self.w = fk.SeedPool(17, 128), np.random.default_rng(1).standard_normal(n)

    def z(self, k: int) -> F64:
        return self.pool.perturbation("w", len(self.w), k).astype(np.float64)

    def move(self, indices: Sequence[int], amounts: Sequence[float]) -> None:
        for k, amount in zip(indices, amounts, strict=True):
            self.w = self.w + amount * self.z(k)


def settings(**changes: Any) -> StepSettings:
    return StepSettings(**{"lr": 2.0**-8, "eps": EPS, "directions": 3, "scaling": "none"} | changes)


# --- What is made of a step's losses ---


@given(PROBES, st.sampled_from([0.25, 3.0, 512.0]), st.integers(-9, 9))
def test_neither_the_unit_of_a_score_nor_its_zero_counts(probes: F64, unit: float, zero: int) -> None:
    """With `none` the unit does: the variant that must fail."""
    other = probes * unit + zero
    for scaling in ("z-scores", "ranks"):
        np.testing.assert_allclose(slopes(other, EPS, scaling), slopes(probes, EPS, scaling), atol=1e-9)
    plain = slopes(probes, EPS, "none")
    assert not plain.any() or np.abs(slopes(other, EPS, "none") - plain).max() > 1e-9


@given(PROBES)
def test_of_ranks_only_the_order_counts(probes: F64) -> None:
    np.testing.assert_array_equal(slopes(probes**3, EPS, "ranks"), slopes(probes, EPS, "ranks"))


def test_of_z_scores_the_distances_count_too() -> None:
    probes = np.array([[1.0, 2.0], [3.0, 9.0]])
    assert np.abs(slopes(probes**3, EPS, "z-scores") - slopes(probes, EPS, "z-scores")).max() > 0.05


@given(PROBES)
def test_a_slope_is_no_larger_than_the_server_accepts_and_has_its_pairs_sign(probes: F64) -> None:
    for scaling in ("z-scores", "ranks"):
        found = slopes(probes, EPS, scaling)
        most = largest_grad(FederationConfig(lr=1, objective="exact-match", scaling=scaling, directions=len(probes)))
        assert np.abs(found).max() <= most
        np.testing.assert_array_equal(np.sign(found), np.sign(probes[:, 0] - probes[:, 1]))


def test_the_bounds_are_reached() -> None:
    """By one pair as far apart as can be, the others in its middle; and no sooner with ranks than by first and last."""
    probes = np.array([[1.0, -1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert slopes(probes, EPS, "z-scores")[0] == pytest.approx(2.0)
    assert slopes(probes, EPS, "ranks")[0] == pytest.approx(0.5)


@scaled
@pytest.mark.parametrize("value", [0.0, 0.1, -1e300, 1e-300])
def test_scores_that_are_all_alike_say_nothing(scaling: Any, value: float) -> None:
    assert slopes(np.full((3, 2), value), EPS, scaling).tolist() == [0, 0, 0]


@scaled
def test_huge_scores_are_scores(scaling: Any) -> None:
    found = slopes(np.array([[1e300, -1e300], [0.0, 1e299]]), EPS, scaling)
    assert np.isfinite(found).all()
    assert found[0] > 0 > found[1]


# --- The steps ---

INDICES = [5, 0, 17, 17, 127, 3]


def test_probes_and_updates_are_where_the_algorithm_says() -> None:
    """Both sides of each perturbation from one centre, on one batch; then one update along all."""
    toy, chosen, seen = Toy(), settings(), list[tuple[int, F64]]()
    slope = np.random.default_rng(2).standard_normal(len(toy.w))

    def loss(step: int) -> float:
        seen.append((step, toy.w))
        return float(slope @ toy.w)

    w = toy.w
    steps = population_steps(toy, INDICES, loss, chosen)
    assert [step for step, _ in seen] == [0] * 6 + [1] * 6
    assert (steps.projected_grads.shape, steps.losses.shape, steps.dropped) == ((6,), (2,), ())
    for t in range(2):
        seeds, probes = INDICES[3 * t : 3 * t + 3], [x for step, x in seen if step == t]
        sent = steps.projected_grads[3 * t : 3 * t + 3]
        for j, k in enumerate(seeds):
            for side, sign in ((0, 1), (1, -1)):
                assert np.abs(probes[2 * j + side] - (w + sign * EPS * toy.z(k))).max() < 1e-12
            assert sent[j] == pytest.approx(slope @ toy.z(k), rel=1e-6)  # of a linear loss exactly the slope
        w = w - sum(float(update(chosen.lr, grad)) * toy.z(k) for k, grad in zip(seeds, sent, strict=True))
    assert np.abs(toy.w - w).max() < 1e-12


@scaled
def test_a_score_rises(scaling: Any) -> None:
    """Of a stepped function of the weights, which has no gradient anywhere; with the sign turned it falls."""
    goal = np.random.default_rng(3).standard_normal(96)

    def score(w: F64) -> float:
        return float(np.mean(np.sign(w) == np.sign(goal)))

    ends = {}
    for sign in (1, -1):
        toy = Toy()
        indices = np.random.default_rng(4).integers(0, 128, 8 * 60).tolist()
        chosen = settings(lr=0.05, eps=0.25, directions=8, scaling=scaling)
        start = score(toy.w)
        population_steps(toy, indices, lambda step, toy=toy, sign=sign: -sign * score(toy.w), chosen)
        ends[sign] = score(toy.w) - start
    assert ends[1] > 0.1
    assert ends[-1] < -0.1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_score_that_is_no_number_drops_its_step(bad: float, place: int) -> None:
    """All of its slopes; the weights stay where the step before has led, and the next step is taken."""
    toy, calls = Toy(), 0

    def loss(step: int) -> float:
        nonlocal calls
        calls += 1
        return bad if calls == 6 + place + 1 else float(toy.w[0] + toy.w[1])

    steps = population_steps(toy, [*INDICES, 9, 8, 7], loss, settings(scaling="z-scores"))
    assert steps.dropped == (1,)
    assert steps.projected_grads[3:6].tolist() == [0, 0, 0]
    assert steps.projected_grads[:3].any()
    assert steps.projected_grads[6:].any()
    expected = Toy()
    for t in (0, 2):
        grads = steps.projected_grads[3 * t : 3 * t + 3]
        seeds = [*INDICES, 9, 8, 7][3 * t : 3 * t + 3]
        expected.move(seeds, [-float(update(2.0**-8, grad)) for grad in grads])
    assert np.abs(toy.w - expected.w).max() < 1e-12
