"""How far a tuned model is from its base, or from another one, from the K numbers alone."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from fedkseed.kseed.ledger import Ledger


def moved_rms(ledger: Ledger) -> float:
    """How far a weight is from the base's, as the root mean square over all tuned weights.

    A weight moves by `sum a_k z_k`. Directions are orthogonal (hadamard; small tensors nearly) or independent (gaussian) and of
    variance 1, so this is the length of the coefficients, and the distance is the square root of the number of tuned weights
    times it (docs/noise.md). Pages have pools of their own: their squares add up.

    Returns:
        In the weights' own unit; where pages move weights in proportion, as a share of the weight.
    """
    return math.hypot(*(float(np.linalg.norm(a)) for a in _coefficients(ledger)))


def distance(ledger: Ledger, other: Ledger) -> float:
    """How far two ledgers of the same pools lie apart, relative to how far the first lies from the base (see `moved_rms`)."""
    apart = math.hypot(
        *(float(np.linalg.norm(a - b)) for a, b in zip(_coefficients(ledger), _coefficients(other), strict=True))
    )
    moved = moved_rms(ledger)
    return apart / moved if moved else 0.0


def _coefficients(ledger: Ledger) -> list[NDArray[np.float64]]:
    """Those of each page, float64[K]; of a run of scalars its only ones."""
    return [page.coefficients().astype(np.float64) for page in ledger.pages] or [ledger.coefficients.astype(np.float64)]
