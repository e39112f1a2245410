"""How K numbers travel: every wire's round trip, what it loses at most, what is refused."""

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from fedkseed.errors import InvalidValueError, ProtocolError
from fedkseed.kseed.coding import BITS, LARGEST, MAX_STEP, Coded, coded_bytes, encode

F64 = NDArray[np.float64]
wires = pytest.mark.parametrize("wire", BITS)
LEVELLED = {"int8": 8, "int4": 4, "int2": 2, "sign": 1}
levelled = pytest.mark.parametrize(("wire", "bits"), LEVELLED.items())
COUNTS = (1, 3, 7, 8, 9, 64, 100, 4096)  # few are a multiple of a byte's numbers


def numbers(count: int, seed: int = 0) -> F64:
    return 1e-3 * np.random.default_rng(seed).standard_normal(count)


def by_hand(coded: Coded, count: int, bits: int) -> F64:
    """The definition, number by number: b bits each, the first in the highest bits, levels around zero."""
    whole = "".join(f"{byte:08b}" for byte in coded.numbers)
    indices = [int(whole[bits * i : bits * (i + 1)], 2) for i in range(count)]
    return np.array([(i - (2**bits - 1) / 2) * coded.step for i in indices])


# --- Round trips ---


@wires
@pytest.mark.parametrize("count", COUNTS)
def test_a_message_has_as_many_bytes_as_its_wire_says(wire: str, count: int) -> None:
    coded = encode(numbers(count), wire)
    assert len(coded.numbers) == coded_bytes(count, wire) == -(-count * BITS[wire] // 8)
    assert float(np.float32(coded.step)) == coded.step  # a ledger and a request hold it as binary32
    coded.check("the numbers", count)
    assert coded.decode(count).shape == (count,)
    assert coded.decode(count).dtype == np.float64


@levelled
@pytest.mark.parametrize("count", COUNTS)
def test_levels_lie_where_the_definition_says(wire: str, bits: int, count: int) -> None:
    coded = encode(numbers(count), wire)
    np.testing.assert_array_equal(coded.decode(count), by_hand(coded, count, bits))


@levelled
@pytest.mark.parametrize("step", [2.0**-20, float(np.float32(0.1)), 3.0])
def test_levels_are_reproduced_exactly(wire: str, bits: int, step: float) -> None:
    """All of them, the outermost among them, so that the step can be found again; coding twice is coding once."""
    each = np.tile(np.arange(2**bits), 3)
    levels = (np.random.default_rng(bits).permutation(each) - (2**bits - 1) / 2) * step
    coded = encode(levels, wire)
    assert coded.step == step
    np.testing.assert_array_equal(coded.decode(len(levels)), levels)
    assert encode(coded.decode(len(levels)), wire) == coded


@pytest.mark.parametrize("wire", ["float32", "float16", "sign"])
@given(values=arrays(np.float64, st.integers(1, 40), elements=st.floats(-1e30, 1e30)))
def test_coding_what_arrived_changes_nothing(wire: str, values: F64) -> None:
    """Of float wires, and of signs but for which zero takes."""
    arrived = encode(values, wire).decode(len(values))
    again = encode(arrived, wire).decode(len(values))
    np.testing.assert_array_equal(again, arrived)


@wires
@given(values=arrays(np.float64, st.integers(1, 60), elements=st.floats(-1e30, 1e30)))
def test_what_coding_loses_is_bounded(wire: str, values: F64) -> None:
    """By half a step; of what lies beyond the outermost level, by the distance to it; of floats, by their precision."""
    coded = encode(values, wire)
    coded.check("the numbers", len(values))
    arrived = coded.decode(len(values))
    lost, sizes = np.abs(values - arrived), np.abs(values)
    if wire in LEVELLED:
        outermost = (2 ** BITS[wire] - 1) / 2 * coded.step
        # half a step, and what float64 loses; no step below binary32's smallest
        assert (lost <= np.maximum(coded.step / 2, sizes - outermost) * (1 + 1e-9) + 2.0**-149 * 128).all()
    elif wire == "float16":
        assert (lost <= np.maximum(sizes * 2.0**-11, sizes.max() * 2.0**-38) + 2.0**-126).all()
    else:
        assert (lost <= sizes * 2.0**-24 + 2.0**-150).all()
    if wire in LEVELLED and coded.step:  # near zero a number may change its sign
        assert (np.sign(arrived) == np.sign(values))[sizes > coded.step / 2].all()


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    values = np.array([0.5, -1.5, 2.0, -4.0, 0.25, -0.75, 3.0, 0.0, -1.0])
    arrived = encode(values, "sign").decode(9)
    np.testing.assert_array_equal(np.abs(arrived), float(np.float32(np.abs(values).mean() * 2)) / 2)
    np.testing.assert_array_equal(np.sign(arrived)[values != 0], np.sign(values)[values != 0])
    assert encode(values, "sign").numbers == bytes([0b10101010, 0])


def test_one_bit_loses_less_with_the_mean_than_with_another_size() -> None:
    """The negative control: any other size loses more."""
    values = numbers(1000)
    size = float(np.abs(encode(values, "sign").decode(1000))[0])

    def lost(size: float) -> float:
        return float(np.sum((values - np.sign(values) * size) ** 2))

    assert lost(size) < min(lost(size * 0.99), lost(size * 1.01), lost(float(np.abs(values).max())))


@pytest.mark.parametrize("wire", ["int8", "int4", "int2"])
def test_the_step_loses_less_than_one_to_the_largest_number(wire: str) -> None:
    """Heavy tails: a step that reaches the largest would leave the rest no level. The control is that step."""
    values = numbers(2000)
    values[7] = 30 * np.abs(values).max()
    coded = encode(values, wire)
    plain = Coded(wire, float(np.abs(values).max()) / ((2 ** BITS[wire] - 1) / 2), b"")
    top = (2 ** BITS[wire] - 1) / 2
    nearest = np.clip(np.rint(values / plain.step + top), 0, 2 * top) - top
    lost, control = np.sum((values - coded.decode(2000)) ** 2), np.sum((values - nearest * plain.step) ** 2)
    assert lost <= control * (1 + 1e-4)  # the control's step is not rounded to binary32
    assert coded.step <= plain.step * (1 + 1e-6)


@wires
def test_zeros_are_zeros(wire: str) -> None:
    for count in (1, 8, 13):
        coded = encode(np.zeros(count), wire)
        coded.check("the numbers", count)
        assert not coded.decode(count).any()
        assert encode(-np.zeros(count), wire).decode(count).tolist() == [0] * count


@wires
@pytest.mark.parametrize("size", [1e-30, 1e-37, 1e-40, 1e-44, 1e-46, 1e-60, 1e-300, 5e-324])
def test_tiny_numbers_travel_or_vanish(wire: str, size: float) -> None:
    """A step that binary32 holds, whatever there is to be sent; never more than twice what was there."""
    values = numbers(9) / np.abs(numbers(9)).max() * size
    coded = encode(values, wire)
    coded.check("the numbers", 9)
    assert float(np.float32(coded.step)) == coded.step
    assert np.abs(coded.decode(9)).max() <= 2 * size + 2.0**-149
    if size >= 1e-37:
        assert np.abs(coded.decode(9)).max() > size / 4


# --- What is refused ---


@wires
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e31, -1e31, 1e300])
def test_numbers_that_cannot_be_sent(wire: str, value: float) -> None:
    values = numbers(9)
    values[4] = value
    with pytest.raises(InvalidValueError, match=re.escape(f"is {value}; all must be finite, at most 1.26765e+30")):
        encode(values, wire)


