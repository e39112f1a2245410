"""What those that hold a round's replies tell of them, so that a server can close the round without seeing each.

A server that closes a round asks, in this order, by a generator that anybody can drive: how long each reply's vector is, then
what weighted sums the vectors have. It may hold the replies itself, or hear the answers of others that do.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError
from fedkseed.federation.exact_sum import GRIDS, check_limbs, nearly

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
ROUNDING = 1 + 2.0**-20
"""More than lengths in float64 err by."""
Treated = Mapping[str, Mapping[str, float]]
"""What became of each client's numbers, by the names that `metrics.jsonl` has for it."""


@dataclass(frozen=True)
class Question:
    """What is asked of accepted replies, in the order of their clients' names.

    Attributes:
        limit: scalars beyond it count as it; infinite where none is bounded.
        weights: what each vector counts in the sums that are asked for, float64[n]; None: their lengths are asked for.
    """

    limit: float
    weights: F64 | None = None


@dataclass(frozen=True)
class Lengths:
    """Of n replies, in the order of their clients' names.

    Attributes:
        lengths: each vector's Euclidean length, float64[n].
        clipped: how many of its scalars were beyond the limit, int64[n].
    """

    lengths: F64
    clipped: I64


Closing = Generator[Question, Any, Treated]
"""Asks until it knows enough, then moves the checkpoint on; nothing has changed before."""


class Part(Protocol):
    """Accepted replies to a round's requests, those of all clients or of some."""

    def words(self) -> F64:
        """What each says of the scale of scalars, float64[n]; 0 where it says nothing. Empty where no scale is followed."""
        ...

    def lengths(self, limit: float) -> Lengths:
        """See `Lengths`; each a function of its reply alone."""
        ...

    def rows(self, limit: float, weights: F64) -> I64:
        """The exact sums that the server asks for, int64[rows, K]: of like parts they add up to those of both."""
        ...


def answered(closing: Closing, answer: Callable[[Question], Any]) -> Treated:
    """Drive a closing to its end with one who knows all answers."""
    try:
        question = next(closing)
        while True:
            question = closing.send(answer(question))
    except StopIteration as end:
        treated: Treated = end.value
        return treated


def check_sum(limbs: I64, weights: F64, lengths: F64 | None, most: F64) -> None:
    """Refuse the exact sum of somebody's weighted vectors that none of these lengths could have.

    Args:
        limbs: int64[3, K].
        weights: of the vectors, float64[n].
        lengths: theirs, if they are known.
        most: the largest number that each may have, float64[n].

    Raises:
        ProtocolError: it is that.
    """
    check_limbs(limbs, len(weights))
    total = nearly(limbs)
    if lengths is None:
        found, bound, what = float(np.abs(total).max()), float(weights @ most), "has a number of"
    else:
        found, bound, what = float(np.linalg.norm(total)), float(weights @ lengths), "is of length"
    if found > bound * ROUNDING + GRIDS[-1] ** -1 * len(total) * len(weights):
        raise ProtocolError(f"a sum {what} {found:g}; its {len(weights)} replies cannot add up to more than {bound:g}")


def row_length(vector: F64) -> float:
    """Euclidean length of float64[K], to the bits that it has as a row of a matrix."""
    return float(np.linalg.norm(vector[None], axis=1)[0])
