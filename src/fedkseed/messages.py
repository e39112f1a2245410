"""What a server and a client say to each other: frozen, validated messages and their versioned bytes.

A message is one msgpack array of positional fields; arrays of numbers are raw little-endian bytes. Decoding builds
integers, floats, strings and bytes, nothing else, and any input that is not a message raises `ProtocolError`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError
from fedkseed.pool import FAMILIES, MAX_SIZE, SeedPool
from fedkseed.wire import DTYPES, MAX_EXPONENT, PRECISIONS, Packed

VERSION = 1
REQUEST, REPLY = "k?", "k!"
"""The first field of a message; two letters, since headers count in the budget."""
NAMES = {REQUEST: "request", REPLY: "reply"}
MAX_FIELDS = 64
MAX_BYTES = 1 << 20
MAX_STEPS = 65535
MAX_NAME_BYTES = 64
RUN_ID_BYTES, DIGEST_BYTES = 8, 32
MAX_FLOAT16 = 65504.0
INDEX: np.dtype[Any] = np.dtype("<u2")


def coefficients_digest(coefficients: NDArray[np.float32]) -> bytes:
    """SHA-256 of the coefficients that everybody rebuilds from, float32[K] little-endian."""
    return hashlib.sha256(coefficients.astype("<f4").tobytes()).digest()


@dataclass(frozen=True)
class TrainRequest:
    """Server to client: be at these coefficients, take these steps, send back one scalar each.

    Attributes:
        run_id: 8 bytes, the same for all messages of a run.
        server_round: counts from 1.
        attempt: counts from 0 within a round.
        client: the addressee's stable name.
        pool: the pool of perturbations.
        base: fingerprint of the base model, 32 bytes.
        coefficients: float32[K] as packed; `digest` (32 bytes) is of the unpacked values.
        indices: the seed of each local step, in order.
        lr, eps, max_grad, loss_clip: see `fedkseed.zeroth_order.StepSettings`.
        batch_size: records per step.
    """

    run_id: bytes
    server_round: int
    attempt: int
    client: str
    pool: SeedPool
    base: bytes
    coefficients: Packed
    digest: bytes
    indices: tuple[int, ...]
    lr: float
    eps: float
    batch_size: int
    max_grad: float
    loss_clip: float | None = None

    def __post_init__(self) -> None:
        _check_head(self)
        digest = _checked_coefficients(self.coefficients, self.pool.size)
        _integer("number of steps", len(self.indices), 1, MAX_STEPS)
        _integer("largest index", max(self.indices), 0, self.pool.size - 1)
        _integer("smallest index", min(self.indices), 0, self.pool.size - 1)
        for name in ("lr", "eps", "max_grad"):
            _positive(name, getattr(self, name))
        if self.loss_clip is not None:
            _positive("loss_clip", self.loss_clip)
        _integer("batch_size", self.batch_size, 1, MAX_STEPS)
        if self.coefficients.precision == "float16" and self.max_grad > MAX_FLOAT16:
            raise ProtocolError(f"max_grad is {self.max_grad}; expected at most {MAX_FLOAT16}, which float16 can hold")
        if digest != self.digest:
            raise ProtocolError("the coefficients do not have the digest that came with them; expected what was sent")

    def encode(self) -> bytes:
        """The message's bytes."""
        pool = [self.pool.key, self.pool.size, FAMILIES.index(self.pool.family)]
        indices = np.array(self.indices, INDEX).tobytes()
        numbers = [float(self.lr), float(self.eps), self.batch_size, float(self.max_grad), self.loss_clip]
        head = [self.run_id, self.server_round, self.attempt, self.client]
        return _pack(REQUEST, [*head, *pool, self.base, *_flat(self.coefficients), self.digest, indices, *numbers])

    @classmethod
    def decode(cls, data: bytes) -> TrainRequest:
        """The message of these bytes.

        Raises:
            ProtocolError: they are not a request of this version, or a field is out of its range.
        """
        fields = _unpack(data, REQUEST, 18)
        run_id, server_round, attempt, client, key, size, family, base = fields[:8]
        precision, exponent, numbers, digest, indices, lr, eps, batch_size, max_grad, loss_clip = fields[8:]
        _integer("pool key", key, 0, 2**64 - 1)
        _integer("pool size", size, 1, MAX_SIZE)
        _integer("family", family, 0, len(FAMILIES) - 1)
        pool = SeedPool(key, size, FAMILIES[family])
        packed = _unflat(precision, exponent, numbers)
        steps = tuple(_array("indices", indices, INDEX).tolist())
        return cls(
            run_id, server_round, attempt, client, pool, base, packed, digest, steps, lr, eps, batch_size, max_grad, loss_clip
        )


