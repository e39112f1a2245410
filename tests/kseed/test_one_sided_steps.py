"""Several one-sided slopes a step, against theory, on functions of which everything is known (float64)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import fedkseed as fk
from fedkseed.kseed.steps import LocalSteps, StepSettings, local_steps, update

F64 = NDArray[np.float64]


class Toy:
    """Float64 weights that move along a pool's perturbations; how often they were moved."""

    def __init__(self, w: F64, size: int = 128) -> None:
        self.pool, self.w, self.moves = fk.SeedPool(17, size), w.copy(), 0

    def z(self, k: int) -> F64:
        return self.pool.perturbation("w", len(self.w), k).astype(np.float64)

    def move(self, indices: Sequence[int], amounts: Sequence[float]) -> None:
        self.moves += 1
        for k, amount in zip(indices, amounts, strict=True):
            self.w = self.w + amount * self.z(k)


def quadratic(n: int) -> tuple[Callable[[F64], float], F64, F64]:
    """f, its Hessian, and its gradient at 0."""
    rng = np.random.default_rng(3)
    root, b = rng.standard_normal((n, n)), rng.standard_normal(n)
    a = root @ root.T / n
    return lambda x: float(x @ a @ x / 2 - b @ x), a, -b


def quartic(x: F64) -> float:
    return float(np.sum(np.arange(1, len(x) + 1) * x**4) / len(x) + np.sum(x**3) - x[0])


def settings(**changes: Any) -> StepSettings:
    return StepSettings(**{"lr": 2.0**-10, "eps": 2.0**-8, "directions": 3} | changes)


# --- Where the probes are, and what follows from them ---

INDICES = [5, 0, 17, 17, 127, 3]


def test_probes_and_updates_are_where_the_algorithm_says() -> None:
    """One loss at w_t, then one at w_t + eps z_j for each j; w_{t+1} = w_t - lr sum_j g_j z_j; n + 1 moves a step."""
    w = np.random.default_rng(1).standard_normal(96) / 2
    toy, chosen, seen = Toy(w), settings(), list[tuple[int, F64]]()

    def loss(step: int) -> float:
        seen.append((step, toy.w))
        return quartic(toy.w)

    steps = local_steps(toy, INDICES, loss, chosen)
    assert [step for step, _ in seen] == [0] * 4 + [1] * 4
    assert toy.moves == 8
    assert (steps.projected_grads.shape, steps.losses.shape, steps.dropped) == ((6,), (2,), ())
    for t in range(2):
        seeds, centre, *probes = INDICES[3 * t : 3 * t + 3], *(x for step, x in seen if step == t)
        assert np.abs(centre - w).max() < 1e-13
        assert steps.losses[t] == quartic(centre)
        sent = steps.projected_grads[3 * t : 3 * t + 3]
        for k, probe, grad in zip(seeds, probes, sent, strict=True):
            assert np.abs(probe - (w + chosen.eps * toy.z(k))).max() < 1e-13
            assert grad == np.float32((quartic(probe) - quartic(centre)) / chosen.eps)
        w = w - sum(float(update(chosen.lr, grad)) * toy.z(k) for k, grad in zip(seeds, sent, strict=True))
    assert np.abs(toy.w - w).max() < 1e-13
    assert np.abs(steps.projected_grads).min() > 1  # none is so small that leaving it out would not show


def test_a_slope_is_off_by_half_of_eps_times_the_curvature_along_its_seed() -> None:
    """On a quadratic exactly so; a two-point slope is exact there, and is the variant that must fail."""
    f, a, gradient = quadratic(96)
    eps = 2.0**-4
    for directions, bias in ((4, 1.0), (1, 0.0)):
        toy = Toy(np.zeros(96))
        steps = local_steps(
            toy, [9, 2, 77, 40], lambda _, toy=toy: f(toy.w), settings(lr=1e-30, eps=eps, directions=directions)
        )
        expected = np.array([toy.z(k) @ gradient + bias * eps / 2 * (toy.z(k) @ a @ toy.z(k)) for k in (9, 2, 77, 40)])
        assert np.abs(steps.projected_grads - expected).max() < 1e-5 * np.abs(expected).max()
    assert eps / 2 * np.trace(a) > 1  # so that the bias shows


