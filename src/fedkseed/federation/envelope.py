"""The envelope of every message, one msgpack array of positional fields, and the checks of single fields.

Decoding builds integers, floats, strings and bytes, nothing else; whatever is not a message raises `ProtocolError`.
"""

from __future__ import annotations

import math
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Container
from dataclasses import dataclass, fields
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError

VERSION = 1
MAX_FIELDS = 64
MAX_STEPS = 65535
MAX_NUMBERS = 2**24
"""Most numbers of all pages of a ledger: 256 pages of the largest pools. A page without parts takes no room in a file, and
4 K bytes in memory."""
MAX_NAME_BYTES = 64
ANYBODY = "-"
"""In place of a client's name."""
RUN_ID_BYTES, DIGEST_BYTES = 8, 32
LOOKALIKES = {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "CHEROKEE"}
"""Alphabets that share the shapes of letters, by the first word of a letter's Unicode name."""
SMALLEST_STEP, LARGEST_STEP = 1e-37, 1e37
"""Of a learning rate or probe distance: what float32 can tell from 0 and add up."""
SMALLEST_CLIP, LARGEST_CLIP = 1e-6, 1e9
"""Of the numbers in a secure sum."""


def pack_fields(kind: str, values: list[Any]) -> bytes:
    """A message's bytes: its kind, the protocol's version, its fields."""
    packed: bytes = msgpack.packb([kind, VERSION, *values], use_bin_type=True)
    return packed


def unpack_fields(data: bytes, kind: str, what: str, count: int, max_bytes: int, more: int = 0) -> list[Any]:
    """The fields of a message of a kind.

    Args:
        data: its bytes.
        kind: what its first field must be.
        what: what such a message is called, for errors.
        count: how many fields it must have.
        max_bytes: more bytes are refused unread.
        more: how many fields it may have beyond these.

    Raises:
        ProtocolError: they are not such a message.
    """
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ProtocolError(f"message is {type(data).__name__}; expected bytes")
    if len(data) > max_bytes:
        raise ProtocolError(f"message has {len(data)} bytes; at most {max_bytes} are accepted")
    try:
        values = msgpack.unpackb(data, raw=False, use_list=True, max_array_len=MAX_FIELDS, max_map_len=0, max_ext_len=0)
        packed = msgpack.packb(values, use_bin_type=True)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(f"message is not msgpack ({type(error).__name__}); expected the bytes of a {what}") from error
    if not isinstance(values, list) or len(values) < 2 or values[0] != kind:
        raise ProtocolError(f"message is not a {what}; expected its kind as first field")
    if type(values[1]) is not int or values[1] != VERSION:
        raise ProtocolError(f"protocol version is {shown(values[1])}; this is version {VERSION}: update the older side")
    if not count <= len(values) - 2 <= count + more:
        raise ProtocolError(f"{what} has {len(values)} fields; expected {count + 2}")
    if packed != bytes(data):  # two texts of one message would have two digests
        raise ProtocolError(f"{what} is not packed in the shortest form of each field")
    return values[2:]


