"""The two-point estimator and the local step against theory, on functions of which everything is known (float64)."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fedkseed as fk
from fedkseed.kseed.steps import LocalSteps, StepSettings, local_steps, projected_grad, update

F64 = NDArray[np.float64]


class Toy:
    """Float64 weights that move along a pool's perturbations, and a record of every move."""

    def __init__(self, pool: fk.SeedPool, w: F64) -> None:
        self.pool, self.w = pool, w.copy()
        self.moves: list[tuple[list[int], list[float]]] = []

    def z(self, k: int) -> F64:
        return self.pool.perturbation("w", len(self.w), k).astype(np.float64)

    def move(self, indices: Sequence[int], amounts: Sequence[float]) -> None:
        self.moves.append((list(indices), list(amounts)))
        for k, amount in zip(indices, amounts, strict=True):
            self.w = self.w + amount * self.z(k)


def quadratic(n: int) -> tuple[Callable[[F64], float], F64, F64]:
    """f, where it is looked at, and its gradient there."""
    rng = np.random.default_rng(3)
    root, b, w = rng.standard_normal((n, n)), rng.standard_normal(n), rng.standard_normal(n)
    a = root @ root.T / n
    return lambda x: float(x @ a @ x / 2 - b @ x), w, a @ w - b


# --- The estimator ---


def two_point(f: Callable[[F64], float], w: F64, z: F64, eps: float) -> float:
    return projected_grad(f(w + eps * z), f(w - eps * z), eps)


def one_sided(f: Callable[[F64], float], w: F64, z: F64, eps: float) -> float:
    return (f(w + eps * z) - f(w)) / eps


def test_the_mean_over_all_hadamard_seeds_is_the_gradient() -> None:
    """Within one full block sum_k z_k z_k' = K I, and on a quadratic a central difference is exact: only rounding is left."""
    f, w, gradient = quadratic(128)
    toy = Toy(fk.SeedPool(7, 128), w)
    eps = 0.125
    terms = np.array([two_point(f, w, toy.z(k), eps) * toy.z(k) for k in range(128)])
    tolerance = 1e-10 * np.abs(gradient).max()
    assert np.abs(terms.mean(0) - gradient).max() < tolerance

    # variants that must fail: a seed never drawn, a factor, a difference on one side
    assert np.abs(terms[1:].mean(0) - gradient).max() > 1e6 * tolerance
    assert np.abs(2 * terms.mean(0) - gradient).max() > 1e6 * tolerance
    one = np.array([one_sided(f, w, toy.z(k), eps) * toy.z(k) for k in range(128)])
    assert np.abs(one.mean(0) - gradient).max() > 1e6 * tolerance


def test_the_mean_over_gaussian_seeds_tends_to_the_gradient() -> None:
    """E g z = gradient; an entry of g z has variance |gradient|^2 + gradient_i^2. Five of its deviations are allowed.

    (Elements are independent: a seed's perturbation of 256 elements is 64 draws of one in 4.)
    """
    f, w, gradient = quadratic(4)
    draws = 8192
    toy = Toy(fk.SeedPool(11, 128, "gaussian"), np.zeros(256))
    z = np.concatenate([toy.z(k).reshape(-1, 4) for k in range(128)])
    g = np.array([two_point(f, w, row, 1e-3) for row in z])
    deviation = np.sqrt((gradient @ gradient + gradient**2) / draws)

    def far(estimates: F64) -> float:
        return float((np.abs((estimates[:, None] * z).mean(0) - gradient) / deviation).max())

    assert far(g) < 5
    assert far(1.25 * g) > 5  # a wrong factor
    assert far(np.clip(g, -1, 1)) > 5  # a clipped estimate
    assert far(np.abs(g)) > 5  # a lost sign


EPSILONS = (2.0**-4, 2.0**-5, 2.0**-6, 2.0**-7, 2.0**-8)


def slope(errors: Sequence[float]) -> float:
    """Of log error against log eps."""
    return float(np.polyfit(np.log(EPSILONS), np.log(errors), 1)[0])


def quartic(x: F64) -> float:
    return float(np.sum(np.arange(1, len(x) + 1) * x**4) / len(x) + np.sum(x**3) - x[0])


def quartic_gradient(x: F64) -> F64:
    gradient = 4 * np.arange(1, len(x) + 1) * x**3 / len(x) + 3 * x**2
    gradient[0] -= 1
    return gradient


@pytest.mark.parametrize("family", ["hadamard", "gaussian"])
def test_the_error_falls_as_the_square_of_eps(family: Any) -> None:
    w = np.random.default_rng(5).standard_normal(40) / 2
    toy = Toy(fk.SeedPool(13, 256, family), w)
    gradient = quartic_gradient(w)
    seeds = range(8)

    def error(estimate: Callable[..., float], eps: float) -> float:
        return float(np.mean([abs(estimate(quartic, w, toy.z(k), eps) - toy.z(k) @ gradient) for k in seeds]))

    assert slope([error(two_point, eps) for eps in EPSILONS]) == pytest.approx(2, abs=0.1)
    assert slope([error(one_sided, eps) for eps in EPSILONS]) == pytest.approx(1, abs=0.1)  # the variant that must fail


