"""The families of noise: one row says all that the rest of the project must know of one (docs/noise.md).

Adding a family is a row here, its mixture and its sums in every backend, and its text in docs/noise.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedkseed.noise.backend import GaussianMixture, HadamardMixture, Mixture
from fedkseed.noise.philox import halves, philox

MIN_BLOCK = 128
SEED_STREAM = 0x5EED5EED


@dataclass(frozen=True)
class Family:
    """One family of perturbations.

    Attributes:
        name: what settings, ledgers and pools call it.
        code: what messages call it; never changes, never used again for another.
        about: a few words for the help.
        mix: `(key, size, indices, amounts) -> Mixture` of distinct ascending seeds, int64[m], and amounts, float32[m].
        pass_per_seed: rebuilding takes one pass over the noise for each seed in use; else all K cost what one costs.
        moves_exactly: half-precision weights are moved by computing them anew from the base, so that moves which cancel
            leave what a rebuild gives; else they follow a float32 copy.
    """

    name: str
    code: int
    about: str
    mix: Callable[[int, int, NDArray[np.int64], NDArray[np.float32]], Mixture]
    pass_per_seed: bool
    moves_exactly: bool


def block_size(size: int) -> int:
    """B: the smallest power of two that is at least K and at least 128."""
    return max(MIN_BLOCK, 1 << (size - 1).bit_length())


def _hadamard(key: int, size: int, indices: NDArray[np.int64], amounts: NDArray[np.float32]) -> Mixture:
    return HadamardMixture(key, _table(indices, amounts, block_size(size)))


def _gaussian(key: int, size: int, indices: NDArray[np.int64], amounts: NDArray[np.float32]) -> Mixture:
    # Leaving out zeros changes no bit: the sum starts from +0, so it is never -0, and adding a zero leaves it.
    indices, amounts = indices[amounts != 0], amounts[amounts != 0]
    r0, r1, _, _ = philox((indices, 0, 0, SEED_STREAM), halves(key))
    return GaussianMixture(r0.astype(np.uint64) | r1.astype(np.uint64) << np.uint64(32), amounts)


def _table(indices: NDArray[np.int64], amounts: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """A = H a, float32[size]: butterflies in float64 on strides 1, 2, 4, ..., rounded once (docs/noise.md).

    Each pass leaves the sums in the first half and the differences in the second, so that the next stride's pairs are
    neighbours again, NumPy's loops are long, and after the last pass all are in their places (Pease 1968).
    """
    x, y = np.zeros(size, np.float64), np.empty(size, np.float64)
    x[indices] = amounts
    for _ in range(size.bit_length() - 1):
        np.add(x[::2], x[1::2], out=y[: size // 2])
        np.subtract(x[::2], x[1::2], out=y[size // 2 :])
        x, y = y, x
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


FAMILIES = {
    family.name: family
    for family in (
        Family("hadamard", 0, "all seeds cost what one costs", _hadamard, pass_per_seed=False, moves_exactly=True),
        Family("gaussian", 1, "as published", _gaussian, pass_per_seed=True, moves_exactly=False),
    )
}
BY_CODE = {family.code: family for family in FAMILIES.values()}
