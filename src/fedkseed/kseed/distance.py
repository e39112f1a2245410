"""How far a tuned model is from its base, from the K numbers alone."""

from __future__ import annotations

import math

import numpy as np

from fedkseed.kseed.ledger import Ledger


def moved_rms(ledger: Ledger) -> float:
    """How far a weight is from the base's, as the root mean square over all tuned weights.

    A weight moves by `sum a_k z_k`. Directions are orthogonal (hadamard; small tensors nearly) or independent (gaussian) and of
    variance 1, so this is the length of the coefficients, and the distance is the square root of the number of tuned weights
    times it (docs/noise.md). Pages have pools of their own: their squares add up.

    Returns:
        In the weights' own unit; where pages move weights in proportion, as a share of the weight.
    """
    lengths = [np.linalg.norm(page.coefficients().astype(np.float64)) for page in ledger.pages]
    if not ledger.pages:
        lengths = [np.linalg.norm(ledger.coefficients.astype(np.float64))]
    return math.hypot(*map(float, lengths))