@wires
def test_the_largest_number_can_be_sent(wire: str) -> None:
    values = np.array([LARGEST, -LARGEST, 1.0])
    coded = encode(values, wire)
    coded.check("the numbers", 3)
    assert np.abs(coded.decode(3)).max() <= LARGEST * (1 + 2.0**-11)


def bad(**changes: Any) -> Coded:
    good = {"wire": "int4", "step": 0.5, "numbers": bytes(5)}
    return Coded(**good | changes)


REFUSED: list[tuple[Coded, str]] = [
    (bad(wire="int3"), "wire 'int3' is unknown; expected one of float32, float16, int8, int4, int2, sign"),
    (bad(wire=""), "wire '' is unknown"),
    (bad(wire="x" * 9000), "wire 'xxx"),
    (bad(step=-0.5), r"step is -0.5; expected a number from 0 to 5.0706e\+30"),
    (bad(step=float("nan")), "step is nan"),
    (bad(step=float("inf")), "step is inf"),
    (bad(step=np.nextafter(MAX_STEP, np.inf).item()), r"step is 5.0706024"),
    (bad(step=1), "step is 1; expected"),
    (bad(step=True), "step is True; expected"),
    (bad(step="0.5"), "step is '0.5'; expected"),
    (bad(step=None), "step is None; expected"),
    (bad(numbers=bytes(4)), "4 bytes came; expected 5"),
    (bad(numbers=bytes(6)), "6 bytes came; expected 5"),
    (bad(numbers=b""), "0 bytes came; expected 5"),
    (bad(numbers="abcde"), "str, no bytes came; expected 5"),
    (bad(numbers=None), "NoneType, no bytes came; expected 5"),
    (bad(wire="sign"), "5 bytes came; expected 2"),
    (bad(wire="float16"), "5 bytes came; expected 18"),
    (bad(wire="float32", numbers=bytes(35)), "35 bytes came; expected 36"),
    *[
        (bad(wire=wire, step=step, numbers=np.array([0.0] * 8 + [value], f"<f{size}").tobytes()), "a number is not finite")
        for wire, size in (("float32", 4), ("float16", 2))
        for value in (np.nan, np.inf, -np.inf)
        for step in (0.0, 1.0, MAX_STEP)
    ],
    (bad(wire="float32", step=1.0, numbers=np.full(9, 3e38, "<f4").tobytes()), r"a number is 3e\+38; at most 1.26765e\+30"),
    (bad(wire="float32", step=MAX_STEP, numbers=np.full(9, 3e38, "<f4").tobytes()), r"a number is 1.52118e\+69; at most"),
    (bad(wire="int8", step=1e29, numbers=bytes(9)), r"a number is 1.275e\+31; at most 1.26765e\+30"),
]  # fmt: skip


@pytest.mark.parametrize(("coded", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_numbers_that_did_not_come_of_encode(coded: Coded, reason: str) -> None:
    bad().check("the numbers", 9)  # the control
    with pytest.raises(ProtocolError, match=f"^the numbers: .*{reason}") as caught:
        coded.check("the numbers", 9)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@given(wire=st.sampled_from(list(BITS)), step=st.floats(), data=st.binary(max_size=70), count=st.integers(1, 40))
def test_any_numbers_are_refused_or_finite(wire: str, step: float, data: bytes, count: int) -> None:
    coded = Coded(wire, step, data)
    try:
        coded.check("the numbers", count)
    except ProtocolError:
        return
    assert np.abs(coded.decode(count)).max() <= 2 * LARGEST