@dataclass(frozen=True)
class TrainReply:
    """Client to server: one scalar per local step, in the order of the request's indices.

    Attributes:
        run_id, server_round, attempt, client, base, digest: as in the request that is answered.
        num_examples: how many records the client holds.
        projected_grads: one number per step, as packed; 0 where dropped.
        dropped: positions of dropped steps, ascending.
        loss: mean of the steps' losses, None if all were dropped.
    """

    run_id: bytes
    server_round: int
    attempt: int
    client: str
    base: bytes
    digest: bytes
    num_examples: int
    projected_grads: Packed
    dropped: tuple[int, ...] = ()
    loss: float | None = None

    def __post_init__(self) -> None:
        _check_head(self)
        _integer("num_examples", self.num_examples, 1, 2**53)
        _packed("projected_grads", self.projected_grads, 1, MAX_STEPS)
        steps = len(self.projected_grads.numbers) // DTYPES[self.projected_grads.precision].itemsize
        for position, following in pairwise((*self.dropped, steps)):
            _integer("dropped step", position, 0, steps - 1)
            if not position < following:
                raise ProtocolError(
                    f"dropped step {position} is followed by {following}; expected ascending positions in the reply"
                )
        if self.loss is not None:
            _number("loss", self.loss)

    def encode(self) -> bytes:
        """The message's bytes."""
        head = [SCALARS, self.run_id, self.server_round, self.attempt, self.client, self.base, self.digest, self.num_examples]
        dropped = np.array(self.dropped, INDEX).tobytes()
        return _pack(REPLY, [*head, *_flat(self.projected_grads), dropped, self.loss])

    @classmethod
    def decode(cls, data: bytes) -> TrainReply:
        """The message of these bytes.

        Raises:
            ProtocolError: they are not a reply of this version, or a field is out of its range.
        """
        fields = _unpack(data, REPLY, 13)
        kind, run_id, server_round, attempt, client, base, digest, num_examples = fields[:8]
        precision, exponent, numbers, dropped, loss = fields[8:]
        _integer("update kind", kind, SCALARS, SCALARS)
        packed = _unflat(precision, exponent, numbers)
        positions = tuple(_array("dropped", dropped, INDEX).tolist())
        return cls(run_id, server_round, attempt, client, base, digest, num_examples, packed, positions, loss)


SCALARS = 0
"""The kind of an update: one scalar per prescribed seed. Another number is for another way to change K coefficients."""


def _pack(kind: str, fields: list[Any]) -> bytes:
    packed: bytes = msgpack.packb([kind, VERSION, *fields], use_bin_type=True)
    return packed


def _unpack(data: bytes, kind: str, count: int) -> list[Any]:
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise ProtocolError(f"message is {type(data).__name__}; expected bytes")
    if len(data) > MAX_BYTES:
        raise ProtocolError(f"message has {len(data)} bytes; at most {MAX_BYTES} are accepted")
    try:
        fields = msgpack.unpackb(data, raw=False, use_list=True, max_array_len=MAX_FIELDS, max_map_len=0, max_ext_len=0)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise ProtocolError(
            f"message is not msgpack ({type(error).__name__}); expected the bytes of a {NAMES[kind]}"
        ) from error
    if not isinstance(fields, list) or len(fields) < 2 or fields[0] != kind:
        raise ProtocolError(f"message is not a {NAMES[kind]}; expected its kind as first field")
    if type(fields[1]) is not int or fields[1] != VERSION:
        raise ProtocolError(f"protocol version is {_shown(fields[1])}; this is version {VERSION}: update the older side")
    if len(fields) != count + 2:
        raise ProtocolError(f"{NAMES[kind]} has {len(fields)} fields; expected {count + 2}")
    return fields[2:]


