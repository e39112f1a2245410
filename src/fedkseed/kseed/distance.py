"""How far a tuned model is from its base, or from another one, from the K numbers alone (docs/ledgers.md, "Distances").

A weight moves by `sum_k a_k z_k`. Directions of one pool are orthogonal (hadamard; in small tensors nearly) or independent
(gaussian) and of variance 1, so the root mean square of the moves of all tuned weights is the length of the coefficients.
Directions of different pools are orthogonal in expectation: the cosine of two sums is 0 within about one over the root of the
number of tuned weights. So lengths of pages add up by their squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import LedgerError
from fedkseed.kseed.arithmetic import check_same_base
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.closed_page import Movement
from fedkseed.noise.pool import SeedPool

Directions = tuple[SeedPool, Movement]


@dataclass(frozen=True)
class Difference:
    """Two tuned models beside each other; lengths are root mean squares over all tuned weights.

    Attributes:
        movement: the unit of lengths: a weight's own, or where weights move in proportion a share of each.
        moved: how far each is from the base.
        apart: how far they are from one another.
        cosine: of the two moves; 0 if one has none.
        shared: whether some directions are of both.
    """

    movement: Movement
    moved: tuple[float, float]
    apart: float
    cosine: float
    shared: bool


def moved_rms(ledger: Ledger) -> float:
    """How far a weight is from the base's, as the root mean square over all tuned weights.

    Returns:
        In the weights' own unit; where pages move weights in proportion, to first order as a share of the weight.
    """
    return math.hypot(*(float(np.linalg.norm(a)) for a in _coefficients(ledger).values()))


def pulled_back(coefficients: NDArray[np.float64], most: float | None) -> NDArray[np.float64]:
    """Coefficients that lead no further from the base than `most` (see `moved_rms`): shortened to that where they are longer.

    Args:
        coefficients: float64[K].
        most: None for no limit.
    """
    length = float(np.linalg.norm(coefficients))
    return coefficients if most is None or length <= most else coefficients * (most / length)


def relative_distance(ledger: Ledger, other: Ledger) -> float:
    """How far two ledgers of one base lie apart, relative to how far the first lies from the base (see `moved_rms`)."""
    moved = moved_rms(ledger)
    return _apart(_coefficients(ledger), _coefficients(other)) / moved if moved else 0.0


def difference(ledger: Ledger, other: Ledger, names: tuple[str, str] = ("ledger 1", "ledger 2")) -> Difference:
    """Two ledgers of one base beside each other.

    Args:
        ledger, other: the ledgers.
        names: what errors call them.

    Raises:
        LedgerError: they are of different bases, or some pages move weights by their sum and others in proportion.
    """
    check_same_base(ledger, other, *names)
    one, two = _coefficients(ledger), _coefficients(other)
    movements: set[Movement] = {movement for _, movement in {**one, **two}}
    if len(movements) > 1:
        raise LedgerError(
            f"pages of {' and '.join(names)} move weights by their sum and others in proportion, which no one number measures; "
            "export both models and compare weights"
        )
    moved = moved_rms(ledger), moved_rms(other)
    product = sum(float(one[both] @ two[both]) for both in one.keys() & two.keys())
    length = moved[0] * moved[1]
    return Difference(
        movements.pop(),
        moved,
        _apart(one, two),
        product / length if length else 0.0,
        bool(one.keys() & two.keys()),
    )


def _apart(one: dict[Directions, NDArray[np.float64]], two: dict[Directions, NDArray[np.float64]]) -> float:
    return math.hypot(*(float(np.linalg.norm(one.get(both, 0.0) - two.get(both, 0.0))) for both in one.keys() | two.keys()))


def _coefficients(ledger: Ledger) -> dict[Directions, NDArray[np.float64]]:
    """Those of each page, float64[K], by what they are of; of a run of scalars its only ones."""
    if not ledger.pages:
        return {(ledger.pool, "absolute"): ledger.coefficients.astype(np.float64)}
    found: dict[Directions, NDArray[np.float64]] = {}
    for page in ledger.pages:
        both = page.pool, page.movement
        found[both] = page.coefficients().astype(np.float64) + found.get(both, 0.0)
    return found
