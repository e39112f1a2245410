"""Messages and files with something changed: bits, bytes, fields, numbers within fields; repeatable by a seed."""

import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import msgpack

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 255, 256, 65535, 65536, 2**31, 2**53, 2**53 + 1, 2**63, 2**64 - 1, -(2**63),
    0.0, -0.0, 0.5, 1.0, 5e-324, 1e-310, 1e-37, 1e37, 1e300, float("inf"), -float("inf"), float("nan"),
    "", "a", "bob", " ada", "ada ", "é" * 33, "a" * 65, "\u202eada", "a\x00", "\u0430", "\ufb01",
    b"", b"\x00", bytes(8), bytes(32), b"\xff" * 32, [], [0], [[[]]], {}, {"a": 1},
)  # fmt: skip
PATTERNS = (
    *(
        struct.pack(kind, value)
        for kind in ("<e", "<f", "<d")
        for value in (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 60000.0, 65504.0)
    ),
    *(struct.pack("<f", 1e-45), struct.pack("<f", 3e38), struct.pack("<d", 1e300)),
    *(b"\xff" * 2, b"\xff" * 4, b"\xff" * 8, bytes(8)),
)
Change = Callable[[random.Random, bytes, Sequence[bytes]], bytes]


def bits(draw: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        at = draw.randrange(8 * len(changed))
        changed[at // 8] ^= 1 << at % 8
    return bytes(changed)


def slices(draw: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """A stretch that is gone, there twice, or of another message; or an end that is cut or too long."""
    a, b = sorted(draw.randrange(len(data) + 1) for _ in range(2))
    other = draw.choice(corpus)
    at = draw.randrange(len(other) + 1)
    return draw.choice(
        (
            data[:a] + data[b:],
            data[:b] + data[a:],
            data[:a] + other[at : at + b - a] + data[b:],
            data[:a],
            data + draw.randbytes(draw.randrange(1, 9)),
            data[:a] + draw.randbytes(draw.randrange(1, 9)) + data[a:],
            data[:a] + draw.choice(PATTERNS) + data[b:],
        )
    )


def numbers(draw: random.Random, data: bytes) -> bytes:
    """Raw numbers, some of which are odd ones; or too few, or too many."""
    pattern = draw.choice(PATTERNS)
    at = draw.randrange(0, max(1, len(data)), len(pattern))
    return draw.choice((data[:at] + pattern + data[at + len(pattern) :], data[:at], data + pattern, pattern * (len(data) // 2)))


def fields(draw: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """A msgpack message with another value in a field or two, packed in the shortest form as ours are, or not."""
    found, others = msgpack.unpackb(data), msgpack.unpackb(draw.choice(corpus))
    for _ in range(draw.choice((1, 1, 1, 2))):
        at = draw.randrange(len(found)) if found else 0
        what = draw.randrange(8)
        if what == 0:
            found.insert(at, draw.choice(ODD))
        elif what == 1:
            del found[at : at + 1]
        elif what == 2:
            found[at : at + 1] = others[at : at + 1]
        elif what == 3 and found:
            found[at] = found[draw.randrange(len(found))]
        elif found and isinstance(found[at], bytes):
            found[at] = numbers(draw, found[at])
        elif found and type(found[at]) in (int, float) and draw.random() < 0.7:
            found[at] = draw.choice(
                (found[at] + 1, found[at] - 1, -found[at], found[at] * 2, float(found[at]), found[at] * 1e30)
            )
        elif found:
            found[at] = draw.choice(ODD)
    try:
        return msgpack.packb(found, use_bin_type=draw.random() < 0.95, use_single_float=draw.random() < 0.05)  # type: ignore[no-any-return]
    except (OverflowError, UnicodeEncodeError, TypeError, ValueError):  # there is no such message
        return bits(draw, data, corpus)


def odd_json(draw: random.Random, found: Any) -> Any:
    """A JSON value with another one somewhere in it."""
    if isinstance(found, dict) and found and draw.random() < 0.9:
        name = draw.choice(list(found))
        what = draw.randrange(8)
        if what == 0:
            return {other: value for other, value in found.items() if other != name}
        if what == 1:
            return {**found, draw.choice(("x", "", name + " ", "__class__")): found[name]}
        return {**found, name: odd_json(draw, found[name])}
    if isinstance(found, list) and found and draw.random() < 0.9:
        at = draw.randrange(len(found))
        return [*found[:at], odd_json(draw, found[at]), *found[at + 1 :]][draw.choice((0, 0, 0, 1)) :]
    if type(found) is int and draw.random() < 0.5:
        return draw.choice((found + 1, found - 1, -found, 2 * found, float(found), str(found)))
    if isinstance(found, str) and draw.random() < 0.5:
        return draw.choice(
            (found + "a", found[:-1], found[::-1], found.upper(), found[: len(found) // 2] + "A" + found[len(found) // 2 + 1 :])
        )
    odd = draw.choice(ODD)
    return odd.decode("latin-1") if isinstance(odd, bytes) else odd


def values(draw: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """A JSON message with another value somewhere, NaN and Infinity among them."""
    return json.dumps(odd_json(draw, json.loads(data)), ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")


def tensors(draw: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
    """A safetensors file with another value in its header, or with odd numbers, or its metadata of a ledger changed."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    what = draw.randrange(4)
    if what == 0:
        rest = numbers(draw, rest)
    elif what == 1 and "fedkseed" in header.get("__metadata__", {}):
        about = json.loads(header["__metadata__"]["fedkseed"])
        header["__metadata__"]["fedkseed"] = json.dumps(odd_json(draw, about))
    elif what == 2 and len(header) > 2:
        one, other = draw.sample([name for name in header if name != "__metadata__"], 2)
        header[one], header[other] = header[other], header[one]
    else:
        header = odd_json(draw, header)
    text = json.dumps(header).encode()
    said = draw.choice((len(text),) * 9 + (len(text) + 1, 2**40, 2**63))
    return said.to_bytes(8, "little") + text + rest


def within(change: Change) -> Change:
    """The last field of a msgpack message, which is a file, changed."""

    def changed(draw: random.Random, data: bytes, corpus: Sequence[bytes]) -> bytes:
        found = msgpack.unpackb(data)
        found[-1] = change(draw, found[-1], [found[-1]])
        packed: bytes = msgpack.packb(found)
        return packed

    return changed


def mutated(number: int, corpus: Sequence[bytes], changes: Sequence[Change]) -> bytes:
    """The mutation of that number."""
    draw = random.Random(number)
    return draw.choice(changes)(draw, draw.choice(corpus), corpus)
