"""How K numbers travel in few bits: evenly spaced levels around zero, one step a message.

A wire of b bits has the levels `(i - (2^b - 1) / 2) step`, i from 0 to 2^b - 1: with one bit plus or minus half a step.
The step is the sender's choice, by what loses least. What coding loses is the sender's to keep, and to add to
what it sends next.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import InvalidValueError, ProtocolError
from fedkseed.kseed.rounding import DTYPES, pack

F64 = NDArray[np.float64]
BITS = {"float32": 32, "float16": 16, "int8": 8, "int4": 4, "int2": 2, "sign": 1}
"""The wires, and how many bits each takes for a number."""
CLIPS = tuple(0.8**i for i in range(14))
"""Where the outermost level may lie, relative to the largest magnitude."""
LARGEST = 2.0**100
"""No number that is sent is larger, so that a page's sum of 65,535 parts is finite in binary32."""
MAX_STEP = 4 * LARGEST
MIN_EXPONENT = -126
"""Of float16's step, which binary32 must hold."""


@dataclass(frozen=True)
class Coded:
    """Numbers as they travel.

    Attributes:
        wire: one of `BITS`.
        step: the distance of two levels, a binary32 value; of float16 the power of two to multiply by, of float32 1.
        numbers: the levels' indices, b bits each, the first in the highest bits of the first byte; or little-endian floats.
    """

    wire: str
    step: float
    numbers: bytes

    def decode(self, count: int) -> F64:
        """The first `count` numbers, exact in float64."""
        if self.wire in DTYPES:
            with np.errstate(invalid="ignore"):  # what is not finite is for `check` to say
                return np.frombuffer(self.numbers, DTYPES[self.wire])[:count].astype(np.float64) * self.step
        bits = BITS[self.wire]
        each = np.unpackbits(np.frombuffer(self.numbers, np.uint8), count=count * bits).reshape(count, bits)
        indices = each @ (1 << np.arange(bits - 1, -1, -1))
        levels: F64 = (indices - (2**bits - 1) / 2) * self.step
        return levels

    def check(self, name: str, count: int) -> None:
        """Refuse what is not `count` numbers of a known wire, none beyond what coding numbers up to `LARGEST` gives.

        Raises:
            ProtocolError: it is not; the message begins with the name.
        """
        if self.wire not in BITS:
            raise ProtocolError(f"{name}: wire {self.wire!r:.40} is unknown; expected one of {', '.join(BITS)}")
        if not isinstance(self.step, float) or not 0 <= self.step <= MAX_STEP:
            raise ProtocolError(f"{name}: step is {self.step!r:.40}; expected a number from 0 to {MAX_STEP:g}")
        if not isinstance(self.numbers, bytes) or len(self.numbers) != coded_bytes(count, self.wire):
            size = len(self.numbers) if isinstance(self.numbers, bytes) else f"{type(self.numbers).__name__}, no"
            raise ProtocolError(f"{name}: {size} bytes came; expected {coded_bytes(count, self.wire)}")
        numbers = self.decode(count)
        if not np.isfinite(numbers).all():
            raise ProtocolError(f"{name}: a number is not finite; all must be")
        if np.abs(numbers).max(initial=0.0) > 2 * LARGEST:
            raise ProtocolError(f"{name}: a number is {np.abs(numbers).max():g}; at most {LARGEST:g} is sent")


def coded_bytes(count: int, wire: str) -> int:
    """How many bytes so many numbers take."""
    return -(-count * BITS[wire] // 8)


def encode(values: F64, wire: str) -> Coded:
    """Numbers for a wire, with the step that loses least.

    Args:
        values: float64[n], finite.
        wire: one of `BITS`.

    Raises:
        InvalidValueError: a value is not finite, or beyond `LARGEST`.
    """
    if not (np.abs(values) <= LARGEST).all():
        wrong = values[~(np.abs(values) <= LARGEST)][0]
        raise InvalidValueError(
            f"a number to be sent is {wrong}; all must be finite, at most {LARGEST:g}: lower the rate (--lr, --server-lr)"
        )
    if wire in DTYPES:
        packed = pack(values, wire)
        if packed.exponent < MIN_EXPONENT:
            packed = pack(values, wire, MIN_EXPONENT)
        return Coded(wire, float(2.0**packed.exponent), packed.numbers)
    bits = BITS[wire]
    magnitudes = np.abs(values)
    largest = float(magnitudes.max(initial=0.0))
    top = (2**bits - 1) / 2
    steps = [2 * float(magnitudes.mean())] if largest and bits == 1 else [clip * largest / top for clip in CLIPS]
    best = min((float(np.float32(step)) for step in steps), key=lambda step: _loss(magnitudes, step, top))
    if best == 0:  # nothing but zeros, or what binary32 holds no step for
        return Coded(wire, 0.0, bytes(coded_bytes(len(values), wire)))
    indices = np.clip(np.rint(values / best + top), 0, 2 * top).astype(np.uint8)
    each = (indices[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return Coded(wire, best, np.packbits(each.astype(np.uint8).reshape(-1)).tobytes())


def _loss(magnitudes: F64, step: float, top: float) -> float:
    """The squared error of coding magnitudes by levels at odd multiples of half a step, at most `top` steps from zero."""
    if step <= 0:
        return np.inf
    levels = np.minimum(np.floor(magnitudes / step) + 0.5, top)
    return float(np.sum((magnitudes - levels * step) ** 2))
