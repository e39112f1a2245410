"""Messages of changes: round trips, frozen bytes, and no input that does anything but raise `ProtocolError`."""

import math
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.support.messages import EPS, NAMES, POSITIVE, SHORT

from fedkseed.errors import ProtocolError
from fedkseed.federation.envelope import MAX_NUMBERS
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.kseed.change_messages import (
    BASES,
    CHANGE,
    MAX_BYTES,
    MAX_PAGES,
    MAX_PARTS,
    MAX_REPLY_BYTES,
    MOVEMENTS,
    SCALARS,
    WIRES,
    ChangeReply,
    ChangeRequest,
    Patch,
)
from fedkseed.kseed.coding import Coded, coded_bytes, encode

Message = ChangeRequest | ChangeReply
CLASSES = (ChangeRequest, ChangeReply)
classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
wires = pytest.mark.parametrize("wire", WIRES)


def numbers(size: int, wire: str, seed: int = 0) -> Coded:
    return encode(1e-3 * np.random.default_rng(seed).standard_normal(size), wire)


def request(wire: str = "int4", size: int = 128, client: str = "client-7", pages: tuple[int, ...] = (1, 2)) -> ChangeRequest:
    patches = [Patch(70 + i, i, tuple(numbers(size, wire, i + j) for j in range(n))) for i, n in enumerate(pages)]
    return ChangeRequest(
        run_id=b"run-id-8", server_round=3, attempt=1, client=client, base=bytes(range(32)), digest=bytes(reversed(range(32))),
        lr=3e-7, batch_size=2, size=size, family="hadamard", basis="table", movement="proportional", wire=wire, have=4,
        patches=tuple(patches), steps=5, measure="two-point", optimizer="adam", eps=5e-4, max_grad=1e4, loss_clip=None,
    )  # fmt: skip


def reply(wire: str = "int4", size: int = 128, client: str = "client-7", steps: int = 5) -> ChangeReply:
    return ChangeReply(
        run_id=b"run-id-8", server_round=3, attempt=1, client=client, base=bytes(range(32)), digest=bytes(reversed(range(32))),
        num_examples=100, loss=2.5, kind=CHANGE, steps=steps, numbers=numbers(size, wire), dropped=(1, 3) if steps > 3 else (),
    )  # fmt: skip


def scalars(steps: int = 5) -> ChangeReply:
    return replace(reply(steps=steps), kind=SCALARS, numbers=Coded("float16", 1.0, np.arange(steps, dtype="<f2").tobytes()))


def message(cls: type[Message]) -> Message:
    return request() if cls is ChangeRequest else reply()


def with_field(data: bytes, at: int, value: Any) -> bytes:
    fields = msgpack.unpackb(data)
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


@st.composite
def coded(draw: st.DrawFn, size: int, wire: str) -> Coded:
    return encode(draw(arrays(np.float64, size, elements=st.floats(-1e30, 1e30))), wire)