def test_a_step_along_all_seeds_of_a_block_is_a_gradient_step() -> None:
    """sum_k z_k z_k' = K I; what is measured after moving, step by step, is not."""
    f, _, gradient = quadratic(128)
    ends, lr = {}, 2.0**-12
    for directions in (128, 1):
        toy = Toy(np.zeros(128))
        local_steps(toy, list(range(128)), lambda _, toy=toy: f(toy.w), settings(lr=lr, eps=2.0**-20, directions=directions))
        ends[directions] = np.abs(toy.w + lr * 128 * gradient).max() / np.abs(lr * 128 * gradient).max()
    assert ends[128] < 1e-3
    assert ends[1] > 1e-2


def test_slopes_of_one_batch_cost_less_noise_a_pass() -> None:
    """n slopes of one batch take n + 1 losses: at equal losses they gain more on a quadratic than pairs of probes do."""
    f, a, gradient = quadratic(128)
    lr, budget = 0.25 / np.trace(a), 60

    def gain(directions: int) -> float:
        each = directions + 1 if directions > 1 else 2
        found = []
        for start in range(0, 128, 4):
            toy = Toy(np.zeros(128))
            seeds = [(start + 37 * i) % 128 for i in range(budget // each * directions)]
            local_steps(toy, seeds, lambda _, toy=toy: f(toy.w), settings(lr=lr, eps=2.0**-16, directions=directions))
            found.append(f(np.zeros(128)) - f(toy.w))
        return float(np.mean(found))

    assert gain(5) > 1.3 * gain(1) > 0
    assert np.isfinite(gradient).all()


# --- What is dropped: losses from a table, all numbers dyadic, so that float64 is exact ---

NAN, INF = math.nan, math.inf
GOOD = (1.0, 1.5, 0.75)  # slopes 512 and -256


def scripted(rows: Sequence[Sequence[float]], **changes: Any) -> tuple[Toy, F64, LocalSteps]:
    w = np.arange(-8, 8) / 1024.0
    toy, table = Toy(w), iter([loss for row in rows for loss in row])
    chosen = settings(**{"lr": 0.125, "eps": 2.0**-10, "directions": 2} | changes)
    return toy, w, local_steps(toy, list(range(2 * len(rows))), lambda _: next(table), chosen)


@pytest.mark.parametrize(
    ("bad", "changes"),
    [
        ((NAN, 1.0, 1.0), {}),
        ((1.0, NAN, 1.0), {}),
        ((1.0, 1.0, INF), {}),
        ((INF, INF, 1.0), {}),
        ((1.0, 1.5 + 2.0**-20, 1.0), {"max_grad": 512.0}),
        ((1.0, 1.0, 0.5 - 2.0**-20), {"max_grad": 512.0}),
        ((1.0, 1.5 + 2.0**-20, 1.0), {"loss_clip": 0.5}),
        ((1.0, 1.0, 1e30), {}),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_bad_loss_drops_its_whole_step_and_no_other(bad: tuple[float, ...], changes: dict[str, float], place: int) -> None:
    rows = [GOOD] * 3
    rows[place] = bad
    toy, w, steps = scripted(rows, **changes)
    assert steps.dropped == (place,)
    kept = [t for t in range(3) if t != place]
    assert steps.projected_grads.reshape(3, 2).tolist() == [[0.0, 0.0] if t == place else [512.0, -256.0] for t in range(3)]
    assert np.array_equal(toy.w, w - sum(64.0 * toy.z(2 * t) - 32.0 * toy.z(2 * t + 1) for t in kept))


def test_slopes_at_the_limit_are_kept_and_rounded_before_the_update_uses_them() -> None:
    toy, w, steps = scripted([GOOD], max_grad=512.0, loss_clip=0.5)
    assert (steps.dropped, steps.projected_grads.tolist()) == ((), [512.0, -256.0])
    toy, w, steps = scripted([(1.0, 1.5 + 2.0**-14, 0.75)], precision="float16", max_grad=1e4)
    assert steps.projected_grads.tolist() == [512.0, -256.0]
    assert np.array_equal(toy.w, w - 64.0 * toy.z(0) + 32.0 * toy.z(1))
