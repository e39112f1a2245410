"""Numbers as they travel: what rounding keeps, what it loses, what it refuses."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedkseed.errors import InvalidValueError
from fedkseed.kseed.rounding import PRECISIONS, Packed, Precision, pack, rounded

precisions = pytest.mark.parametrize("precision", PRECISIONS)
LARGE = float(np.float32(1e38))
SUBNORMAL = 2.0**-149
VALUES = arrays(np.float32, st.integers(1, 12), elements=st.floats(-LARGE, LARGE, width=32))
# The largest magnitude carries into the next power of two when it is rounded to 11 bits.
CARRY = np.array([1 - 2.0**-13, 1.5 * 2.0**-38], np.float32)


def bits(x: NDArray[np.float32]) -> list[int]:
    assert x.dtype == np.float32
    return x.view(np.uint32).tolist()


def half(values: NDArray[np.floating]) -> NDArray[np.float32]:
    """The negative control: float16 without a scale."""
    return values.astype(np.float16).astype(np.float32)


# --- float32 ---


@given(VALUES)
def test_float32_keeps_every_bit(values: NDArray[np.float32]) -> None:
    packed = pack(values, "float32")
    assert packed == Packed("float32", 0, values.astype("<f4").tobytes())
    assert bits(packed.unpack()) == bits(values)


def test_float32_rounds_float64_to_the_nearest_even() -> None:
    step = 2.0**-23
    exact = np.array([1 + step / 2, 1 + 3 * step / 2, 1 + 0.51 * step, -(1 + step / 2)])
    assert rounded(exact, "float32").tolist() == [1, 1 + 2 * step, 1 + step, -1]


# --- float16 with one power of two ---


@given(VALUES)
def test_float16_takes_two_bytes_a_number(values: NDArray[np.float32]) -> None:
    packed = pack(values, "float16")
    assert len(packed.numbers) == 2 * len(values)
    assert packed.unpack().shape == values.shape
    numbers = np.frombuffer(packed.numbers, "<f2")
    assert np.isfinite(numbers).all()
    largest = float(np.abs(values).max())
    assert largest < 2.0**-130 or 2**14 <= float(np.abs(numbers).max()) <= 2**15


@given(VALUES)
@example(CARRY)
@example(np.array([1.0, 1.001 * 2.0**-28], np.float32))
@example(np.array([SUBNORMAL, 3 * SUBNORMAL], np.float32))
def test_float16_errs_by_at_most_half_a_last_place(values: NDArray[np.float32]) -> None:
    arrived = rounded(values, "float16")
    top = math.frexp(float(np.abs(arrived).max()))[1]  # the largest lies below 2^top
    for value, result in zip(values.tolist(), arrived.tolist(), strict=True):
        error = abs(Fraction(result) - Fraction(value))
        rounding = Fraction(SUBNORMAL) / 2 if abs(value) < 2.0**-126 else 0  # the result is a float32
        if abs(value) >= 2.0 ** max(top - 29, -149):
            assert error <= abs(Fraction(value)) / 2**11 + rounding
        else:
            assert error <= Fraction(2) ** (top - 40) + rounding  # half the last place of what lies below
        assert result == 0 or math.copysign(1, result) == math.copysign(1, value)


@pytest.mark.parametrize("power", [-126, -100, -40, 0, 40, 100, 126])
def test_float16_keeps_11_bits_over_29_powers_of_two(power: int) -> None:
    """Exactly, at any overall scale: numbers of 11 bits arrive as they were."""
    rng = np.random.default_rng(power + 200)
    binades = np.arange(0, -29, -1)
    digits = rng.integers(2**10, 2**11, 29)
    values = np.ldexp(digits.astype(np.float64), binades - 10 + power)
    values = values[values >= 2.0**-126].astype(np.float32)
    assert bits(rounded(values, "float16")) == bits(values)
    # Negative control: raw float16 has 30 binades at one place only.
    assert power == 0 or bits(half(np.minimum(values, np.float32(65504)))) != bits(values)


@precisions
@given(values=VALUES)
@example(values=CARRY)
@example(values=np.array([2.0**-100 * (1 - 2.0**-12), 2.0**-137], np.float32))
@example(values=np.array([SUBNORMAL, -5 * SUBNORMAL, 2.0**-130], np.float32))
def test_rounding_is_idempotent(precision: Precision, values: NDArray[np.float32]) -> None:
    """A published ledger rounds again what the run has rounded: it must be the same model."""
    once = rounded(values, precision)
    assert bits(rounded(once, precision)) == bits(once)


@precisions
def test_zeros_stay_zeros(precision: Precision) -> None:
    assert bits(rounded(np.zeros(5), precision)) == [0] * 5
    assert pack(np.zeros(3), precision).exponent == 0
    assert rounded(np.zeros(0), precision).shape == (0,)


@precisions
def test_subnormals_alone_arrive(precision: Precision) -> None:
    values = (np.arange(-1000, 1000) * SUBNORMAL).astype(np.float32)
    assert rounded(values, precision).tolist() == values.tolist()


@precisions
def test_tiny_float64_becomes_zero_without_a_warning(precision: Precision) -> None:
    assert rounded(np.array([1e-60, -5e-324]), precision).tolist() == [0, 0]


@precisions
def test_the_largest_float32_never_arrives_as_infinity(precision: Precision) -> None:
    """Either it arrives, finite, or it is refused; it never arrives as an infinity."""
    largest = np.array([np.finfo(np.float32).max, 1.0], np.float32)
    try:
        arrived = rounded(largest, precision)
    except InvalidValueError:
        assert precision == "float16"  # 11 bits round it up to 2^128
    else:
        assert np.isfinite(arrived).all()
        assert arrived[0] == pytest.approx(largest[0], rel=2**-11)


@precisions
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, -1e300, 3.5e38])
def test_what_does_not_fit_is_refused(precision: Precision, value: float) -> None:
    with pytest.raises(InvalidValueError, match=r"does not fit|finite"):
        pack(np.array([1.0, value]), precision)


@pytest.mark.parametrize("value", [65520.0, 1e6, math.nan])
def test_a_fixed_scale_has_a_largest_value(value: float) -> None:
    with pytest.raises(InvalidValueError, match="does not fit float16"):
        pack(np.array([value]), "float16", 0)
    assert rounded(np.array([65504.0]), "float16", 0).tolist() == [65504]


@given(st.floats(-60000, 60000), st.floats(-60000, 60000))
def test_a_fixed_scale_rounds_each_number_for_itself(one: float, other: float) -> None:
    """So that a client can round a scalar before it knows the next."""
    together = rounded(np.array([one, other]), "float16", 0)
    alone = [rounded(np.array([x]), "float16", 0)[0] for x in (one, other)]
    assert bits(together) == bits(np.array(alone, np.float32))
    assert bits(together) == bits(half(np.array([one, other])))


def test_arguments_are_left_alone() -> None:
    values = np.array([0.1, -3.0])
    for precision in PRECISIONS:
        pack(values, precision)
    assert values.tolist() == [0.1, -3.0]


# --- Why there is a scale ---


def test_raw_float16_would_lose_a_first_round() -> None:
    """lr 3e-7, five clients of equal weight, 200 steps each: most coefficients lie below half of float16's smallest."""
    rng = np.random.default_rng(0)
    a = np.zeros(4096)
    for _ in range(5):
        np.add.at(a, rng.integers(0, 4096, 200), -3e-7 * rng.standard_normal(200) / 5)
    moved = a != 0
    lost = np.mean(half(a)[moved] == 0)
    assert lost > 0.3  # without a scale a third or more of what was learnt is gone, the rest has a bit or two
    coarse = np.abs(half(a)[moved] / a[moved] - 1) > 2**-11
    assert coarse.mean() > 0.9
    arrived = rounded(a, "float16")[moved]
    assert np.all(np.abs(arrived / a[moved] - 1) <= 2**-11)
