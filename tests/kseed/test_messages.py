"""Messages and their bytes: round trips, budgets, and no input that does anything but raise `ProtocolError`."""

import math
import pickle
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.support import laws
from tests.support.messages import EPS, NAMES, POSITIVE, SHORT

from fedkseed.errors import ProtocolError
from fedkseed.federation.objectives import SCALINGS
from fedkseed.kseed.messages import MAX_BYTES, TrainReply, TrainRequest, coefficients_digest
from fedkseed.kseed.rounding import PRECISIONS, Packed, Precision, pack
from fedkseed.noise.pool import SeedPool

Message = TrainRequest | TrainReply
CLASSES = (TrainRequest, TrainReply)
classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
precisions = pytest.mark.parametrize("precision", PRECISIONS)
LONG_NAME = "é" * 32  # 64 bytes


def request(precision: Precision = "float16", size: int = 5, steps: int = 3, client: str = "client-7") -> TrainRequest:
    coefficients = pack(1e-6 * np.random.default_rng(size).standard_normal(size), precision)
    return TrainRequest(
        run_id=b"run-id-8",
        server_round=3,
        attempt=1,
        client=client,
        pool=SeedPool(0x0123456789ABCDEF, size, "gaussian"),
        base=bytes(range(32)),
        coefficients=coefficients,
        digest=coefficients_digest(coefficients.unpack()),
        indices=tuple(t % size for t in range(steps)),
        lr=3e-7,
        eps=5e-4,
        batch_size=2,
        max_grad=1e4,
        loss_clip=None,
    )


def reply(precision: Precision = "float16", steps: int = 3, client: str = "client-7") -> TrainReply:
    grads = 1 + np.arange(steps, dtype=np.float64) % 1000
    grads[1:2] = 0
    return TrainReply(
        run_id=b"run-id-8",
        server_round=3,
        attempt=1,
        client=client,
        base=bytes(range(32)),
        digest=bytes(reversed(range(32))),
        num_examples=100,
        projected_grads=pack(grads, precision, 0),
        dropped=(1,) if steps > 1 else (),
        loss=2.5,
    )


def message(cls: type[Message], precision: Precision = "float16") -> Message:
    return request(precision) if cls is TrainRequest else reply(precision)


def fields_of(data: bytes) -> list[Any]:
    return msgpack.unpackb(data)


def with_field(data: bytes, at: int, value: Any) -> bytes:
    fields = fields_of(data)
    fields[at] = value
    return msgpack.packb(fields)


def refusal(cls: type[Message], data: Any) -> str:
    """The reason, which must be one short line."""
    with pytest.raises(ProtocolError) as caught:
        cls.decode(data)
    reason = str(caught.value)
    assert reason
    assert "\n" not in reason
    assert len(reason) <= SHORT
    return reason


def decoded_or_refused(cls: type[Message], data: bytes) -> Message | None:
    """What any bytes must come to: a valid message, or a `ProtocolError`. (A warning is an error in these tests.)"""
    try:
        found = cls.decode(data)
    except ProtocolError:
        return None
    assert type(found) is cls
    assert cls.decode(found.encode()) == found
    return found


# --- Round trips ---

LARGE = float(np.float32(1e38))


