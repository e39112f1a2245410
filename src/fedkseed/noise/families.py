"""The families of noise: one row says all that the rest of the project must know of one (docs/noise.md).

Adding a family is a row here, its mixture and its sums in every backend, and its text in docs/noise.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedkseed.noise.backend import (
    Directions,
    GaussianDirections,
    GaussianMixture,
    HadamardDirections,
    HadamardMixture,
    Mixture,
)
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
        aim: `(key, size, indices or None) -> Directions` of those seeds, of all where they are None.
        numbers: `(sums, size, indices or None) -> u`: Z'g of those seeds, from what a fold along their directions sums up.
        has_table: whether such sums are a table, B numbers from which all seeds' numbers follow.
        pass_per_seed: rebuilding takes one pass over the noise for each seed in use; else all K cost what one costs.
        moves_exactly: half-precision weights are moved by computing them anew from the base, so that moves which cancel
            leave what a rebuild gives; else they follow a float32 copy.
    """

    name: str
    code: int
    about: str
    mix: Callable[[int, int, NDArray[np.int64], NDArray[np.float32]], Mixture]
    aim: Callable[[int, int, NDArray[np.int64] | None], Directions]
    numbers: Callable[[NDArray[np.float64], int, NDArray[np.int64] | None], NDArray[np.float64]]
    has_table: bool
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
    return GaussianMixture(_seed_keys(key, indices), amounts)


def _seed_keys(key: int, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
    r0, r1, _, _ = philox((indices, 0, 0, SEED_STREAM), halves(key))
    keys: NDArray[np.uint64] = r0.astype(np.uint64) | r1.astype(np.uint64) << np.uint64(32)
    return keys


def _hadamard_directions(key: int, size: int, indices: NDArray[np.int64] | None) -> Directions:
    return HadamardDirections(key, block_size(size))


def _gaussian_directions(key: int, size: int, indices: NDArray[np.int64] | None) -> Directions:
    return GaussianDirections(_seed_keys(key, np.arange(size) if indices is None else indices))


def _hadamard_numbers(sums: NDArray[np.float64], size: int, indices: NDArray[np.int64] | None) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # infinities of both signs
        numbers = transform(sums)[:size]
    return numbers if indices is None else numbers[indices]


def _gaussian_numbers(sums: NDArray[np.float64], size: int, indices: NDArray[np.int64] | None) -> NDArray[np.float64]:
    return sums


def _table(indices: NDArray[np.int64], amounts: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    """A = H a, float32[size]: transformed in float64, rounded once (docs/noise.md)."""
    x = np.zeros(size, np.float64)
    x[indices] = amounts
    with np.errstate(over="ignore"):
        return transform(x).astype(np.float32)


def transform(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """H x: butterflies in float64 on strides 1, 2, 4, ... (docs/noise.md).

    Each pass leaves the sums in the first half and the differences in the second, so that the next stride's pairs are
    neighbours again, NumPy's loops are long, and after the last pass all are in their places (Pease 1968).
    """
    half = len(x) // 2
    x, y = x.copy(), np.empty_like(x)
    for _ in range(len(x).bit_length() - 1):
        np.add(x[::2], x[1::2], out=y[:half])
        np.subtract(x[::2], x[1::2], out=y[half:])
        x, y = y, x
    return x


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "hadamard", 0, "all seeds cost what one costs", _hadamard, _hadamard_directions, _hadamard_numbers,
            has_table=True, pass_per_seed=False, moves_exactly=True,
        ),
        Family(
            "gaussian", 1, "as published", _gaussian, _gaussian_directions, _gaussian_numbers,
            has_table=False, pass_per_seed=True, moves_exactly=False,
        ),
    )
}  # fmt: skip
BY_CODE = {family.code: family for family in FAMILIES.values()}
