"""The Gaussian mechanism on vectors, in integers: clip each, add them up, add noise (docs/privacy.md).

Floating-point sums and noise tell in their last bits what was added (Mironov, CCS 2012). Here a clipped vector is cut to a grid
towards zero, which never lengthens it, and is summed exactly. Noise is rounded to the same grid. As the sum is on the grid,
rounding the noise is rounding the noisy sum: a function of what the continuous mechanism releases, whose analysis holds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Source = Callable[[int], bytes]
"""So many random bytes; `os.urandom` but in tests."""
GRID = 2**20
"""Grid points in a clip norm."""
SHRINK = 1 - 2.0**-30
"""More than floating-point norms err by, so that no vector is longer than its bound."""


@dataclass(frozen=True)
class Mechanism:
    """The Gaussian mechanism: a sum of vectors, each clipped to `clip_norm`, and normal noise.

    Adding or taking away one vector moves the sum by at most `clip_norm`; the noise's standard deviation is `noise_multiplier`
    times that in every coordinate.

    Args:
        clip_norm: C, longest vector.
        noise_multiplier: z.
        source: random bytes.
    """

    clip_norm: float
    noise_multiplier: float
    source: Source = os.urandom

    def bounded(self, vector: F64) -> I64:
        """A vector of length at most C in steps of C / 2^20, shortened if it is longer; zeros if a number is not finite.

        It is a function of this vector alone, and its length in steps is at most 2^20, exactly.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            length = float(np.linalg.norm(vector))
            if not math.isfinite(length):
                return np.zeros(len(vector), np.int64)
            scale = min(1.0, self.clip_norm / length) if length else 0.0
            return np.trunc(vector * (scale * SHRINK) / self.clip_norm * GRID).astype(np.int64)

    def release(self, vectors: Iterable[F64], size: int, count: float) -> F64:
        """The noisy sum of some vectors over their expected number, float64[size]: the one thing that may leave.

        Args:
            vectors: float64[size] each; none at all is fine.
            size: how many numbers each has.
            count: what the sum is divided by; never the actual number, which would tell it.
        """
        total = np.zeros(size, np.int64)
        for vector in vectors:
            total += self.bounded(vector)
        noisy = total + normal(size, self.noise_multiplier * GRID, self.source)
        return noisy.astype(np.float64) * (self.clip_norm / GRID / count)


def normal(count: int, deviation: float, source: Source) -> I64:
    """Normal numbers rounded to integers, int64[count], by Box and Muller from 53 random bits each.

    No magnitude is above 8.6 deviations, which cuts off 1e-16 of the distribution.
    """
    if deviation == 0:
        return np.zeros(count, np.int64)
    pairs = -(-count // 2)
    radius = np.sqrt(-2 * np.log(1 - uniform(pairs, source)))
    angle = 2 * np.pi * uniform(pairs, source)
    both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
    return np.rint(deviation * both).astype(np.int64)


def uniform(count: int, source: Source) -> F64:
    """Multiples of 2^-53 from 0 to below 1, float64[count]."""
    bits = np.frombuffer(source(8 * count), np.uint64) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def poisson_sample(count: int, rate: float, source: Source = os.urandom) -> I64:
    """Which of so many records are in a batch: each on its own with probability `rate`, ascending; maybe none."""
    return np.flatnonzero(uniform(count, source) < rate)