def read_array(name: str, raw: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Raw bytes as an array."""
    if not isinstance(raw, bytes) or len(raw) % dtype.itemsize:
        raise ProtocolError(f"{name} is not a whole number of {dtype.itemsize}-byte elements")
    return np.frombuffer(raw, dtype)


def shown(value: Any) -> str:
    """A value for a message to a person: short, whatever was sent."""
    return f"{value!r:.80}" if isinstance(value, (int, float, str, bytes, type(None))) else f"of type {type(value).__name__}"


def check_bytes(name: str, value: Any, size: int) -> None:
    """Refuse what is not bytes of that length."""
    if not isinstance(value, bytes) or len(value) != size:
        raise ProtocolError(f"{name} is {shown(value)}; expected {size} bytes")


def check_integer(name: str, value: Any, low: int, high: int) -> None:
    """Refuse what is not an integer from low to high."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ProtocolError(f"{name} is {shown(value)}; expected an integer from {low} to {high}")


def check_choice(name: str, value: Any, known: Container[int]) -> None:
    """Refuse what is not the number of something that is known."""
    check_integer(name, value, 0, 2**16)
    if value not in known:
        raise ProtocolError(f"{name} is {value}, which is unknown here; update the older side")


def check_number(name: str, value: Any) -> None:
    """Refuse what is not a finite float."""
    if not isinstance(value, float) or not math.isfinite(value):
        raise ProtocolError(f"{name} is {shown(value)}; expected a finite float")


def check_positive(name: str, value: Any) -> None:
    """Refuse what is not a positive finite float."""
    check_number(name, value)
    if value <= 0:
        raise ProtocolError(f"{name} is {value!r}; expected a positive number")


def check_loss(loss: float, most: float) -> None:
    """Refuse the loss of tokens that is negative or above `most`."""
    if not 0 <= loss <= most:
        raise ProtocolError(f"loss is {loss:g}; 0 to {most:.4g} are accepted")


def check_eps(eps: Any) -> None:
    """Refuse a probe distance that no setting may have."""
    check_positive("eps", eps)
    if not SMALLEST_STEP <= eps <= LARGEST_STEP:
        raise ProtocolError(f"eps is {eps!r}; expected a number from {SMALLEST_STEP:g} to {LARGEST_STEP:g}")


def check_name(name: Any) -> None:
    """Refuse a client's name that is not 1 to 64 bytes of printable UTF-8, or that a person may take for another one.

    Raises:
        ProtocolError: it is not; or it has blanks at an end or in a row, has another normal form (NFKC), or mixes alphabets
            whose letters look alike.
    """
    if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name.encode(errors="replace")) <= MAX_NAME_BYTES:
        raise ProtocolError(f"client name is {shown(name)}; expected 1 to {MAX_NAME_BYTES} bytes of printable text")
    if name != " ".join(name.split()) or name != unicodedata.normalize("NFKC", name):
        raise ProtocolError(
            f"client name is {shown(name)}, which reads as {' '.join(unicodedata.normalize('NFKC', name).split())!r}; "
            "expected no blanks at its ends or in a row, and the usual form of each letter"
        )
    if name.isascii():
        return
    mixed = sorted({unicodedata.name(letter, "?").split()[0] for letter in name if letter.isalpha()} & LOOKALIKES)
    if len(mixed) > 1:
        raise ProtocolError(f"client name {shown(name)} mixes {' and '.join(mixed)} letters, which look alike; use one")


@dataclass(frozen=True)
class Head(ABC):
    """What every message says of the round that it belongs to.

    Attributes:
        run_id: 8 bytes, the same for all messages of a run.
        server_round: counts from 1.
        attempt: counts from 0 within a round.
        client: the stable name of the client that is asked, or answers.
        base: fingerprint of the base model, 32 bytes.
        digest: SHA-256 of what the server sends to train from, 32 bytes.
    """

    run_id: bytes
    server_round: int
    attempt: int
    client: str
    base: bytes
    digest: bytes

    def __post_init__(self) -> None:
        check_bytes("run_id", self.run_id, RUN_ID_BYTES)
        check_integer("server_round", self.server_round, 1, 2**31)
        check_integer("attempt", self.attempt, 0, 255)
        check_name(self.client)
        check_bytes("base", self.base, DIGEST_BYTES)
        check_bytes("digest", self.digest, DIGEST_BYTES)

    @property
    def place(self) -> tuple[int, int, int, str]:
        """What both sides derive this exchange's randomness from, with a purpose behind it: run, round, attempt, client."""
        return int.from_bytes(self.run_id, "little"), self.server_round, self.attempt, self.client

    def head(self) -> dict[str, Any]:
        """These fields by name: what a reply repeats of its request."""
        return {field.name: getattr(self, field.name) for field in fields(Head)}


@dataclass(frozen=True)
class Request(Head):
    """Server to client: train from here.

    Attributes:
        lr: learning rate.
        batch_size: records per step.
    """

    lr: float
    batch_size: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("lr", self.lr)
        check_integer("batch_size", self.batch_size, 1, MAX_STEPS)

    @property
    @abstractmethod
    def num_steps(self) -> int:
        """How many local steps are asked for."""

    @abstractmethod
    def encode(self) -> bytes:
        """The message's bytes."""


@dataclass(frozen=True)
class Reply(Head):
    """Client to server: what came of it; the head is that of the request.

    Attributes:
        num_examples: how many records the client holds.
        loss: mean of the losses that it measured, None if every step was dropped.
    """

    num_examples: int
    loss: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("num_examples", self.num_examples, 1, 2**53)
        if self.loss is not None:
            check_number("loss", self.loss)

    @property
    @abstractmethod
    def num_dropped(self) -> int:
        """How many steps the client dropped."""

    @abstractmethod
    def encode(self) -> bytes:
        """The message's bytes."""
