"""A page that no longer changes, without what a model takes: a ledger is read before torch is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedkseed.noise import Mixture
from fedkseed.noise.pool import SeedPool

Movement = Literal["absolute", "proportional"]
"""How a page moves a weight: by its sum, or by the weight at the page's start times its sum."""


@dataclass(frozen=True, eq=False)
class ClosedPage:
    """A page that no longer changes: its pool, its coefficients, float32[K], and how it moves a weight."""

    pool: SeedPool
    coefficients: NDArray[np.float32]
    movement: Movement = "absolute"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClosedPage):
            return NotImplemented
        same = (self.pool, self.movement) == (other.pool, other.movement)
        return same and self.coefficients.tobytes() == other.coefficients.tobytes()

    __hash__ = None  # type: ignore[assignment]

    def mixture(self) -> Mixture:
        """Its sum over all seeds."""
        return self.pool.mixture_of(self.coefficients)