@st.composite
def requests(draw: st.DrawFn) -> TrainRequest:
    size = draw(st.integers(1, 300))
    values = draw(arrays(np.float32, size, elements=st.floats(-LARGE, LARGE, width=32)))
    coefficients = pack(values, draw(st.sampled_from(PRECISIONS)))
    directions = draw(st.integers(1, 3))
    indices = draw(st.lists(st.integers(0, size - 1), min_size=directions, max_size=40))
    return TrainRequest(
        run_id=draw(st.binary(min_size=8, max_size=8)),
        server_round=draw(st.integers(1, 2**31)),
        attempt=draw(st.integers(0, 255)),
        client=draw(NAMES),
        pool=SeedPool(draw(st.integers(0, 2**64 - 1)), size, draw(st.sampled_from(laws.FAMILIES))),
        base=draw(st.binary(min_size=32, max_size=32)),
        coefficients=coefficients,
        digest=coefficients_digest(coefficients.unpack()),
        indices=tuple(indices[: len(indices) // directions * directions]),
        lr=draw(POSITIVE),
        eps=draw(EPS),
        batch_size=draw(st.integers(1, 65535)),
        max_grad=draw(POSITIVE.filter(lambda x: x <= 65504)),
        loss_clip=draw(st.none() | POSITIVE),
        directions=directions,
        scaling=draw(st.none() | st.sampled_from(SCALINGS)),
    )


@st.composite
def replies(draw: st.DrawFn) -> TrainReply:
    steps = draw(st.integers(1, 40))
    values = draw(arrays(np.float32, steps, elements=st.floats(-60000, 60000, width=32)))
    return TrainReply(
        run_id=draw(st.binary(min_size=8, max_size=8)),
        server_round=draw(st.integers(1, 2**31)),
        attempt=draw(st.integers(0, 255)),
        client=draw(NAMES),
        base=draw(st.binary(min_size=32, max_size=32)),
        digest=draw(st.binary(min_size=32, max_size=32)),
        num_examples=draw(st.integers(1, 2**53)),
        projected_grads=pack(values, draw(st.sampled_from(PRECISIONS)), 0),
        dropped=tuple(sorted(draw(st.sets(st.integers(0, steps - 1))))),
        loss=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
    )


@settings(max_examples=60)
@given(requests())
def test_a_request_comes_back_from_its_bytes(sent: TrainRequest) -> None:
    data = sent.encode()
    arrived = TrainRequest.decode(data)
    assert arrived == sent
    assert arrived.encode() == data
    assert arrived.coefficients.unpack().tobytes() == sent.coefficients.unpack().tobytes()


@settings(max_examples=60)
@given(replies())
def test_a_reply_comes_back_from_its_bytes(sent: TrainReply) -> None:
    data = sent.encode()
    arrived = TrainReply.decode(data)
    assert arrived == sent
    assert arrived.encode() == data


@classes
@precisions
def test_the_largest_message_comes_back(cls: type[Message], precision: Precision) -> None:
    """K = 65,536 and 65,535 steps fit below the cap."""
    sent: Message = request(precision, 65536, 65535) if cls is TrainRequest else reply(precision, 65535)
    assert cls.decode(sent.encode()) == sent


@classes
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview], ids=lambda kind: kind.__name__)
def test_bytes_of_any_type_are_decoded_alike(cls: type[Message], kind: Callable[[bytes], Any]) -> None:
    assert cls.decode(kind(message(cls).encode())) == message(cls)


@classes
def test_messages_are_frozen(cls: type[Message]) -> None:
    with pytest.raises(FrozenInstanceError):
        message(cls).client = "x"  # type: ignore[misc]


def test_bytes_are_frozen() -> None:
    """An old client must understand a new server of the same version: positional fields, raw little-endian arrays."""
    numbers = np.array([0.5, -2.0], "<f4").tobytes()
    sent = TrainReply(b"12345678", 1, 0, "a", bytes(32), b"\1" * 32, 7, 1.5, pack(np.array([0.5, -2.0]), "float32"))
    head = b"\x9f" + b"\xa2k!" + b"\x01" + b"\x00" + b"\xc4\x0812345678" + b"\x01\x00\xa1a"
    tail = b"\x00\x00" + b"\xc4\x08" + numbers + b"\xc4\x00" + b"\xcb" + struct.pack(">d", 1.5)
    assert sent.encode() == head + b"\xc4\x20" + bytes(32) + b"\xc4\x20" + b"\1" * 32 + b"\x07" + tail


# --- Bytes ---


