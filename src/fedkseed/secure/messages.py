"""What a server and clients say to each other in a secure sum: four requests and four replies.

The rules are those of `fedkseed.kseed.messages`: positional fields, raw arrays, one form for one message, and whatever a
stranger sends raises nothing but `ProtocolError`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError
from fedkseed.federation.contradictions import MIN_COHORT, MOST_WEIGHT
from fedkseed.federation.envelope import (
    RUN_ID_BYTES,
    check_bytes,
    check_integer,
    check_name,
    check_number,
    pack_fields,
    read_array,
    unpack_fields,
)
from fedkseed.secure.fixed_point import MAX_COHORT, FixedPoint
from fedkseed.secure.primitives import KEY_BYTES, SEED_BYTES, SIGNATURE_BYTES

MAX_BYTES = 1 << 28
MAX_NUMBERS = 1 << 17
SEALED_BYTES = 2 * SEED_BYTES + 16
"""Of a pair of shares, sealed."""
TERMS_BYTES = 32
HEAD_BYTES = 20
"""Of a message's kind, version, run, round, attempt, and the lengths of its fields."""
NO_SHARE = bytes(SEED_BYTES)
"""In place of a share that could not be read; an honest one is this once in 2^128."""
POSITION: np.dtype[Any] = np.dtype("<u2")
WEIGHT: np.dtype[Any] = np.dtype("<f8")
NUMBER: np.dtype[Any] = np.dtype("<u4")


def threshold_of(size: int) -> int:
    """How many of a roster must stay: two thirds, so that no two disjoint sets of clients are enough."""
    return size - size // 3