def test_local_steps_report_a_gradient_whose_error_falls_as_the_square_of_eps() -> None:
    """The same through `local_steps`: its probes are where they should be, not at w and w + eps z, say."""
    w = np.random.default_rng(5).standard_normal(40) / 2
    gradient = quartic_gradient(w)
    errors = []
    for eps in EPSILONS:
        found = []
        for k in range(8):
            toy = Toy(fk.SeedPool(13, 256), w)
            steps = local_steps(toy, [k], lambda _, toy=toy: quartic(toy.w), StepSettings(lr=1e-3, eps=eps))
            found.append(abs(float(steps.projected_grads[0]) - toy.z(k) @ gradient))
        errors.append(float(np.mean(found)))
    assert slope(errors) == pytest.approx(2, abs=0.1)


def test_projected_grad_divides_by_the_whole_distance() -> None:
    assert projected_grad(3.0, 1.0, 0.5) == 2.0
    assert projected_grad(1.0, 3.0, 0.5) == -2.0


# --- Local steps ---


INDICES = [5, 0, 5, 17, 17, 127, 3]


def trajectory(indices: Sequence[int], **settings: Any) -> tuple[Toy, F64, LocalSteps, list[tuple[int, F64]]]:
    """Local steps on a quartic: the model afterwards, where it was before, what came of it, and every probe's weights."""
    w = np.random.default_rng(1).standard_normal(96) / 2
    toy = Toy(fk.SeedPool(17, 128), w)
    seen: list[tuple[int, F64]] = []

    def loss(step: int) -> float:
        seen.append((step, toy.w))
        return quartic(toy.w)

    return toy, w, local_steps(toy, indices, loss, StepSettings(**{"lr": 1e-3, "eps": 1e-2} | settings)), seen


def test_a_step_is_two_losses_and_two_passes_and_there_is_one_pass_before_the_first() -> None:
    toy, _, steps, seen = trajectory(INDICES)
    assert [step for step, _ in seen] == [t for t in range(len(INDICES)) for _ in range(2)]
    assert len(toy.moves) == 1 + 2 * len(INDICES)
    assert steps.projected_grads.shape == steps.losses.shape == (len(INDICES),)
    assert steps.projected_grads.dtype == np.float32
    assert steps.losses.dtype == np.float64
    assert steps.dropped == ()


def test_no_steps_touch_nothing() -> None:
    toy, w, steps, seen = trajectory([])
    assert seen == toy.moves == []
    assert np.array_equal(toy.w, w)
    assert len(steps.projected_grads) == 0


def rounding(passes: int, w: F64, farthest: float) -> float:
    """Each pass adds at most two terms to numbers of at most |w| + farthest: half a unit in the last place each time."""
    return float(2 * passes * 2.0**-53 * (np.abs(w).max() + farthest))


def test_probes_and_updates_are_where_the_algorithm_says() -> None:
    """Probes at w_t + eps z and w_t - eps z with w_{t+1} = w_t - lr g z; the end is start - sum lr g z."""
    toy, w, steps, seen = trajectory(INDICES)
    eps = float(np.float32(1e-2))
    tolerance = rounding(len(toy.moves), w, 1.0)
    for t, k in enumerate(INDICES):
        plus, minus = seen[2 * t][1], seen[2 * t + 1][1]
        assert np.abs(plus - (w + eps * toy.z(k))).max() <= tolerance
        assert np.abs(minus - (w - eps * toy.z(k))).max() <= tolerance
        assert steps.losses[t] == (quartic(plus) + quartic(minus)) / 2
        assert steps.projected_grads[t] == np.float32((quartic(plus) - quartic(minus)) / (2 * eps))
        w = w - float(np.float32(1e-3 * float(steps.projected_grads[t]))) * toy.z(k)
    assert np.abs(toy.w - w).max() <= tolerance


@pytest.mark.parametrize("forgotten", range(len(INDICES)))
def test_forgetting_one_step_shows(forgotten: int) -> None:
    """The negative control of the test above: no step is so small that the tolerance would hide it."""
    toy, w, steps, _ = trajectory(INDICES)
    for t, k in enumerate(INDICES):
        if t != forgotten:
            w = w - float(update(1e-3, steps.projected_grads[t])) * toy.z(k)
    assert np.abs(toy.w - w).max() > 1000 * rounding(len(toy.moves), w, 1.0)


def test_the_loss_falls_on_a_quadratic() -> None:
    f, w, _ = quadratic(32)
    toy = Toy(fk.SeedPool(2, 128), w)
    local_steps(toy, list(range(128)), lambda _: f(toy.w), StepSettings(lr=5e-3, eps=1e-3))
    assert f(toy.w) < f(w) - 1


def test_update_is_rounded_once() -> None:
    lr, grad = 0.1, np.float32(1.7)
    assert update(lr, grad).dtype == np.float32
    assert update(lr, grad) == np.float32(lr * float(grad))
    assert any(update(lr, g) != np.float32(lr) * g for g in np.arange(1, 100, dtype=np.float32))  # twice is not the same