def worst_case(precision: Precision, size: int, steps: int) -> tuple[TrainRequest, TrainReply]:
    """Both messages of a client's round with the longest name, the largest integers and all optional fields."""
    coefficients = pack(1e-6 * np.random.default_rng(0).standard_normal(size), precision)
    down = replace(
        request(precision, size, steps, LONG_NAME),
        server_round=2**31,
        attempt=255,
        pool=SeedPool(2**64 - 1, size),
        coefficients=coefficients,
        digest=coefficients_digest(coefficients.unpack()),
        batch_size=65535,
        loss_clip=1.0,
    )
    up = replace(reply(precision, steps, LONG_NAME), server_round=2**31, attempt=255, num_examples=2**53, dropped=())
    return down, up


@pytest.mark.parametrize(
    ("size", "precision", "budget"),
    [
        (4096, "float32", 17_988),
        (4096, "float16", 17_988),
        (4096, "float16", 9_700),
        (1024, "float32", 9_796),
        (1024, "float16", 9_796),
        (1024, "float16", 3_700),
    ],
)
def test_the_bytes_of_a_round_keep_to_the_budget(size: int, precision: Precision, budget: int) -> None:
    """docs and DESIGN.md: both ways, headers included, tau = 200."""
    down, up = worst_case(precision, size, 200)
    assert len(down.client.encode()) == 64
    assert len(down.encode()) + len(up.encode()) <= budget


@precisions
def test_headers_take_at_most_400_bytes(precision: Precision) -> None:
    for size, steps in ((4096, 200), (1024, 200), (1, 1)):  # the budget is for 200 steps; longer arrays have longer lengths
        down, up = worst_case(precision, size, steps)
        payload = len(down.coefficients.numbers) + 2 * steps + len(up.projected_grads.numbers)
        assert len(down.encode()) + len(up.encode()) - payload <= 400


def test_dropped_steps_cost_two_bytes_each() -> None:
    none, all_of_them = reply(steps=200), replace(reply(steps=200), dropped=tuple(range(200)))
    assert len(all_of_them.encode()) - len(none.encode()) <= 2 * 199 + 2


# --- Damage ---


@classes
@precisions
def test_every_truncation_is_refused(cls: type[Message], precision: Precision) -> None:
    data = message(cls, precision).encode()
    for size in range(len(data)):
        refusal(cls, data[:size])


@classes
def test_what_follows_a_message_is_refused(cls: type[Message]) -> None:
    data = message(cls).encode()
    for extra in (b"\0", b"\xc0", data):
        refusal(cls, data + extra)


@classes
@precisions
def test_every_flipped_bit_is_noticed_or_refused(cls: type[Message], precision: Precision) -> None:
    original = message(cls, precision)
    data = original.encode()
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        assert decoded_or_refused(cls, bytes(flipped)) != original


@precisions
def test_every_flipped_bit_of_the_coefficients_is_refused(precision: Precision) -> None:
    sent = request(precision)
    data, numbers = sent.encode(), sent.coefficients.numbers
    start = data.index(numbers)
    for position in range(8 * start, 8 * (start + len(numbers))):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        assert "digest" in refusal(TrainRequest, bytes(flipped)) or "finite" in refusal(TrainRequest, bytes(flipped))


@classes
@settings(max_examples=120)
@given(data=st.binary(max_size=200))
def test_random_bytes_are_refused(cls: type[Message], data: bytes) -> None:
    refusal(cls, data)


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=70)
    | st.binary(max_size=70)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=20)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@classes
@settings(max_examples=120)
@given(data=st.data())
def test_anything_in_some_fields_is_decoded_or_refused(cls: type[Message], data: st.DataObject) -> None:
    fields = fields_of(message(cls).encode())
    for at in data.draw(st.sets(st.integers(0, len(fields) - 1), min_size=1, max_size=3)):
        fields[at] = data.draw(ANYTHING)
    decoded_or_refused(cls, msgpack.packb(fields))


# --- Versions, kinds, fields ---