def _flat(packed: Packed) -> list[Any]:
    return [PRECISIONS.index(packed.precision), packed.exponent, packed.numbers]


def _unflat(precision: Any, exponent: Any, numbers: Any) -> Packed:
    _integer("precision", precision, 0, len(PRECISIONS) - 1)
    return Packed(PRECISIONS[precision], exponent, numbers)


def _array(name: str, raw: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    if not isinstance(raw, bytes) or len(raw) % dtype.itemsize:
        raise ProtocolError(f"{name} is not a whole number of {dtype.itemsize}-byte elements")
    return np.frombuffer(raw, dtype)


def _shown(value: Any) -> str:
    """A value for a message to a person: short, whatever was sent."""
    return f"{value!r:.80}" if isinstance(value, (int, float, str, bytes, type(None))) else f"of type {type(value).__name__}"


def _check_head(message: TrainRequest | TrainReply) -> None:
    """What both messages say of the round that they belong to."""
    _bytes("run_id", message.run_id, RUN_ID_BYTES)
    _integer("server_round", message.server_round, 1, 2**31)
    _integer("attempt", message.attempt, 0, 255)
    check_name(message.client)
    _bytes("base", message.base, DIGEST_BYTES)
    _bytes("digest", message.digest, DIGEST_BYTES)


def _bytes(name: str, value: Any, size: int) -> None:
    if not isinstance(value, bytes) or len(value) != size:
        raise ProtocolError(f"{name} is {_shown(value)}; expected {size} bytes")


def _integer(name: str, value: Any, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ProtocolError(f"{name} is {_shown(value)}; expected an integer from {low} to {high}")


def _number(name: str, value: Any) -> None:
    if not isinstance(value, float) or not math.isfinite(value):
        raise ProtocolError(f"{name} is {_shown(value)}; expected a finite float")


def _positive(name: str, value: Any) -> None:
    _number(name, value)
    if value <= 0:
        raise ProtocolError(f"{name} is {value!r}; expected a positive number")


def _packed(name: str, packed: Packed, low: int, high: int) -> None:
    if packed.precision not in PRECISIONS:
        raise ProtocolError(f"{name} have precision {packed.precision!r}; expected one of {PRECISIONS}")
    _integer(f"{name}' exponent", packed.exponent, -MAX_EXPONENT, MAX_EXPONENT)
    numbers = _array(name, packed.numbers, DTYPES[packed.precision])
    if not low <= len(numbers) <= high:
        raise ProtocolError(f"{len(numbers)} {name} came; expected {low if low == high else f'{low} to {high}'}")
    if not np.isfinite(numbers).all() or not np.isfinite(packed.unpack()).all():
        raise ProtocolError(f"{name} hold a number that is not finite; all must be")


def _checked_coefficients(packed: Packed, size: int) -> bytes:
    """The digest of coefficients, which must be so many finite numbers."""
    if type(packed.exponent) is not int or type(packed.numbers) is not bytes:  # cannot be looked up; this says what is wrong
        _packed("coefficients", packed, size, size)
    return _known_coefficients(packed, size)


@lru_cache(maxsize=2)  # a server sends the same coefficients to every client of a round
def _known_coefficients(packed: Packed, size: int) -> bytes:
    _packed("coefficients", packed, size, size)
    return coefficients_digest(packed.unpack())


def check_name(name: Any) -> None:
    """Refuse a client's name that is not 1 to 64 bytes of printable UTF-8.

    Raises:
        ProtocolError: it is not.
    """
    if not isinstance(name, str) or not name.isprintable() or not 1 <= len(name.encode(errors="replace")) <= MAX_NAME_BYTES:
        raise ProtocolError(f"client name is {_shown(name)}; expected 1 to {MAX_NAME_BYTES} bytes of printable text")
