"""How numbers travel: float32 as they are, or float16 under one power of two per array.

Raw float16 would underflow: at a learning rate of 3e-7 most of a first round's coefficients would become zero. The scale
is 2^e with the largest magnitude in [2^14, 2^15) afterwards, so that 29 powers of two below it keep full precision.
Whoever sends a number also uses its rounded value, so that both sides compute with the same bits.
"""

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import InvalidValueError

Precision: TypeAlias = str
"""One of `PRECISIONS`."""
PRECISIONS = ("float32", "float16")
DTYPES: dict[Precision, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
TOP_EXPONENT = 15
MAX_EXPONENT = 160


@dataclass(frozen=True)
class Packed:
    """An array as it travels: values are `numbers * 2^exponent`, numbers raw little-endian of the precision."""

    precision: Precision
    exponent: int
    numbers: bytes

    def unpack(self) -> NDArray[np.float32]:
        """The values, float32[n]: exact, where the exponent came from `pack`."""
        numbers = np.frombuffer(self.numbers, DTYPES[self.precision]).astype(np.float64)
        with np.errstate(over="ignore"):
            values: NDArray[np.float32] = np.ldexp(numbers, self.exponent).astype(np.float32)
        return values


def pack(values: NDArray[np.floating], precision: Precision, exponent: int | None = None) -> Packed:
    """Round finite values to a precision, nearest even; the exponent of float16 follows the values unless given.

    Raises:
        InvalidValueError: a value is too large for the precision, or not finite.
    """
    exact = np.asarray(values, np.float64)
    if precision == "float32":
        exponent = 0
    elif exponent is None:
        largest = float(np.abs(exact).max(initial=0.0))
        exponent = _exponent(largest) if math.isfinite(largest) and largest else 0
    with np.errstate(over="ignore"):
        numbers = np.ldexp(exact, -exponent).astype(DTYPES[precision])
    packed = Packed(precision, exponent, numbers.tobytes())
    fits = np.isfinite(packed.unpack())
    if not fits.all():
        raise InvalidValueError(f"{exact[~fits][0]} does not fit {precision}; expected smaller finite numbers")
    return packed


def _exponent(largest: float) -> int:
    """The scale for a largest magnitude, taken after its own rounding, so that packing twice is packing once."""
    fraction, exponent = math.frexp(largest)
    exponent += int(np.float16(fraction) == 1)
    return max(exponent - TOP_EXPONENT, -MAX_EXPONENT)


def rounded(values: NDArray[np.floating], precision: Precision, exponent: int | None = None) -> NDArray[np.float32]:
    """The values that arrive when these are sent, float32[n]."""
    return pack(values, precision, exponent).unpack()
