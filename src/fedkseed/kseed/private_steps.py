"""Local steps that hide each record: its slopes, or its gradient, are clipped before anything else happens (docs/privacy.md).

A step's batch is a Poisson sample. Each record is measured alone, so that no other one can move its numbers, not even in their
last bits; the sum of what the records say is noised and divided by the batch's expected size. All that follows, the step itself
and what is sent, is a function of that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.kseed.gradient_steps import F64, Foldable, folded_gradient
from fedkseed.kseed.pages import Basis
from fedkseed.kseed.rounding import Precision, rounded
from fedkseed.kseed.steps import GRAD_EXPONENT, LocalSteps, Movable, StepSettings, update
from fedkseed.privacy import Mechanism, Source, poisson_sample

F32 = NDArray[np.float32]
Records = NDArray[np.int64]


def sampling_rate(batch_size: int, num_examples: int) -> float:
    """How likely a record is to be in a batch of `batch_size` expected records; 1 where there are fewer."""
    return min(1.0, batch_size / num_examples)


def poisson_batches(num_examples: int, batch_size: int, source: Source) -> Iterator[Records]:
    """Batches without end: in each, every record is on its own with the sampling rate's probability; one may be empty."""
    while True:
        yield poisson_sample(num_examples, sampling_rate(batch_size, num_examples), source)


def private_steps(
    model: Movable,
    indices: Sequence[int],
    batches: Iterator[Records],
    loss: Callable[[int, int], float],
    settings: StepSettings,
    mechanism: Mechanism,
    batch_size: int,
) -> LocalSteps:
    """Take two-point steps of which every scalar is safe to tell: `local_steps` with noise. Of the losses nothing is told.

    A record's slope is `(L(w + eps z) - L(w - eps z)) / 2 eps` of its own loss; of several directions a step its slopes
    `(L(w + eps z_j) - L(w)) / eps` are one vector, which is clipped as a whole. What is not finite counts as zeros. No step is
    dropped: a scalar above `max_grad` is cut to it.

    Args:
        model, indices: see `local_steps`.
        batches: the records of each step.
        loss: at the current weights, of a step's record.
        settings: `loss_clip` means nothing here.
        mechanism: its clip norm is of a record's slopes.
        batch_size: expected number of records in a batch, which the sum is divided by.
    """
    eps, n = float(np.float32(settings.eps)), settings.directions
    grads = np.zeros((len(indices) // n, n), np.float32)
    for t in range(len(grads)):
        seeds, records = indices[t * n : (t + 1) * n], next(batches)

        def losses(t: int = t, records: Records = records) -> F64:
            return np.array([loss(t, int(record)) for record in records], np.float64)

        with np.errstate(invalid="ignore", over="ignore"):  # infinities, which the mechanism makes zeros of
            slopes = _two_sided(model, seeds[0], losses, eps) if n == 1 else _one_sided(model, seeds, losses, eps)
        released = mechanism.release(slopes, n, batch_size)
        grads[t] = wire_scalars(released, settings.max_grad, settings.precision)
        model.move(seeds, [-float(update(settings.lr, grad)) for grad in grads[t]])
    return LocalSteps(grads.reshape(-1), (), np.full(len(grads), np.nan))


def private_gradient(
    model: Foldable,
    basis: Basis,
    records: Records,
    loss: Callable[[int], torch.Tensor],
    mechanism: Mechanism,
    batch_size: int,
) -> tuple[F64, float]:
    """The gradient of a step, safe to tell, by a page's numbers, float64[K]; and nothing of the loss, which is 0.

    One record's gradient is in memory at a time, and of that one tensor's; what is clipped are its K numbers.

    Args:
        model, basis: see `gradient_steps`.
        records: of the step.
        loss: of one record, 0-dim.
        mechanism: its clip norm is of a record's K numbers.
        batch_size: see `private_steps`.
    """

    def gradients() -> Iterator[F64]:
        for record in records:
            yield folded_gradient(model, basis, partial(loss, int(record)))[0]

    return mechanism.release(gradients(), model.pool.size, batch_size), 0.0


def wire_scalars(scalars: F64, max_grad: float, precision: Precision) -> F32:
    """Scalars as they are sent: none above the largest that is accepted, rounded to the wire."""
    most = max_grad * (1 - 2.0**-10)  # which rounding does not lead above it
    return rounded(np.clip(scalars, -most, most), precision, GRAD_EXPONENT)


def _two_sided(model: Movable, index: int, losses: Callable[[], F64], eps: float) -> F64:
    """Each record's slope along one perturbation, float64[b, 1]; the weights are where they were afterwards."""
    model.move([index], [eps])
    plus = losses()
    model.move([index], [-2 * eps])
    minus = losses()
    model.move([index], [eps])
    return ((plus - minus) / (2 * eps))[:, None]


def _one_sided(model: Movable, seeds: Sequence[int], losses: Callable[[], F64], eps: float) -> F64:
    """Each record's slopes along several, float64[b, n]."""
    here = losses()
    slopes = np.empty((len(here), len(seeds)))
    for j, index in enumerate(seeds):
        model.move([index], [eps])
        slopes[:, j] = (losses() - here) / eps
        model.move([index], [-eps])
    return slopes