@classes
@pytest.mark.parametrize("version", [0, 2, 3, -1, 255, 2**64 - 1])
def test_another_version_is_refused(cls: type[Message], version: int) -> None:
    reason = refusal(cls, with_field(message(cls).encode(), 1, version))
    assert str(version) in reason
    assert "version" in reason


def test_a_message_of_another_kind_is_refused() -> None:
    assert "not a reply" in refusal(TrainReply, request().encode())
    assert "not a request" in refusal(TrainRequest, reply().encode())
    assert "update kind is 1" in refusal(TrainReply, with_field(reply().encode(), 2, 1))


@classes
def test_another_number_of_fields_is_refused(cls: type[Message]) -> None:
    fields = fields_of(message(cls).encode())
    for other in (fields[:-1], [*fields, 2, 1, None], [*fields, *fields], fields[:2]):
        assert f"{len(other)} fields; expected {len(fields)}" in refusal(cls, msgpack.packb(other))


@pytest.mark.parametrize("value", [None, 0, 1, -2, 65536, 2.0, True, b"2", [2]], ids=str)
def test_one_more_field_of_a_request_is_two_or_more_directions(value: Any) -> None:
    fields = fields_of(replace(request(steps=6), directions=3).encode())
    assert fields[-1] == 3
    assert TrainRequest.decode(msgpack.packb(fields)).num_steps == 2
    assert "number of directions" in refusal(TrainRequest, msgpack.packb([*fields[:-1], value]))
    assert "expected whole steps" in refusal(TrainRequest, msgpack.packb([*fields[:-1], 4]))


@pytest.mark.parametrize("value", [None, -1, 3, 1.0, True, "ranks"], ids=str)
def test_two_more_fields_of_a_request_are_directions_and_scaling(value: Any) -> None:
    """One direction too; and nothing that says what is scored."""
    fields = fields_of(replace(request(steps=6), scaling="z-scores").encode())
    assert fields[-2:] == [1, 1]
    assert len(fields) == len(fields_of(request(steps=6).encode())) + 2
    assert TrainRequest.decode(msgpack.packb(fields)).scaling == "z-scores"
    assert "scaling is" in refusal(TrainRequest, msgpack.packb([*fields[:-1], value]))
    assert "number of directions" in refusal(TrainRequest, msgpack.packb([*fields[:-2], 0, 1]))


@classes
@pytest.mark.parametrize("value", [[], {}, None, 0, "k?", b"", [None], {0: 1}, [["k!", 1]], 1.5])
def test_msgpack_of_something_else_is_refused(cls: type[Message], value: Any) -> None:
    refusal(cls, msgpack.packb(value))


@classes
@pytest.mark.parametrize("value", [None, "bytes", 5, [1, 2], message(TrainReply)], ids=str)
def test_what_is_not_bytes_is_refused(cls: type[Message], value: Any) -> None:
    assert "expected bytes" in refusal(cls, value)


NONE = type(None)
TYPES: dict[type[Message], list[tuple[type, ...]]] = {
    TrainRequest: [
        *[(str,), (int,), (bytes,), (int,), (int,), (str,)],  # kind, version, run_id, server_round, attempt, client
        *[(int,), (int,), (int,), (bytes,)],  # key, size, family, base
        *[(int,), (int,), (bytes,), (bytes,), (bytes,)],  # precision, exponent, numbers, digest, indices
        *[(float,), (float,), (int,), (float,), (float, NONE)],  # lr, eps, batch_size, max_grad, loss_clip
    ],
    TrainReply: [
        *[(str,), (int,), (int,), (bytes,), (int,), (int,), (str,)],  # kind, version, kind of update, run_id, ...
        *[(bytes,), (bytes,), (int,)],  # base, digest, num_examples
        *[(int,), (int,), (bytes,), (bytes,), (float, NONE)],  # precision, exponent, numbers, dropped, loss
    ],
}
POSITIONS = [(cls, at) for cls in CLASSES for at in range(len(TYPES[cls]))]