@st.composite
def requests(draw: st.DrawFn) -> ChangeRequest:
    wire, basis = draw(st.sampled_from(WIRES)), draw(st.sampled_from(BASES))
    size = draw(st.sampled_from([128, 256]) if basis == "table" else st.integers(1, 70))
    family = "hadamard" if basis == "table" else draw(st.sampled_from(["hadamard", "gaussian"]))
    part = draw(coded(size, wire))
    patches = st.builds(
        Patch, st.integers(0, 2**64 - 1), st.integers(0, MAX_PARTS), st.integers(0, 3).map(lambda n: (part,) * n)
    )
    return ChangeRequest(
        run_id=draw(st.binary(min_size=8, max_size=8)),
        server_round=draw(st.integers(1, 2**31)),
        attempt=draw(st.integers(0, 255)),
        client=draw(NAMES),
        base=draw(st.binary(min_size=32, max_size=32)),
        digest=draw(st.binary(min_size=32, max_size=32)),
        lr=draw(POSITIVE),
        batch_size=draw(st.integers(1, 65535)),
        size=size,
        family=family,
        basis=basis,
        movement=draw(st.sampled_from(MOVEMENTS)),
        wire=wire,
        have=draw(st.integers(0, min(MAX_PAGES, MAX_NUMBERS // size - 4))),
        patches=tuple(draw(st.lists(patches, min_size=1, max_size=4))),
        steps=draw(st.integers(1, 65535)),
        measure=draw(st.sampled_from(["gradient", "two-point"])),
        optimizer=draw(st.sampled_from(list(OPTIMIZERS))),
        eps=draw(EPS),
        max_grad=draw(POSITIVE.filter(lambda x: x <= 65504)),
        loss_clip=draw(st.none() | POSITIVE),
    )


@st.composite
def replies(draw: st.DrawFn) -> ChangeReply:
    steps, kind = draw(st.integers(1, 40)), draw(st.sampled_from([CHANGE, SCALARS]))
    wire = draw(st.sampled_from(WIRES))
    return ChangeReply(
        run_id=draw(st.binary(min_size=8, max_size=8)),
        server_round=draw(st.integers(1, 2**31)),
        attempt=draw(st.integers(0, 255)),
        client=draw(NAMES),
        base=draw(st.binary(min_size=32, max_size=32)),
        digest=draw(st.binary(min_size=32, max_size=32)),
        num_examples=draw(st.integers(1, 2**53)),
        loss=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        kind=kind,
        steps=steps,
        numbers=draw(coded(steps if kind == SCALARS else draw(st.integers(1, 90)), wire)),
        dropped=tuple(sorted(draw(st.sets(st.integers(0, steps - 1))))),
    )


@given(requests())
def test_a_request_comes_back_from_its_bytes(sent: ChangeRequest) -> None:
    data = sent.encode()
    arrived = ChangeRequest.decode(data)
    assert arrived == sent
    assert arrived.encode() == data


@given(replies())
def test_a_reply_comes_back_from_its_bytes(sent: ChangeReply) -> None:
    data = sent.encode()
    arrived = ChangeReply.decode(data)
    assert arrived == sent
    assert arrived.encode() == data


@wires
def test_the_largest_page_and_reply_come_back(wire: str) -> None:
    """K = 65,536."""
    for sent in (request(wire, 65536), reply(wire, 65536, steps=65535)):
        assert type(sent).decode(sent.encode()) == sent


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
    head = b"\xc4\x0812345678" + b"\x01\x00\xa1a" + b"\xc4\x20" + bytes(32) + b"\xc4\x20" + b"\1" * 32
    up = ChangeReply(b"12345678", 1, 0, "a", bytes(32), b"\1" * 32, 7, 1.5, CHANGE, 3, Coded("sign", 0.5, b"\xa0"), (1,))
    fields = b"\x07\xcb" + struct.pack(">d", 1.5) + b"\x00\x03" + b"\x05\xcb" + struct.pack(">d", 0.5) + b"\xc4\x01\xa0"
    assert up.encode() == b"\xdc\x00\x10" + b"\xa2c!\x01" + head + fields + b"\xc4\x02\x01\x00"
    down = ChangeRequest(
        b"12345678", 1, 0, "a", bytes(32), b"\1" * 32, 0.5, 2, 3, "gaussian", "coefficients", "proportional", "int2", 1,
        (Patch(9, 0, ()), Patch(258, 1, (Coded("int2", 0.5, b"\x1b"),))), 4, "two-point", "momentum", 0.25, 8.0, None,
    )  # fmt: skip
    about = b"\xcb" + struct.pack(">d", 0.5) + b"\x02\x03\x01" + b"\x01\x01\x04\x01"
    pages = b"\xc4\x10" + struct.pack("<QQ", 9, 258) + b"\xc4\x08" + struct.pack("<HHHH", 0, 0, 1, 1)
    parts = b"\xc4\x04" + struct.pack("<f", 0.5) + b"\xc4\x01\x1b"
    rest = b"\x04\x01\x01" + b"\xcb" + struct.pack(">d", 0.25) + b"\xcb" + struct.pack(">d", 8.0) + b"\xc0"
    assert down.encode() == b"\xdc\x00\x1a" + b"\xa2c?\x01" + head + about + pages + parts + rest


@pytest.mark.parametrize(
    ("size", "wire", "budget"),
    [(4096, "float16", 17_988), (65536, "sign", 17_988), (4096, "int8", 9_000), (4096, "sign", 1_600), (32768, "int2", 17_988)],
)
def test_the_bytes_of_a_round_keep_to_the_budget(size: int, wire: str, budget: int) -> None:
    """Issue 15: both ways, headers included, for a client that was there in the last round."""
    down = request(wire, size, "é" * 32, pages=(1,))
    up = reply(wire, size, "é" * 32)
    assert len(down.encode()) + len(up.encode()) <= budget
    assert len(down.encode()) + len(up.encode()) - 2 * coded_bytes(size, wire) <= 420


# --- Damage ---


@classes
def test_every_truncation_is_refused(cls: type[Message]) -> None:
    data = message(cls).encode()
    for size in range(len(data)):
        refusal(cls, data[:size])


@classes
def test_what_follows_a_message_is_refused(cls: type[Message]) -> None:
    data = message(cls).encode()
    for extra in (b"\0", b"\xc0", data):
        refusal(cls, data + extra)


@classes
def test_every_flipped_bit_is_noticed_or_refused(cls: type[Message]) -> None:
    original = message(cls)
    data = original.encode()
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        assert decoded_or_refused(cls, bytes(flipped)) != original


@classes
@settings(max_examples=60)
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
    fields = msgpack.unpackb(message(cls).encode())
    for at in data.draw(st.sets(st.integers(0, len(fields) - 1), min_size=1, max_size=3)):
        fields[at] = data.draw(ANYTHING)
    decoded_or_refused(cls, msgpack.packb(fields))


@settings(max_examples=120)
@given(data=st.data())
def test_any_bytes_in_the_arrays(data: st.DataObject) -> None:
    """Of a request: keys, counts, steps, numbers, each of any length."""
    fields = msgpack.unpackb(request("float32", pages=(1,)).encode())
    for at in data.draw(st.sets(st.integers(16, 19), min_size=1)):
        fields[at] = data.draw(st.binary(max_size=600))
    decoded_or_refused(ChangeRequest, msgpack.packb(fields))


# --- Versions, kinds, fields ---


@classes
@pytest.mark.parametrize("version", [0, 2, -1, 2**64 - 1])
def test_another_version_is_refused(cls: type[Message], version: int) -> None:
    reason = refusal(cls, with_field(message(cls).encode(), 1, version))
    assert str(version) in reason
    assert "version" in reason


def test_a_message_of_another_kind_is_refused() -> None:
    from fedkseed.kseed.messages import TrainReply, TrainRequest

    assert "not a reply" in refusal(ChangeReply, request().encode())
    assert "not a request" in refusal(ChangeRequest, reply().encode())
    for other, data in ((TrainRequest, request().encode()), (TrainReply, reply().encode())):
        with pytest.raises(ProtocolError, match="expected its kind as first field"):
            other.decode(data)


@classes
def test_another_number_of_fields_is_refused(cls: type[Message]) -> None:
    fields = msgpack.unpackb(message(cls).encode())
    for other in (fields[:-1], [*fields, None], fields[:2]):
        assert f"{len(other)} fields; expected {len(fields)}" in refusal(cls, msgpack.packb(other))


@classes
@pytest.mark.parametrize("value", [[], {}, None, 0, "c?", b"", [None], {0: 1}, [["c!", 1]], 1.5])
def test_msgpack_of_something_else_is_refused(cls: type[Message], value: Any) -> None:
    refusal(cls, msgpack.packb(value))


NONE = type(None)
HEAD: list[tuple[type, ...]] = [(str,), (int,), (bytes,), (int,), (int,), (str,), (bytes,), (bytes,)]
TYPES: dict[type[Message], list[tuple[type, ...]]] = {
    ChangeRequest: [
        *HEAD,
        *[(float,), (int,), (int,), (int,), (int,), (int,), (int,), (int,)],  # lr, batch, size, family, basis, ..., have
        *[(bytes,), (bytes,), (bytes,), (bytes,)],  # keys, counts, steps, numbers
        *[(int,), (int,), (int,), (float,), (float,), (float, NONE)],  # steps, measure, optimizer, eps, max_grad, loss_clip
    ],
    ChangeReply: [
        *HEAD,
        *[(int,), (float, NONE), (int,), (int,), (int,), (float,), (bytes,), (bytes,)],
    ],
}
POSITIONS = [(cls, at) for cls in CLASSES for at in range(len(TYPES[cls]))]


@pytest.mark.parametrize(("cls", "at"), POSITIONS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_wrong_type_in_any_field_is_refused(cls: type[Message], at: int) -> None:
    data = message(cls).encode()
    original = msgpack.unpackb(data)[at]
    assert len(msgpack.unpackb(data)) == len(TYPES[cls])
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


PART = coded_bytes(128, "int4")
OUT_OF_RANGE: list[tuple[type[Message], int, list[Any], str]] = [
    (ChangeRequest, 2, [b"", b"1234567", b"123456789"], "run_id"),
    (ChangeRequest, 3, [0, -1, 2**31 + 1], "server_round"),
    (ChangeRequest, 4, [-1, 256], "attempt"),
    (ChangeRequest, 5, ["", "x" * 65, "a\nb", "\0", "\x1b[2J"], "client name"),
    (ChangeRequest, 6, [b"", bytes(31), bytes(33)], "base"),
    (ChangeRequest, 7, [b"", bytes(31), bytes(33)], "digest"),
    (ChangeRequest, 8, [0.0, -1.0, math.inf, math.nan], "lr"),
    (ChangeRequest, 9, [0, -1, 65536], "batch_size"),
    (ChangeRequest, 10, [0, -1, 65537, 2**63], "pool size"),
    (ChangeRequest, 10, [4, 64, 127, 129, 256, 65536], "parts|table"),
    (ChangeRequest, 11, [-1, 2, 2**63], "family"),
    (ChangeRequest, 11, [1], "128 gaussian seeds have no table of as many numbers"),
    (ChangeRequest, 12, [-1, 2], "basis"),
    (ChangeRequest, 13, [-1, 2], "movement"),
    (ChangeRequest, 14, [-1, 6], "wire"),
    (ChangeRequest, 14, [0, 1, 2, 4, 5], "parts"),
    (ChangeRequest, 15, [-1, 65536, 2**40], "pages that the client has"),
    (ChangeRequest, 16, [b"", b"\0" * 7, b"\0" * 8, b"\0" * 24], "pages|keys"),
    (
        ChangeRequest,
        17,
        [b"", b"\0", b"\0" * 8, struct.pack("<4H", 0, 1, 1, 3), struct.pack("<6H", 0, 1, 1, 2, 0, 0)],
        "parts|pages",
    ),
    (ChangeRequest, 18, [b"", b"\0" * 11, b"\0" * 8, b"\0" * 16], "steps|parts"),
    (ChangeRequest, 18, [struct.pack("<3f", 0.5, x, 0.5) for x in (math.nan, math.inf, -1.0, 1e31)], "a page's part: step"),
    (ChangeRequest, 19, [b"", bytes(3 * PART - 1), bytes(3 * PART + 1), bytes(4 * PART)], "parts"),
    (ChangeRequest, 20, [0, -1, 65536], "number of steps"),
    (ChangeRequest, 21, [-1, 2], "measure"),
    (ChangeRequest, 22, [-1, 4], "optimizer"),
    (ChangeRequest, 23, [0.0, -1e-9, math.inf, math.nan, 9e-38, 1.1e37], "eps"),
    (ChangeRequest, 24, [0.0, -1.0, math.inf, math.nan, 65505.0], "max_grad"),
    (ChangeRequest, 25, [0.0, -1.0, math.inf, math.nan], "loss_clip"),
    (ChangeReply, 2, [b"", bytes(7), bytes(9)], "run_id"),
    (ChangeReply, 3, [0, 2**31 + 1], "server_round"),
    (ChangeReply, 4, [-1, 256], "attempt"),
    (ChangeReply, 5, ["", "x" * 65, "a\tb"], "client name"),
    (ChangeReply, 6, [bytes(31)], "base"),
    (ChangeReply, 7, [bytes(33)], "digest"),
    (ChangeReply, 8, [0, -5, 2**53 + 1, 2**64 - 1], "num_examples"),
    (ChangeReply, 9, [math.nan, math.inf, -math.inf], "loss"),
    (ChangeReply, 10, [-1, 2, 2**63], "kind"),
    (ChangeReply, 10, [1], "projected gradients: 64 bytes came; expected 3"),
    (ChangeReply, 11, [0, -1, 65536], "number of steps"),
    (ChangeReply, 12, [-1, 6], "wire"),
    (ChangeReply, 13, [math.nan, math.inf, -math.inf], "step of the numbers"),
    (ChangeReply, 15, [b"\0", b"\5\0", b"\0\0\0\0", b"\2\0\1\0", b"\0\0\xff\xff"], "dropped"),
]


@pytest.mark.parametrize(("cls", "at", "values", "text"), OUT_OF_RANGE, ids=lambda x: x if isinstance(x, str) else "")
def test_a_field_out_of_range_is_refused(cls: type[Message], at: int, values: list[Any], text: str) -> None:
    for value in values:
        reason = refusal(cls, with_field(message(cls).encode(), at, value))
        assert any(word in reason for word in text.split("|")), (value, reason)


def test_a_part_that_is_not_finite_is_refused() -> None:
    for wire, size in (("float32", 4), ("float16", 2)):
        sent = request(wire, pages=(1,))
        for value in (math.nan, math.inf):
            data = with_field(sent.encode(), 19, np.array([0.0] * 127 + [value], f"<f{size}").tobytes())
            assert "a page's part: a number is not finite" in refusal(ChangeRequest, data)


DIRECT: list[tuple[Callable[[], Message], str]] = [
    (lambda: replace(request(), patches=()), "number of pages is 0"),
    (lambda: replace(request(), patches=(Patch(1, -1, ()),)), "first part is -1"),
    (lambda: replace(request(), patches=(Patch(1, 65536, ()),)), "first part is 65536"),
    (lambda: replace(request(), patches=(Patch(1, 0, (numbers(128, "int4"),) * 65536),)), "number of parts is 65536"),
    (lambda: replace(request(), patches=(Patch(1, 0, (numbers(64, "int4"),)),)), "a page's part: 32 bytes came; expected 64"),
    (lambda: replace(request(), size=100, patches=(Patch(1, 0, ()),)), "100 hadamard seeds have no table of as many numbers"),
    (lambda: replace(request(), size=64, patches=(Patch(1, 0, ()),)), "64 hadamard seeds have no table of as many numbers"),
    (lambda: replace(request(), family="gaussian"), "128 gaussian seeds have no table"),
    (lambda: replace(request(), eps=1e-50), r"eps is 1e-50; expected a number from 1e-37 to 1e\+37"),
    (lambda: replace(request(), max_grad=65505.0), "max_grad is 65505.0; expected at most 65504"),
    (lambda: replace(request(), client="\ud800"), "client name"),
    (lambda: replace(reply(), kind=2), "kind is 2"),
    (lambda: replace(reply(), dropped=(5,)), "dropped step is 5"),
    (lambda: replace(reply(), dropped=(1, 1)), "dropped step 1 is followed by 1"),
    (lambda: replace(reply(), numbers=Coded("int3", 1.0, b"")), "wire is 'int3'; expected one of float32"),
    (lambda: replace(scalars(), steps=6), "projected gradients: 10 bytes came; expected 12"),
    (lambda: replace(scalars(), numbers=Coded("float16", 1.0, b"\x00\x7c" * 5)), "projected gradients: a number is not finite"),
]


@pytest.mark.parametrize(("build", "text"), DIRECT, ids=[f"{i}-{text[:30]}" for i, (_, text) in enumerate(DIRECT)])
def test_messages_are_validated_when_made(build: Callable[[], Message], text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        build()


# --- Hostile bytes ---


def refused_cheaply(cls: type[Message], data: bytes, most: float) -> str:
    tracemalloc.start()
    try:
        began = time.perf_counter()
        reason = refusal(cls, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= most, peak
    assert time.perf_counter() - began < 5
    return reason


def test_pages_and_parts_that_are_claimed_cost_no_memory() -> None:
    """Refused by their numbers, before as many objects are made as they say; the message itself is copied once or twice."""
    fields = msgpack.unpackb(request("sign", pages=(1,)).encode())
    many, each = 2_000_000, coded_bytes(1, "sign")
    claims: list[tuple[dict[int, Any], str]] = [
        ({16: bytes(8 * many), 17: bytes(4 * many)}, "number of pages is 2000000; expected an integer from 1 to 65535"),
        ({16: bytes(8 * 65536), 17: bytes(4 * 65536)}, "number of pages is 65536"),
        ({17: struct.pack("<2H", 0, 65535)}, "1 pages came with 1 parts; expected numbers for as many as they say"),
        (
            {
                10: 1,
                12: 1,
                16: bytes(8 * 32),
                17: struct.pack("<2H", 0, 62500) * 32,
                18: bytes(4 * many),
                19: bytes(each * many),
            },
            "number of parts is 2000000; expected an integer from 0 to 65535",
        ),
    ]
    for changes, expected in claims:
        data = msgpack.packb([changes.get(at, value) for at, value in enumerate(fields)])
        assert expected in refused_cheaply(ChangeRequest, data, 4 * len(data) + 2_000_000)


@classes
def test_declared_lengths_are_not_believed(cls: type[Message]) -> None:
    fields = msgpack.unpackb(message(cls).encode())
    head = b"\xdc" + struct.pack(">H", len(fields)) + msgpack.packb(fields[0]) + b"\x01"
    for opening in (b"\xdd", b"\xdf", b"\xdb", b"\xc6"):  # array, map, str, bin of 2^32 - 1
        for data in (opening + b"\xff" * 4, head + opening + b"\xff" * 4):
            refused_cheaply(cls, data, 1_000_000)
    refusal(cls, head + b"\xc9\xff\xff\xff\xff\x05")  # ext


@classes
@pytest.mark.parametrize("depth", [2, 400, 1020, 500_000])
def test_deep_nesting_is_refused(cls: type[Message], depth: int) -> None:
    nested = b"\x91" * depth + b"\xc0"
    refusal(cls, nested)
    count = len(msgpack.unpackb(message(cls).encode()))
    for at in range(1, count):
        fields = [msgpack.packb(value) for value in msgpack.unpackb(message(cls).encode())]
        fields[at] = nested
        refusal(cls, b"\xdc" + struct.pack(">H", count) + b"".join(fields))


@classes
def test_more_bytes_than_the_cap_are_refused(cls: type[Message]) -> None:
    most = MAX_BYTES if cls is ChangeRequest else MAX_REPLY_BYTES
    assert f"message has {most + 1} bytes; at most {most} are accepted" in refusal(cls, bytes(most + 1))


def test_the_largest_reply_is_below_the_cap() -> None:
    largest = replace(reply("float32", 65536, "n" * 64, steps=65535), dropped=tuple(range(65535)))
    assert len(largest.encode()) < MAX_REPLY_BYTES
    assert ChangeReply.decode(largest.encode()) == largest


def test_pages_that_would_fill_the_memory_are_refused() -> None:
    """An empty page is ten bytes of a message, and a quarter of a megabyte at a client."""
    whole = request("sign", 65536, pages=(1,) * 252)
    assert ChangeRequest.decode(whole.encode()) == whole  # with the four that the client has
    with pytest.raises(ProtocolError, match=r"^257 pages hold 16,842,752 numbers; a ledger has at most 16,777,216$"):
        request("sign", 65536, pages=(0,) * 253)


@classes
def test_long_values_are_not_repeated_in_the_reason(cls: type[Message]) -> None:
    data = message(cls).encode()
    for at in range(len(msgpack.unpackb(data))):
        for value in ("v" * 50_000, bytes(50_000), list(range(5_000)), 2**64 - 1, "a\nb\r\n" * 100):
            if decoded_or_refused(cls, with_field(data, at, value)) is None:
                refusal(cls, with_field(data, at, value))
