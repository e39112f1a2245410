"""A learning rate and a probe distance for a model and its data, from a few hundred forward passes.

For one batch's loss L a step along z with projected gradient g changes it by `-lr g^2 + lr^2 g^2 c / 2`, c = z'Hz the
curvature along z. Another batch's slope g' is what the step is worth elsewhere, so over directions and batches the best
first step has

    lr* = E[g g'] / (E[g^2] E[c]).

With small batches the share E[g g'] / E[g^2] is too small to be measured so cheaply; a tenth is taken for less. Where n
clients' steps are averaged the curvature counts for an nth of that, so lr* is n times as large, as long as a client's own steps
do not diverge: at most 1 / E[c]. The curvature grows on the way, and steps at lr* itself were seen to diverge, so a quarter of
it is proposed, and tried: while a short round at that rate, of some clients' steps averaged, raises the loss, the rate is
halved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import InvalidValueError
from fedkseed.kseed.client import Model
from fedkseed.kseed.steps import StepSettings, local_steps, projected_grad

EPS_VALUES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
EPS_GRID = slice(4, 9)
"""Which of these are tried at first; a best one at an end has further ones tried."""
GOOD = 0.01
"""A disagreement at which no further eps is looked for."""
SAFETY = 4.0
MIN_SHARE = 0.1
EPS_DIRECTIONS, DIRECTIONS, TRIAL_STEPS, MAX_TRIALS = 6, 20, 60, 5
MAX_CLIENTS = 4
"""Of more clients a trial has no more, and a rate makes no more of them."""
TRIAL_BATCHES, OTHERS = 8, 2


@dataclass(frozen=True)
class Agreement:
    """How far the slopes at one probe distance are from those at its neighbours, relative to their size."""

    eps: float
    disagreement: float


@dataclass(frozen=True)
class Trial:
    """A short round at one rate: the mean loss of some batches before and after it."""

    lr: float
    before: float
    after: float

    @property
    def raised(self) -> bool:
        """Whether the loss rose, or is no number any more."""
        return not self.after < self.before


@dataclass(frozen=True)
class Calibration:
    """What was found, and how.

    Attributes:
        lr: the learning rate to take.
        eps: the probe distance to take.
        agreements: what was measured for eps.
        slope: root of E[g^2].
        shared: E[g g'] / E[g^2]: which part of a batch's slope other batches share; at least MIN_SHARE, at most 1.
        curvature: E[c], one standard error more.
        clients: how many clients' steps a trial averages.
        best_first_step: lr*, see above.
        trials: the rounds, the last of them at `lr`.
        num_forward_passes: what it took.
    """

    lr: float
    eps: float
    agreements: tuple[Agreement, ...]
    slope: float
    shared: float
    curvature: float
    clients: int
    best_first_step: float
    trials: tuple[Trial, ...]
    num_forward_passes: int


def calibrate(
    model: Model,
    loss: Callable[[int], float],
    rng: np.random.Generator,
    clients: int = 1,
    directions: int = 1,
    heard: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Find a learning rate and a probe distance; the model is at its base weights before and afterwards.

    Args:
        model: at its base weights.
        loss: the mean loss at the current weights on the b-th of as many batches as are asked for, drawn from the training
            records; the same b must give the same batch.
        rng: draws the directions.
        clients: how many clients' steps a round averages.
        directions: along how many perturbations a step of the run goes.
        heard: hears how many of the forward passes are done, and how many it will probably take.

    Returns:
        The rate and the distance, and what they follow from.

    Raises:
        InvalidValueError: losses are not finite, or do not change along any direction, or every trial raised them.
    """
    base = np.zeros(model.pool.size, np.float32)
    try:
        counted = _Counted(loss, heard or (lambda done, total: None))
        return _calibrated(model, counted, rng, min(clients, MAX_CLIENTS), directions, base)
    finally:  # also after an error or Ctrl-C
        model.rebuild(base)


def _calibrated(
    model: Model, counted: _Counted, rng: np.random.Generator, clients: int, directions: int, base: NDArray[np.float32]
) -> Calibration:
    num_seeds = model.pool.size
    # of each client; a trial goes along about TRIAL_STEPS perturbations, however many a step takes
    shape = clients, max(1, TRIAL_STEPS // (clients * directions)) * directions
    passes = clients * shape[1] * (directions + 1) // directions
    probed: list[int] = rng.choice(num_seeds, min(DIRECTIONS, num_seeds), replace=False).tolist()
    counted.expect(len(probed) * 3 * (1 + OTHERS) + 2 * TRIAL_BATCHES + passes)
    agreements = _agreements(model, probed[:EPS_DIRECTIONS], counted)
    eps = min(agreements, key=lambda a: a.disagreement).eps
    slope, shared, curvature = _measure(model, probed, eps, counted)
    if not (slope > 0 and curvature > 0):
        raise InvalidValueError(
            f"the loss has a slope of {slope:g} and a curvature of {curvature:g}; expected both above 0, "
            "so give more records or a larger --batch-size, or choose --lr by hand"
        )
    best = min(clients * shared, 1.0) / curvature
    model.rebuild(base)
    before = _mean_loss(counted)
    trials: list[Trial] = []
    lr = float(f"{best / SAFETY:.2g}")
    while len(trials) < MAX_TRIALS and (not trials or trials[-1].raised):
        if trials:
            lr /= 2
            counted.expect(TRIAL_BATCHES + passes)
        settings = StepSettings(lr, eps, directions=directions)
        trials.append(Trial(lr, before, _after_round(model, base, rng.choice(num_seeds, shape), settings, counted)))
    if trials[-1].raised:
        raise InvalidValueError(
            f"steps along {clients * shape[1]} directions raised the loss at every rate from {trials[0].lr:g} down to "
            f"{trials[-1].lr:g}; "
            "give a larger --batch-size, or choose --lr by hand"
        )
    return Calibration(trials[-1].lr, eps, agreements, slope, shared, curvature, clients, best, tuple(trials), counted.calls)


class _Counted:
    """A loss that counts its calls and refuses what is not finite."""

    def __init__(self, loss: Callable[[int], float], heard: Callable[[int, int], None]) -> None:
        self._loss, self._heard, self.calls, self.expected = loss, heard, 0, 0

    def expect(self, calls: int) -> None:
        """So many more will come."""
        self.expected += calls

    def __call__(self, batch: int) -> float:
        self.calls += 1
        self._heard(self.calls, max(self.calls, self.expected))
        value = self._loss(batch)
        if not math.isfinite(value):
            raise InvalidValueError(f"the loss of a batch is {value}; expected a finite number, so check the data and --dtype")
        return value


def _agreements(model: Model, directions: Sequence[int], loss: _Counted) -> tuple[Agreement, ...]:
    """For each eps of the grid but the outermost: the distance of its slopes to those of both neighbours.

    Rounding makes slopes at a small eps wrong, curvature those at a large one; between them they agree. A grid whose best
    one is next to an end, and not good yet, is made longer there.
    """
    tried = list(range(len(EPS_VALUES)))[EPS_GRID]
    slopes: dict[int, list[float]] = {}
    while True:
        for place in tried:
            if place not in slopes:
                loss.expect(2 * len(directions))
                slopes[place] = [_slope(model, index, EPS_VALUES[place], batch, loss) for batch, index in enumerate(directions)]
        found = _compared([EPS_VALUES[place] for place in tried], np.array([slopes[place] for place in tried]))
        best = min(range(len(found)), key=lambda i: found[i].disagreement)
        if found[best].disagreement <= GOOD:
            return found
        if best == 0 and tried[0] > 0:
            tried.insert(0, tried[0] - 1)
        elif best == len(found) - 1 and tried[-1] < len(EPS_VALUES) - 1:
            tried.append(tried[-1] + 1)
        else:
            return found


def _compared(grid: Sequence[float], slopes: NDArray[np.float64]) -> tuple[Agreement, ...]:
    """Relative to the slopes at the eps that agrees best: the others' are what errors have made of them."""
    steps = np.sqrt(np.mean(np.diff(slopes, axis=0) ** 2, axis=1))
    furthest = np.maximum(steps[:-1], steps[1:])
    size = np.sqrt(np.mean(slopes[1 + int(furthest.argmin())] ** 2)) or 1.0
    return tuple(Agreement(eps, float(far / size)) for eps, far in zip(grid[1:-1], furthest, strict=True))


def _slope(model: Model, index: int, eps: float, batch: int, loss: Callable[[int], float]) -> float:
    (plus,), (minus,) = _probes(model, index, eps, (batch,), loss)
    return projected_grad(plus, minus, eps)


def _probes(
    model: Model, index: int, eps: float, batches: Sequence[int], loss: Callable[[int], float]
) -> tuple[list[float], list[float]]:
    """The losses of some batches at w + eps z and at w - eps z; the weights are back afterwards but for rounding."""
    model.move([index], [eps])
    plus = [loss(batch) for batch in batches]
    model.move([index], [-2 * eps])
    minus = [loss(batch) for batch in batches]
    model.move([index], [eps])
    return plus, minus


def _measure(model: Model, directions: Sequence[int], eps: float, loss: Callable[[int], float]) -> tuple[float, float, float]:
    """Root of E[g^2], E[g g'] / E[g^2], and E[c], of which a standard error more: too small a one lets a run diverge."""
    squares, products, curvatures = [], [], []
    for place, index in enumerate(directions):  # batches of its own: few small ones say little of the curvature
        batches = [place * (1 + OTHERS) + i for i in range(1 + OTHERS)]
        here = [loss(batch) for batch in batches]
        plus, minus = _probes(model, index, eps, batches, loss)
        grad, *elsewhere = (projected_grad(p, m, eps) for p, m in zip(plus, minus, strict=True))
        squares.append(grad * grad)
        products.append(grad * float(np.mean(elsewhere)))
        curvatures.append(np.mean([(p + m - 2 * h) / eps**2 for p, m, h in zip(plus, minus, here, strict=True)]))
    mean_square = float(np.mean(squares))
    shared = float(np.mean(products)) / mean_square if mean_square else 0.0
    curvature = float(np.mean(curvatures) + np.std(curvatures) / math.sqrt(len(curvatures)))
    return math.sqrt(mean_square), min(max(shared, MIN_SHARE), 1.0), curvature


def _mean_loss(loss: Callable[[int], float]) -> float:
    """Of the batches that trials are measured on."""
    return float(np.mean([loss(batch) for batch in range(TRIAL_BATCHES)]))


def _after_round(
    model: Model, base: NDArray[np.float32], indices: NDArray[np.int64], settings: StepSettings, loss: Callable[[int], float]
) -> float:
    """The loss after the local steps of some clients along seeds int[clients, n], averaged; these take other batches."""
    mean = np.zeros(model.pool.size)
    for client, own in enumerate(indices.tolist()):

        def own_loss(step: int, first: int = TRIAL_BATCHES + client * len(own)) -> float:
            return loss(first + step)

        model.rebuild(base)
        steps = local_steps(model, own, own_loss, settings)
        np.add.at(mean, own, -settings.lr / len(indices) * steps.projected_grads.astype(np.float64))
    model.rebuild(mean.astype(np.float32))
    return _mean_loss(loss)