@pytest.mark.parametrize(("cls", "at"), POSITIONS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_wrong_type_in_any_field_is_refused(cls: type[Message], at: int) -> None:
    data = message(cls).encode()
    original = fields_of(data)[at]
    assert len(fields_of(data)) == len(TYPES[cls])
    assert isinstance(original, TYPES[cls][at])
    values: list[Any] = [None, True, False, 0, 1, 1.0, 0.0, "x", "1", b"x", [], [1], {}, msgpack.ExtType(5, b"x")]
    if isinstance(original, (str, bytes)):
        values.append(original.decode("latin1") if isinstance(original, bytes) else original.encode())
    else:
        values += [str(original), [original], *([float(original)] if isinstance(original, int) else [])]
    accepted = []
    for value in values:
        if type(value) not in TYPES[cls][at]:
            try:
                refusal(cls, with_field(data, at, value))
            except pytest.fail.Exception:
                accepted.append(value)
    assert accepted == []


OUT_OF_RANGE: list[tuple[type[Message], int, list[Any], str]] = [
    (TrainRequest, 2, [b"", b"1234567", b"123456789"], "run_id"),
    (TrainRequest, 3, [0, -1, 2**31 + 1], "server_round"),
    (TrainRequest, 4, [-1, 256], "attempt"),
    (TrainRequest, 5, ["", "x" * 65, "é" * 33, "a\nb", "\0", "\x1b[2J", "\u202e", "\ue000"], "client name"),
    (TrainRequest, 6, [-1], "key"),
    (TrainRequest, 7, [0, -1, 65537, 2**63], "size"),
    (TrainRequest, 7, [4, 6, 65536], "coefficients"),
    (TrainRequest, 8, [-1, 2, 2**63], "family"),
    (TrainRequest, 9, [b"", bytes(31), bytes(33)], "base"),
    (TrainRequest, 10, [-1, 2], "precision"),
    (TrainRequest, 10, [0], "coefficients"),
    (TrainRequest, 11, [-161, 161, 2**40, -(2**60)], "exponent"),
    (TrainRequest, 11, [0], "digest"),
    (TrainRequest, 12, [b"", bytes(9), bytes(8), bytes(12)], "coefficients"),
    (TrainRequest, 12, [bytes(10)], "digest"),
    (TrainRequest, 12, [bytes(8) + b"\x00\x7c", bytes(8) + b"\xff\xff", b"\x00\xfc" + bytes(8)], "finite"),
    (TrainRequest, 13, [b"", bytes(31), bytes(33), bytes(32)], "digest"),
    (TrainRequest, 14, [b"", b"\0", b"\0\0\0", bytes(2 * 65536)], "indices|steps"),
    (TrainRequest, 14, [b"\5\0", b"\0\0\xff\xff"], "index"),
    (TrainRequest, 15, [0.0, -0.0, -1.0, math.inf, -math.inf, math.nan], "lr"),
    (TrainRequest, 16, [0.0, -1e-9, math.inf, math.nan, 9e-38, 1.1e37], "eps"),
    (TrainRequest, 17, [0, -1, 65536], "batch_size"),
    (TrainRequest, 18, [0.0, -1.0, math.inf, math.nan], "max_grad"),
    (TrainRequest, 19, [0.0, -1.0, math.inf, math.nan], "loss_clip"),
    (TrainReply, 3, [b"", bytes(7), bytes(9)], "run_id"),
    (TrainReply, 4, [0, 2**31 + 1], "server_round"),
    (TrainReply, 5, [-1, 256], "attempt"),
    (TrainReply, 6, ["", "x" * 65, "a\tb"], "client name"),
    (TrainReply, 7, [bytes(31)], "base"),
    (TrainReply, 8, [bytes(33)], "digest"),
    (TrainReply, 9, [0, -5, 2**53 + 1, 2**64 - 1], "num_examples"),
    (TrainReply, 10, [-1, 2], "precision"),
    (TrainReply, 11, [-161, 161], "exponent"),
    (TrainReply, 12, [b"", bytes(5), bytes(2 * 65536)], "projected_grads"),
    (TrainReply, 12, [bytes(4) + b"\x00\x7c", b"\x01\x7e" + bytes(4)], "finite"),
    (TrainReply, 13, [b"\0", b"\3\0", b"\0\0\0\0", b"\2\0\1\0", b"\0\0\xff\xff"], "dropped"),
    (TrainReply, 14, [math.nan, math.inf, -math.inf], "loss"),
]


@pytest.mark.parametrize(("cls", "at", "values", "text"), OUT_OF_RANGE, ids=lambda x: x if isinstance(x, str) else "")
def test_a_field_out_of_range_is_refused(cls: type[Message], at: int, values: list[Any], text: str) -> None:
    for value in values:
        reason = refusal(cls, with_field(message(cls).encode(), at, value))
        assert any(word in reason for word in text.split("|")), (value, reason)


def test_float32_overflow_behind_the_scale_is_refused() -> None:
    """float16 numbers under a large power of two would unpack to infinity."""
    for at, cls in ((11, TrainRequest), (11, TrainReply)):
        fields = fields_of(message(cls).encode())
        fields[at], fields[12] = 160, np.full(len(fields[12]) // 2, 30000, "<f2").tobytes()
        assert "finite" in refusal(cls, msgpack.packb(fields))


DIRECT: list[tuple[Callable[[], Message], str]] = [
    (lambda: replace(request(), digest=bytes(32)), "digest"),
    (lambda: replace(request(), indices=()), "steps"),
    (lambda: replace(request(), eps=1e50), r"eps is 1e\+50; expected a number from 1e-37 to 1e\+37"),
    (lambda: replace(request(), indices=(0, 5)), "index"),
    (lambda: replace(request(), indices=(0, -1)), "index"),
    (lambda: replace(request(), pool=SeedPool(1, 6)), "coefficients"),
    (lambda: replace(request(), client="x" * 65), "client name"),
    (lambda: replace(request(), client="\ud800"), "client name"),
    (lambda: replace(request(), lr=math.nan), "lr"),
    (lambda: replace(request(), coefficients=Packed("bfloat16", 0, bytes(10))), "precision"),  # type: ignore[arg-type]
    (lambda: replace(reply(), dropped=(3,)), "dropped"),
    (lambda: replace(reply(), dropped=(1, 1)), "dropped"),
    (lambda: replace(reply(), dropped=(2, 0)), "dropped"),
    (lambda: replace(reply(), dropped=(-1,)), "dropped"),
    (lambda: replace(reply(), num_examples=0), "num_examples"),
    (lambda: replace(reply(), projected_grads=Packed("float16", 0, b"")), "projected_grads"),
    (lambda: replace(reply(), loss=math.nan), "loss"),
]


@pytest.mark.parametrize(("build", "text"), DIRECT, ids=[f"{i}-{text}" for i, (_, text) in enumerate(DIRECT)])
def test_messages_are_validated_when_made(build: Callable[[], Message], text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        build()


# --- Hostile bytes ---


def head(cls: type[Message]) -> bytes:
    """The first bytes of a message, up to and with its version."""
    fields = fields_of(message(cls).encode())
    return b"\xdc" + struct.pack(">H", len(fields)) + msgpack.packb(fields[0]) + b"\x01"


@classes
@pytest.mark.parametrize("depth", [2, 100, 400, 700, 950, 1000, 1020, 5000, 500_000])
def test_deep_nesting_is_refused(cls: type[Message], depth: int) -> None:
    """In every place where a list can stand, as deep as msgpack's own stack and beyond."""
    nested = b"\x91" * depth + b"\xc0"
    refusal(cls, nested)
    count = len(fields_of(message(cls).encode()))
    refusal(cls, b"\x92" + msgpack.packb(fields_of(message(cls).encode())[0]) + nested)  # as version
    for at in range(2, count):
        fields = [msgpack.packb(value) for value in fields_of(message(cls).encode())]
        fields[at] = nested
        refusal(cls, b"\xdc" + struct.pack(">H", count) + b"".join(fields))


@classes
def test_declared_lengths_are_not_believed(cls: type[Message]) -> None:
    for opening in (b"\xdd", b"\xdf", b"\xdb", b"\xc6"):  # array, map, str, bin of 2^32 - 1
        refusal(cls, opening + b"\xff" * 4)
        refusal(cls, head(cls) + opening + b"\xff" * 4)
    refusal(cls, head(cls) + b"\xc9\xff\xff\xff\xff\x05")  # ext


@classes
def test_declared_lengths_cost_no_memory(cls: type[Message]) -> None:
    """A message below the cap, of arrays in arrays that each declare as many elements as there are bytes."""
    size = MAX_BYTES - 5000
    data = (b"\xdd" + struct.pack(">I", size)) * 1000 + b"\xc0" * (size - 5000)
    assert len(data) <= MAX_BYTES
    tracemalloc.start()
    try:
        began = time.perf_counter()
        refusal(cls, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 64 * MAX_BYTES
    assert time.perf_counter() - began < 5


@classes
def test_more_bytes_than_the_cap_are_refused(cls: type[Message]) -> None:
    data = head(cls) + b"\xc6" + struct.pack(">I", MAX_BYTES) + bytes(MAX_BYTES)
    assert f"at most {MAX_BYTES}" in refusal(cls, data)
    assert "at most" not in refusal(cls, data[:MAX_BYTES])


@classes
def test_long_values_are_not_repeated_in_the_reason(cls: type[Message]) -> None:
    data = message(cls).encode()
    for at in range(len(fields_of(data))):
        for value in ("v" * 500_000, bytes(500_000), list(range(50_000)), 2**64 - 1, "a\nb\r\n" * 100):
            if decoded_or_refused(cls, with_field(data, at, value)) is None:
                refusal(cls, with_field(data, at, value))


class Touch:
    """Unpickling one of these creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


@classes
def test_decoding_executes_nothing(cls: type[Message], tmp_path: Path) -> None:
    pickled = pickle.dumps(Touch(tmp_path / "touched"))
    refusal(cls, pickled)
    data = message(cls).encode()
    for at in range(len(fields_of(data))):
        for value in (pickled, *[msgpack.ExtType(code, pickled) for code in (0, 1, 80, 127)], {"__reduce__": pickled}):
            decoded_or_refused(cls, with_field(data, at, value))  # in an array of numbers it may even be numbers
    assert not (tmp_path / "touched").exists()
    pickle.loads(pickled).close()  # the control: this is what must not happen
    assert (tmp_path / "touched").exists()


@classes
@pytest.mark.parametrize("size", [0, 1, 4, 8, 12, 16])
@pytest.mark.parametrize("code", [-128, -2, -1, 0, 127])
def test_extension_types_are_refused(cls: type[Message], code: int, size: int) -> None:
    """Time stamps (code -1) too, which msgpack would make objects of."""
    ext = b"\xc7" + struct.pack("Bb", size, code) + b"\xff" * size
    refusal(cls, ext)
    fields = [msgpack.packb(value) for value in fields_of(message(cls).encode())]
    for at in range(len(fields)):
        changed = [*fields[:at], ext, *fields[at + 1 :]]
        refusal(cls, b"\xdc" + struct.pack(">H", len(fields)) + b"".join(changed))


@classes
def test_invalid_utf8_is_refused(cls: type[Message]) -> None:
    data = message(cls).encode()
    assert refusal(cls, data.replace(b"client-7", b"client\xff7"))
    assert refusal(cls, data.replace(b"client-7", b"cli\xed\xa0\x80-7"))  # a lone surrogate
