"""Steps on scores: antithetic pairs along several perturbations, scaled within the step (evolution strategies in K numbers).

Scores need no gradient and are coarse: a share of right answers moves by 1 / batch or not at all. So a step probes both ways
along several perturbations on one batch, and what counts of a score is where it stands among the step's others (Salimans et
al., *Evolution Strategies as a Scalable Alternative to Reinforcement Learning*, 2017). Losses are scores' negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedkseed.federation.objectives import Scaling
from fedkseed.kseed.steps import LocalSteps, Movable, StepSettings, sendable, update


def population_steps(
    model: Movable, indices: Sequence[int], loss: Callable[[int], float], settings: StepSettings
) -> LocalSteps:
    """Take steps along n perturbations each: `w <- w - lr sum_j g_j z_j` with the slopes of `slopes`.

    All 2 n losses of a step are of one batch at one centre. The move back from one probe and to the next are one pass over
    the weights. A loss that is not finite drops its step.

    Args:
        model: the weights; moved in place, and at the end where the updates have led.
        indices: n = `settings.directions` seeds for each step.
        loss: minus the score at the current weights on the batch of step t, as a function of t; called 2 n times a step.
        settings: learning rate, probe distance, scaling and what is dropped.
    """
    eps, n = float(np.float32(settings.eps)), settings.directions
    grads, losses = np.zeros((len(indices) // n, n), np.float32), np.full(len(indices) // n, math.nan)
    dropped = []
    for t in range(len(losses)):
        seeds = indices[t * n : (t + 1) * n]
        probes = np.empty((n, 2))
        for j, index in enumerate(seeds):
            model.move([*seeds[j - 1 : j], index], [*[eps] * (j > 0), eps])
            probes[j, 0] = float(loss(t))
            model.move([index], [-2 * eps])
            probes[j, 1] = float(loss(t))
        losses[t] = probes.mean()
        sent = None
        if np.isfinite(probes).all():
            sent = sendable(slopes(probes, eps, settings.scaling or "none"), probes[:, 0] - probes[:, 1], settings)
        if sent is None:
            dropped.append(t)
        else:
            grads[t] = sent
        model.move([seeds[-1], *seeds], [eps, *(-float(update(settings.lr, grad)) for grad in grads[t])])
    return LocalSteps(grads.reshape(-1), tuple(dropped), losses)


def slopes(probes: NDArray[np.float64], eps: float, scaling: Scaling) -> NDArray[np.float64]:
    """What a step moves by along each of its perturbations, float64[n].

    `none`: `(L+ - L-) / (2 eps)`, the two-point slope. Else the step's 2 n losses are first brought to one scale, and half the
    difference of a pair is taken, without eps, so that a learning rate is how far a weight moves: `z-scores`, less their mean
    and over their standard deviation, at most sqrt(n); `ranks`, evenly from -1/2 to 1/2, ties sharing their mean, at most 1/2.
    Losses that are all alike say nothing: 0.

    Args:
        probes: the losses at +eps and -eps, float64[n, 2], finite.
        eps: half the distance of a pair.
        scaling: how.
    """
    if scaling == "none":
        return (probes[:, 0] - probes[:, 1]) / (2 * eps)
    scaled = ranks(probes) if scaling == "ranks" else z_scores(probes)
    return (scaled[:, 0] - scaled[:, 1]) / 2


def z_scores(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values less their mean and over their standard deviation; zeros where they are all alike."""
    if (values == values.flat[0]).all():  # their computed mean may be another number
        return np.zeros_like(values)
    centred = values / np.abs(values).max()  # huge ones would overflow in the square
    centred = centred - centred.mean()
    spread = math.sqrt(float(np.mean(centred**2)))
    return centred / spread if spread else np.zeros_like(values)


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The places of values in their order, evenly from -1/2 to 1/2; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean = ends - (counts + 1) / 2
    return np.asarray(mean[place].reshape(values.shape) / (values.size - 1) - 0.5)