# --- What is dropped, and rounding: losses from a table, all numbers dyadic, so that float64 is exact ---


def scripted(losses: Sequence[float], **settings: Any) -> tuple[Toy, F64, LocalSteps]:
    """Steps along seeds 0, 1, 2, ... whose probes see these losses; lr 1/8, eps 1/1024, weights multiples of 1/1024."""
    w = np.arange(-8, 8) / 1024.0
    toy = Toy(fk.SeedPool(23, 128), w)
    table: Iterator[float] = iter(losses)
    chosen = StepSettings(**{"lr": 0.125, "eps": 2.0**-10} | settings)
    return toy, w, local_steps(toy, list(range(len(losses) // 2)), lambda _: next(table), chosen)


PLAIN = (2.0, 1.5)  # g = 0.5 * 512 = 256
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("bad", "settings"),
    [
        ((NAN, 1.0), {}),
        ((1.0, NAN), {}),
        ((INF, 1.0), {}),
        ((1.0, INF), {}),
        ((-INF, 1.0), {}),
        ((INF, INF), {}),
        ((INF, -INF), {}),
        ((NAN, NAN), {}),
        ((2.0, 1.5 - 2.0**-20), {"max_grad": 256.0}),
        ((1.5 - 2.0**-20, 2.0), {"max_grad": 256.0}),
        ((2.0, 1.5 - 2.0**-20), {"loss_clip": 0.5}),
        ((1.5 - 2.0**-20, 2.0), {"loss_clip": 0.5}),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_dropped_step_leaves_the_weights_unmoved_and_is_marked(
    bad: tuple[float, float], settings: dict[str, float], place: int
) -> None:
    pairs = [PLAIN] * 3
    pairs[place] = bad
    toy, w, steps = scripted([loss for pair in pairs for loss in pair], **settings)
    assert steps.dropped == (place,)
    assert steps.projected_grads.tolist() == [0.0 if t == place else 256.0 for t in range(3)]
    expected = w - sum(32.0 * toy.z(t) for t in range(3) if t != place)
    assert np.array_equal(toy.w, expected)
    assert [math.isfinite(loss) for loss in steps.losses] == [t != place or all(map(math.isfinite, bad)) for t in range(3)]


def test_all_steps_dropped_leave_everything() -> None:
    toy, w, steps = scripted([NAN] * 6)
    assert steps.dropped == (0, 1, 2)
    assert np.array_equal(toy.w, w)


@pytest.mark.parametrize("settings", [{"max_grad": 256.0}, {"loss_clip": 0.5}, {"loss_clip": None}])
def test_a_step_at_the_limit_is_kept(settings: dict[str, float]) -> None:
    toy, w, steps = scripted([*PLAIN, *PLAIN[::-1]], **settings)
    assert steps.dropped == ()
    assert steps.projected_grads.tolist() == [256.0, -256.0]
    assert np.array_equal(toy.w, w - 32.0 * toy.z(0) + 32.0 * toy.z(1))


def test_an_exact_zero_is_kept() -> None:
    """A gradient of 0 is a measurement, not a dropped step: it counts in Pro's history."""
    toy, w, steps = scripted([1.0, 1.0])
    assert steps.dropped == ()
    assert np.array_equal(toy.w, w)


@pytest.mark.parametrize(("precision", "bits"), [("float32", 24), ("float16", 11)])
def test_gradients_are_rounded_to_the_wire_before_the_update_uses_them(precision: Any, bits: int) -> None:
    exact = 256.0 + 256.0 * 2.0 ** -(bits + 1)  # between two numbers of that precision, nearer to 256
    difference = exact / 512
    toy, w, steps = scripted([difference, 0.0], precision=precision, max_grad=1e4)
    assert steps.projected_grads.tolist() == [256.0]
    assert np.array_equal(toy.w, w - 32.0 * toy.z(0))
    assert not np.array_equal(toy.w, w - exact / 8 * toy.z(0))  # the unrounded one would have moved elsewhere


def test_float32_keeps_what_float16_rounds() -> None:
    _, _, steps = scripted([0.5 + 2.0**-14, 0.0], precision="float32")
    assert steps.projected_grads.tolist() == [256.0 + 2.0**-5]
    _, _, steps = scripted([0.5 + 2.0**-14, 0.0], precision="float16")
    assert steps.projected_grads.tolist() == [256.0]


@pytest.mark.parametrize(("precision", "max_grad", "grad"), [("float32", 0.1, 0.1), ("float16", 9999.0, 9997.0)])
def test_what_is_kept_is_within_max_grad_after_rounding_too(precision: Any, max_grad: float, grad: float) -> None:
    """The server refuses a whole reply with |scalar| > max_grad, so rounding must not lift a client's own above it."""
    _, _, steps = scripted([grad / 512, 0.0, *PLAIN], precision=precision, max_grad=max_grad)
    assert np.all(np.abs(steps.projected_grads.astype(np.float64)) <= max_grad)