@dataclass(frozen=True)
class Message:
    """What every message says: of which attempt at which round it is, and who is asked, or answers.

    Attributes:
        run_id: 8 bytes.
        server_round, attempt: counted from 1 and from 0.
        client: its stable name.
    """

    kind: ClassVar[str]
    run_id: bytes
    server_round: int
    attempt: int
    client: str

    def __post_init__(self) -> None:
        check_bytes("run_id", self.run_id, RUN_ID_BYTES)
        check_integer("server_round", self.server_round, 1, 2**31)
        check_integer("attempt", self.attempt, 0, 255)
        check_name(self.client)

    @property
    def where(self) -> tuple[bytes, int, int]:
        """Run, round and attempt."""
        return self.run_id, self.server_round, self.attempt

    def encode(self) -> bytes:
        """The message's bytes."""
        return pack_fields(self.kind, [getattr(self, field.name) for field in fields(self)])

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The message of these bytes.

        Raises:
            ProtocolError: they are not such a message of this version, or a field is out of its range.
        """
        return cls(*unpack_fields(data, cls.kind, cls.__name__, len(fields(cls)), MAX_BYTES))


class KeysRequest(Message):
    """Server to client: make fresh keys."""

    kind = "a?"


@dataclass(frozen=True)
class KeysReply(Message):
    """Client to server: its public keys.

    Attributes:
        mask_key: of the masks that it will have in common with each other client; its seed will be shared.
        share_key: of what clients send each other through the server.
        signature: of `signed_keys` by the client's node key; empty of a client without one.
    """

    kind = "a!"
    mask_key: bytes
    share_key: bytes
    signature: bytes = b""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bytes("mask_key", self.mask_key, KEY_BYTES)
        check_bytes("share_key", self.share_key, KEY_BYTES)
        check_bytes("signature", self.signature, SIGNATURE_BYTES if self.signature != b"" else 0)


@dataclass(frozen=True)
class Roster:
    """Who takes part in a sum: the same for all, in the order of the names.

    Attributes:
        names: distinct, ascending.
        weights: float64; what each one's vector counts, together at most 1.
        mask_keys, share_keys, signatures: by position.
        terms: 32 bytes, of what all of them are asked to do: so that nobody is alone with what is asked of it.
        clip: of the fixed-point numbers.
    """

    names: tuple[str, ...]
    weights: tuple[float, ...]
    mask_keys: tuple[bytes, ...]
    share_keys: tuple[bytes, ...]
    signatures: tuple[bytes, ...]
    terms: bytes
    clip: float

    def __post_init__(self) -> None:
        check_bytes("terms", self.terms, TERMS_BYTES)
        check_number("clip", self.clip)
        FixedPoint(self.clip, max(len(self.names), 1))
        size = len(self.names)
        check_integer("size of the roster", size, MIN_COHORT, MAX_COHORT)
        for name in self.names:
            check_name(name)
        for one, following in pairwise(self.names):
            if not one < following:
                raise ProtocolError(f"roster has {one!r} before {following!r}; expected distinct names in ascending order")
        if any(len(each) != size for each in (self.weights, self.mask_keys, self.share_keys, self.signatures)):
            raise ProtocolError(f"roster has {size} names and other numbers of weights or keys; expected as many")
        if len({*self.mask_keys, *self.share_keys}) != 2 * size:
            raise ProtocolError("roster has a key twice; expected fresh ones")
        for weight in self.weights:
            check_number("weight", weight)
            if not 0 < weight <= MOST_WEIGHT:
                raise ProtocolError(
                    f"weight is {weight!r}; expected above 0, at most {MOST_WEIGHT}, of which a sum says nothing"
                )
        if sum(self.weights) > 1 + 1e-12:
            raise ProtocolError(f"weights are {sum(self.weights)!r} together; expected at most 1")

    @property
    def threshold(self) -> int:
        """How many of them must stay."""
        return threshold_of(len(self.names))

    def digest(self, where: tuple[bytes, int, int]) -> bytes:
        """SHA-256 of the roster and of the attempt that it is of: what clients seal to each other is bound to it."""
        return hashlib.sha256(pack_fields("roster", [*where, *self.flat()])).digest()

    def flat(self) -> list[Any]:
        """As fields of a message."""
        weights = np.array(self.weights, WEIGHT).tobytes()
        keys = (b"".join(keys) for keys in (self.mask_keys, self.share_keys, self.signatures))
        return ["\n".join(self.names), weights, *keys, self.terms, float(self.clip)]

    @classmethod
    def of(cls, names: Any, weights: Any, mask_keys: Any, share_keys: Any, signatures: Any, terms: Any, clip: Any) -> Self:
        """The roster of these fields.

        Raises:
            ProtocolError: they are none.
        """
        if not isinstance(names, str):
            raise ProtocolError(f"names are of type {type(names).__name__}; expected a text")
        listed = tuple(names.split("\n"))
        check_integer("size of the roster", len(listed), MIN_COHORT, MAX_COHORT)
        signed = signatures != b""
        return cls(
            listed,
            tuple(read_array("weights", weights, WEIGHT).tolist()),
            _cut("mask keys", mask_keys, KEY_BYTES, len(listed)),
            _cut("share keys", share_keys, KEY_BYTES, len(listed)),
            _cut("signatures", signatures, SIGNATURE_BYTES * signed, len(listed)),
            terms,
            clip,
        )


@dataclass(frozen=True)
class SharesRequest(Message):
    """Server to client: this is the roster; share your secrets among it."""

    kind = "b?"
    roster: Roster

    def encode(self) -> bytes:
        """See `Message.encode`."""
        return pack_fields(self.kind, [*self.where, self.client, *self.roster.flat()])

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """See `Message.decode`."""
        run_id, server_round, attempt, client, *roster = unpack_fields(data, cls.kind, cls.__name__, 11, MAX_BYTES)
        return cls(run_id, server_round, attempt, client, Roster.of(*roster))


@dataclass(frozen=True)
class SharesReply(Message):
    """Client to server: its shares for each other client, sealed.

    Attributes:
        commitment: `commitment` of the seed of its own mask, by which the server knows it when shares give it back.
        sealed: in the roster's order, without its own.
    """

    kind = "b!"
    commitment: bytes
    sealed: bytes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bytes("commitment", self.commitment, KEY_BYTES)
        _check_pieces("sealed shares", self.sealed, SEALED_BYTES)


@dataclass(frozen=True)
class MaskedRequest(Message):
    """Server to client: train, and send your vector under masks.

    Attributes:
        sealed: the shares that the others have for this client, in the roster's order.
        train: the algorithm's own request, on the roster's terms.
    """

    kind = "c?"
    sealed: bytes
    train: bytes

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pieces("sealed shares", self.sealed, SEALED_BYTES)
        if not isinstance(self.train, bytes):
            raise ProtocolError(f"the training request is of type {type(self.train).__name__}; expected bytes")


@dataclass(frozen=True)
class MaskedReply(Message):
    """Client to server: its vector under masks, raw uint32."""

    kind = "c!"
    numbers: bytes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("number of masked numbers", len(read_array("masked numbers", self.numbers, NUMBER)), 1, MAX_NUMBERS)

    @property
    def vector(self) -> NDArray[np.uint32]:
        """uint32[n]."""
        return np.frombuffer(self.numbers, NUMBER).astype(np.uint32)


@dataclass(frozen=True)
class UnmaskRequest(Message):
    """Server to client: these have sent their vectors, those have not; a share of one secret of each, please.

    Attributes:
        stayed: positions in the roster, ascending, raw: whose own masks are to come off.
        left: all the others: whose masks with those who stayed are to come off.
    """

    kind = "d?"
    stayed: bytes
    left: bytes

    def __post_init__(self) -> None:
        super().__post_init__()
        positions("stayed", self.stayed)
        positions("left", self.left)


@dataclass(frozen=True)
class UnmaskReply(Message):
    """Client to server: one share of each client, in the roster's order.

    Attributes:
        shares: 16 bytes each; `NO_SHARE` where what came could not be read.
    """

    kind = "d!"
    shares: bytes

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_pieces("shares", self.shares, SEED_BYTES)


def bytes_beside(size: int, numbers: int, name: str) -> tuple[int, int]:
    """About how many bytes a client is sent beside its training request, and sends, for a vector of so many numbers."""
    head = HEAD_BYTES + len(name)
    roster = size * (2 * KEY_BYTES + WEIGHT.itemsize + len(name) + 1)
    down = 4 * head + roster + TERMS_BYTES + SEALED_BYTES * (size - 1) + 2 * POSITION.itemsize * size
    return down, 4 * head + 3 * KEY_BYTES + SEALED_BYTES * (size - 1) + NUMBER.itemsize * numbers + SEED_BYTES * size


def positions(name: str, raw: Any) -> tuple[int, ...]:
    """Positions in a roster, ascending.

    Raises:
        ProtocolError: they are not.
    """
    found: tuple[int, ...] = tuple(read_array(name, raw, POSITION).tolist())
    for one, following in pairwise(found):
        if not one < following:
            raise ProtocolError(f"{name}: position {one} is followed by {following}; expected ascending positions")
    return found


def as_positions(found: Sequence[int]) -> bytes:
    """The same as they travel."""
    return np.array(found, POSITION).tobytes()


def pieces(raw: bytes, size: int) -> list[bytes]:
    """Bytes in pieces of a size."""
    return [raw[at : at + size] for at in range(0, len(raw), size)]


def _check_pieces(name: str, raw: Any, size: int) -> None:
    if not isinstance(raw, bytes) or len(raw) % size or len(raw) > size * MAX_COHORT:
        raise ProtocolError(f"{name} are no whole number of {size} bytes, or too many")


def _cut(name: str, raw: Any, size: int, count: int) -> tuple[bytes, ...]:
    check_bytes(name, raw, size * count)
    return tuple(raw[at * size : (at + 1) * size] for at in range(count))
