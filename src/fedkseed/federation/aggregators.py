"""Rules by which a server makes one vector of its clients': pure functions, one row each (docs/security.md).

A rule takes what n replies say of K numbers, float64[n, K] with weights float64[n], and gives the numbers, float64[K], and
which share of each reply went into them, float64[n]. The numbers are of the size of `sum_i w_i v_i`, whatever the weights
add up to, and equal that where all vectors are alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
Rule = Callable[[F64, F64], tuple[F64, F64]]
Weigh = Callable[[F64, F64], tuple[F64, F64]]
TRIM = 0.25
"""What a trimmed mean leaves out at either end."""
TIE = 1e-9
"""Shares of a half that differ by less are the half."""


@dataclass(frozen=True)
class Aggregator:
    """One rule.

    Attributes:
        name: what settings call it.
        about: a few words for the help.
        combine: `(vectors, weights) -> (numbers, shares)`, as above.
        weigh: of a rule whose numbers are a weighted sum: `(weights, lengths) -> (the sum's weights, shares)`, float64[n] each,
            by the vectors' Euclidean lengths; so that vectors may come one at a time, or be summed elsewhere. None of those
            that must have all side by side.
        needs_each_reply: whether it must see every reply; of a sum that hides them only the mean can be had.
        same_seeds: whether it compares numbers place by place, so that replies must be of the same seeds.
        breakdown: of n replies of equal weight, how many may hold anything at all without leading the numbers further from
            the others' than these lie from zero.
    """

    name: str
    about: str
    combine: Rule
    weigh: Weigh | None
    needs_each_reply: bool
    same_seeds: bool
    breakdown: Callable[[int], int]


def mean(vectors: F64, weights: F64) -> tuple[F64, F64]:
    """`sum_i w_i v_i`, added up in the order of the rows: what FedKSeed and FedAvg do."""
    total = np.zeros(vectors.shape[1])
    for vector, weight in zip(vectors, weights, strict=True):
        total += weight * vector
    return total, np.ones(len(vectors))


def clipped(vectors: F64, weights: F64) -> tuple[F64, F64]:
    """A mean in which none brings in more than the median one does: `w_i s_i` are the weights, `s_i = min(1, m / |w_i v_i|)`.

    So it is bounded what a long reply does, and what one of many claimed records. The weights add up to what they did before:
    honest replies that are cut are only shared out anew.
    """
    kept, shares = clip_weights(weights, np.linalg.norm(vectors, axis=1))
    return mean(vectors, kept)[0], shares


def clip_weights(weights: F64, lengths: F64) -> tuple[F64, F64]:
    """The weights of such a mean by the vectors' lengths, float64[n], and what is left of each."""
    shares = clip_shares(weights * lengths)
    kept = weights * shares
    return kept * (weights.sum() / kept.sum()), shares


def clip_shares(lengths: F64) -> F64:
    """By how much vectors of these lengths, float64[n], are to be multiplied so that none is longer than the median was.

    Those that are zero, as of a client that dropped all its steps, have no say in the median.
    """
    shares, moving = np.ones(len(lengths)), lengths[lengths > 0]
    if moving.size:
        limit = np.median(moving)
        shares[lengths > limit] = limit / lengths[lengths > limit]
    return shares


def trimmed_mean(vectors: F64, weights: F64) -> tuple[F64, F64]:
    """The mean of the middle half of the values at each place, by weight (Yin et al., 2018); a value may count in part."""
    total = weights.sum()
    order = np.argsort(vectors, axis=0, kind="stable")
    ends = np.cumsum(weights[order], axis=0) / total
    begins = np.vstack([np.zeros(vectors.shape[1]), ends[:-1]])
    kept = np.clip(np.minimum(ends, 1 - TRIM) - np.maximum(begins, TRIM), 0.0, None)
    kept /= kept.sum(axis=0)
    numbers = total * np.sum(kept * np.take_along_axis(vectors, order, axis=0), axis=0)
    placed = np.empty_like(kept)
    np.put_along_axis(placed, order, kept, axis=0)
    return numbers, np.minimum(placed.mean(axis=1) * total / weights * (1 - 2 * TRIM), 1.0)


def median(vectors: F64, weights: F64) -> tuple[F64, F64]:
    """The median of the values at each place, by weight; between two, their middle. The shares are the trimmed mean's."""
    total = weights.sum()
    order = np.argsort(vectors, axis=0, kind="stable")
    ends = np.cumsum(weights[order], axis=0) / total
    values = np.take_along_axis(vectors, order, axis=0)
    low, high = (np.argmax(ends > 0.5 + sign * TIE, axis=0)[None] for sign in (-1, 1))
    middle = np.take_along_axis(values, low, axis=0) / 2 + np.take_along_axis(values, high, axis=0) / 2
    return total * middle[0], trimmed_mean(vectors, weights)[1]


def krum(vectors: F64, weights: F64) -> tuple[F64, F64]:
    """The mean of the n - f vectors that have the nearest neighbours (multi-Krum, Blanchard et al., 2017), f = (n - 3) // 2.

    Each is judged by the sum of its squared distances to its n - f - 2 nearest. Of fewer than five f is 0 and all are taken.
    """
    n, f = len(vectors), _most_liars(len(vectors))
    scale = np.abs(vectors).max(initial=0.0) or 1.0
    scaled = vectors / scale  # so that no square is too large
    apart = np.array([((scaled - one) ** 2).sum(axis=1) for one in scaled])
    near = np.sort(apart + np.diag(np.full(n, -1.0)), axis=1)[:, 1 : max(n - f - 1, 1)]  # itself comes first
    chosen = np.zeros(n)
    chosen[np.argsort(near.sum(axis=1), kind="stable")[: n - f]] = 1.0
    kept = weights * chosen
    return mean(vectors, kept * (weights.sum() / kept.sum()))[0], chosen


def _most_liars(n: int) -> int:
    return max((n - 3) // 2, 0)


AGGREGATORS = {
    row.name: row
    for row in (
        Aggregator(
            "mean", "weighted mean", mean, lambda weights, lengths: (weights, np.ones(len(weights))), False, False, lambda n: 0
        ),
        Aggregator(
            "clipped",
            "a mean to which no reply brings more than the median one",
            clipped,
            clip_weights,
            True,
            False,
            lambda n: (n - 1) // 2,
        ),
        Aggregator("trimmed-mean", "of the middle half, number by number", trimmed_mean, None, True, True, lambda n: n // 4),
        Aggregator("median", "number by number", median, None, True, True, lambda n: (n - 1) // 2),
        Aggregator("krum", "mean of the replies that lie closest together", krum, None, True, True, _most_liars),
    )
}
"""By name."""
