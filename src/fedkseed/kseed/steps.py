"""The two-point estimator and a client's local steps (FedKSeed, Algorithm 1; Spall's SPSA with a given direction)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedkseed.federation.config import FederationConfig
from fedkseed.federation.objectives import Scaling
from fedkseed.kseed.rounding import Precision, rounded

GRAD_EXPONENT = 0
"""Projected gradients travel under a fixed scale: each is rounded before the next one is known."""


class Movable(Protocol):
    """What local steps need of a model: `fedkseed.Binding` has it."""

    def move(self, indices: Sequence[int], amounts: Sequence[float]) -> None:
        """Move the weights by `sum_i amounts[i] z_indices[i]`."""
        ...


@dataclass(frozen=True)
class StepSettings:
    """How local steps are taken.

    Attributes:
        lr: learning rate.
        eps: half the distance of the two probes, in units of z.
        max_grad: a projected gradient larger than this is dropped.
        loss_clip: a step whose two losses differ by more than this is dropped; None keeps all.
        precision: of the projected gradients, rounded before they are used.
        directions: 1 for two probes along one perturbation; n > 1 for one-sided slopes along n of them a step, on one batch.
        scaling: of scores, see `fedkseed.kseed.population`; None of what has a gradient.
    """

    lr: float
    eps: float
    max_grad: float = 1e4
    loss_clip: float | None = None
    precision: Precision = "float32"
    directions: int = 1
    scaling: Scaling | None = None


@dataclass(frozen=True)
class LocalSteps:
    """What came of n local steps: projected gradients (float32, 0 where dropped), dropped steps, losses float64[n].

    The projected gradients are n times `directions`, step after step. A loss is the mean of a step's two probes, or the one
    at its centre.
    """

    projected_grads: NDArray[np.float32]
    dropped: tuple[int, ...]
    losses: NDArray[np.float64]


def projected_grad(loss_plus: float, loss_minus: float, eps: float) -> float:
    """The two-point estimate of `z . grad L` from the losses at w + eps z and w - eps z; its error falls as eps^2."""
    return (loss_plus - loss_minus) / (2 * eps)


def local_steps(model: Movable, indices: Sequence[int], loss: Callable[[int], float], settings: StepSettings) -> LocalSteps:
    """Take steps along the given perturbations, in order, by two points along each; several at once: see `one_sided_steps`.

    A two-point step is `w <- w - lr g z`, two passes over the weights.

    The move back from a step's second probe, its update and the next step's first probe are one pass. A step whose
    losses are not finite, or that `settings` excludes, leaves the weights where they were.

    Args:
        model: the weights; moved in place, and at the end where the updates have led.
        indices: the seed of each step, or as many a step as `settings.directions`.
        loss: the loss at the current weights on the batch of step t, as a function of t; called twice a step, or once more
            than there are directions.
        settings: learning rate, probe distance and what is dropped.
    """
    if settings.directions > 1:
        return one_sided_steps(model, indices, loss, settings)
    eps = float(np.float32(settings.eps))  # few bits, so that half-precision coefficients add up exactly in float64
    grads = np.zeros(len(indices), np.float32)
    losses = np.full(len(indices), math.nan)
    dropped = []
    for t, index in enumerate(indices):
        if t == 0:
            model.move([index], [eps])
        plus = loss(t)
        model.move([index], [-2 * eps])
        minus = loss(t)
        losses[t] = (plus + minus) / 2
        grad = projected_grad(plus, minus, eps)
        usable = math.isfinite(grad) and abs(grad) <= settings.max_grad and not _clipped(plus - minus, settings.loss_clip)
        sent = rounded(np.array([grad]), settings.precision, GRAD_EXPONENT)[0] if usable else np.float32(math.inf)
        if abs(float(sent)) <= settings.max_grad:  # rounding may have led above it
            grads[t] = sent
        else:
            dropped.append(t)
        back = eps - float(update(settings.lr, grads[t]))
        following = indices[t + 1 : t + 2]
        model.move([index, *following], [back, *[eps] * len(following)])
    return LocalSteps(grads, tuple(dropped), losses)


def one_sided_steps(model: Movable, indices: Sequence[int], loss: Callable[[int], float], settings: StepSettings) -> LocalSteps:
    """Take steps along n perturbations each: `g_j = (L(w + eps z_j) - L(w)) / eps`, `w <- w - lr sum_j g_j z_j`.

    All losses of a step are of one batch, so n slopes cost n + 1 losses, where n two-point ones cost 2 n. The error of a slope
    falls as eps only: it is `eps z'Hz / 2`. The move back from one probe and to the next are one pass over the weights. (The
    estimator of FZOO, Dang et al., 2025, without its division by the slopes' spread, which won nothing here.)

    Args, and which steps are dropped: see `local_steps`; one bad loss drops its step's n slopes.
    """
    eps, n = float(np.float32(settings.eps)), settings.directions
    grads, losses = np.zeros((len(indices) // n, n), np.float32), np.full(len(indices) // n, math.nan)
    dropped = []
    for t in range(len(losses)):
        seeds = indices[t * n : (t + 1) * n]
        here = losses[t] = float(loss(t))
        changes = np.empty(n)
        for j, index in enumerate(seeds):
            model.move([*seeds[j - 1 : j], index], [*[-eps] * (j > 0), eps])
            changes[j] = float(loss(t)) - here
        sent = sendable(changes / eps, changes, settings)
        if sent is None:
            dropped.append(t)
        else:
            grads[t] = sent
        model.move([seeds[-1], *seeds], [-eps, *(-float(update(settings.lr, grad)) for grad in grads[t])])
    return LocalSteps(grads.reshape(-1), tuple(dropped), losses)


def sendable(slopes: NDArray[np.float64], changes: NDArray[np.float64], settings: StepSettings) -> NDArray[np.float32] | None:
    """The slopes of one step as they are sent, rounded; None if the step is to be dropped.

    Args:
        slopes: one for each direction.
        changes: the differences of losses that they come from.
        settings: which are too large.
    """
    if not np.isfinite(slopes).all() or any(_clipped(change, settings.loss_clip) for change in changes):
        return None
    if np.abs(slopes).max() > settings.max_grad:
        return None
    sent = rounded(slopes, settings.precision, GRAD_EXPONENT)
    return sent if (np.abs(sent) <= settings.max_grad).all() else None  # rounding may have led above it


def update(lr: float, grad: np.floating) -> np.float32:
    """How far one step goes along its perturbation: `lr g`, rounded to binary32 once."""
    return np.float32(lr * float(grad))


def largest_grad(settings: FederationConfig) -> float:
    """The largest magnitude of a projected gradient that an honest client sends.

    Scaled slopes have bounds of their own. With `loss_clip` it keeps no step whose losses differ by more. What it sends is
    rounded to 11 bits at worst.
    """
    if not settings.goal.smooth and settings.scaling != "none":
        bound = 0.5 if settings.scaling == "ranks" else math.sqrt(settings.directions)
        return min(settings.max_grad, bound * (1 + 2.0**-10))
    if settings.loss_clip is None:
        return settings.max_grad
    apart = float(np.float32(settings.eps)) * (1 if settings.goal.smooth and settings.directions > 1 else 2)
    return min(settings.max_grad, settings.loss_clip / apart * (1 + 2.0**-10))


def _clipped(difference: float, loss_clip: float | None) -> bool:
    return loss_clip is not None and abs(difference) > loss_clip
