"""Numbers as integers modulo 2^32, so that a sum is exact whatever its order, and no sum of a cohort can run over.

A client's numbers are clipped to `clip`, multiplied by its weight and by `scale`, and rounded to the nearest integer. The
weights of a cohort are together at most 1 and each rounding adds at most a half, so the sum's magnitude is at most
`clip * scale + size / 2`, which `scale` keeps below 2^31.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError
from fedkseed.federation.envelope import LARGEST_CLIP, SMALLEST_CLIP

F64 = NDArray[np.float64]
U32 = NDArray[np.uint32]
MOST = 2**31 - 1
"""The largest sum; the smallest is its negative."""
MAX_COHORT = 10_000


@dataclass(frozen=True)
class FixedPoint:
    """The coding of one cohort.

    Attributes:
        clip: larger magnitudes are clipped.
        size: how many clients may add to a sum.

    Raises:
        ProtocolError: one of them is out of its range.
    """

    clip: float
    size: int

    def __post_init__(self) -> None:
        if not 1 <= self.size <= MAX_COHORT:
            raise ProtocolError(f"a secure sum of {self.size} clients; expected 1 to {MAX_COHORT}, whose sum cannot run over")
        if not SMALLEST_CLIP <= self.clip <= LARGEST_CLIP:
            raise ProtocolError(f"clip is {self.clip!r:.40}; expected a number from {SMALLEST_CLIP:g} to {LARGEST_CLIP:g}")

    @property
    def scale(self) -> float:
        """Integers for 1: `(2^31 - 1 - size) / clip`."""
        return (MOST - self.size) / self.clip

    def encode(self, values: F64, weight: float) -> U32:
        """A client's numbers times its weight, modulo 2^32.

        Args:
            values: float64[n], finite.
            weight: above 0, at most 1; those of a cohort are together at most 1.

        Raises:
            ProtocolError: a value is not finite, or the weight out of its range.
        """
        if not 0 < weight <= 1:
            raise ProtocolError(f"weight is {weight!r:.40}; expected a number above 0, at most 1")
        if not np.isfinite(values).all():
            raise ProtocolError(f"a number to be summed is {values[~np.isfinite(values)][0]}; all must be finite")
        whole = np.rint(np.clip(values, -self.clip, self.clip) * (weight * self.scale))
        return whole.astype(np.int64).astype(np.uint32)

    def decode(self, total: U32, weight: float) -> F64:
        """The weighted mean that a sum stands for.

        Args:
            total: the sum modulo 2^32, uint32[n].
            weight: what its clients weigh together.

        Returns:
            float64[n], none larger than `clip`: honest clients cannot add up to more.
        """
        mean: F64 = total.view(np.int32).astype(np.float64) / (weight * self.scale)
        return np.clip(mean, -self.clip, self.clip)
