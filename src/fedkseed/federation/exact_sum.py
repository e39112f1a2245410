"""Sums of float64 whose bits depend on no order and no grouping: integers on a fixed grid, rounded once at the end.

A number is cut into digits of 40 bits: multiples of 1, of 2^-40 and of 2^-80, each the nearest to what the ones before leave.
Only what is below half of 2^-80 is lost. Digits add up as integers, so that sums of sums are sums, and the total becomes the
nearest float64. What a sum holds is three int64 for each number, whatever it is the sum of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
DIGIT = 40
LIMBS = 3
GRIDS = tuple(2.0 ** (DIGIT * power) for power in range(LIMBS))
LARGEST = 2.0**32
"""No number that is added may be larger."""
MAX_TERMS = 2**22
"""So many may be added: their digits are below 2^61 then."""


class Sum(Protocol):
    """K sums that vectors are added to."""

    def add(self, values: F64) -> None:
        """Add float64[K]."""
        ...

    def add_at(self, places: NDArray[np.int64], values: F64) -> None:
        """Add each value at its place, which may be named more than once."""
        ...


class OrderedSum:
    """Sums in float64, each addition rounded, so that the order counts.

    Args:
        start: what they begin with, float64[K].
    """

    def __init__(self, start: F64) -> None:
        self.value = start.copy()

    def add(self, values: F64) -> None:
        """See `Sum`."""
        self.value += values

    def add_at(self, places: NDArray[np.int64], values: F64) -> None:
        """See `Sum`."""
        np.add.at(self.value, places, values)


class ExactSum:
    """Sums on the grid of 2^-80.

    Args:
        limbs: what they begin with, int64[3, K].
    """

    def __init__(self, limbs: I64) -> None:
        self.limbs = limbs.copy()

    @classmethod
    def zeros(cls, size: int) -> Self:
        """K sums of nothing."""
        return cls(np.zeros((LIMBS, size), np.int64))

    def add(self, values: F64) -> None:
        """Add float64[K], none beyond `LARGEST`; at most `MAX_TERMS` times."""
        places = np.flatnonzero(values)  # a client's scalars are of few of the seeds
        left = values[places]
        for grid, limb in zip(GRIDS, self.limbs, strict=True):
            digits = np.rint(left * grid)
            limb[places] += digits.astype(np.int64)
            left = left - digits / grid  # exact: it has fewer bits than the number had

    def add_at(self, places: NDArray[np.int64], values: F64) -> None:
        """Add what these values amount to at each place, summed up there first in their order: one term."""
        total = np.zeros(self.limbs.shape[1])
        np.add.at(total, places, values)
        self.add(total)

    @property
    def value(self) -> F64:
        """The sums, float64[K], each rounded once."""
        return np.array([_rounded(digits) for digits in zip(*self.limbs.tolist(), strict=True)])


def nearly(limbs: I64) -> F64:
    """What limbs stand for, float64[K], to a few roundings and at once."""
    near: F64 = sum(limb / grid for limb, grid in zip(limbs, GRIDS, strict=True))
    return near


def check_limbs(limbs: I64, terms: int) -> None:
    """Refuse limbs that no sum of so many terms has.

    Raises:
        ProtocolError: they are such; so that no sum of what is accepted runs over.
    """
    most = (int(LARGEST) * terms, *[2 ** (DIGIT - 1) * terms] * (LIMBS - 1))
    for limb, bound in zip(limbs, most, strict=True):
        if limb.max(initial=0) > bound or limb.min(initial=0) < -bound:
            raise ProtocolError(f"a sum's digit is beyond {bound:,}, which {terms:,} terms cannot have")


def _rounded(digits: Sequence[int]) -> float:
    whole = 0
    for digit in digits:
        whole = (whole << DIGIT) + digit
    return whole / (1 << DIGIT * (LIMBS - 1))  # the quotient of two integers is rounded once
