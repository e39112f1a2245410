"""What a server and an edge say to each other: one edge stands for the clients behind it.

The head's client is the edge, and its digest that of the checkpoint that goes with the opening. All arrays are of the clients
in the order of their names, so that nobody needs to be named twice.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError
from fedkseed.federation.envelope import (
    DIGEST_BYTES,
    Head,
    check_bytes,
    check_name,
    check_number,
    pack_fields,
    read_array,
    unpack_fields,
)

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
FLOAT, INTEGER, PLACE = np.dtype("<f8"), np.dtype("<i8"), np.dtype("<u4")
HEAD = tuple(field.name for field in fields(Head))
OVERHEAD = 4096
"""Bytes of a message beside its arrays, many times what there are."""
MAX_OPENING = 1 << 30
MAX_REASON = 200
"""Letters of a refusal's reason that an edge passes on."""


@dataclass(frozen=True)
class Opening(Head):
    """Server to edge: ask these clients, from this checkpoint.

    Attributes:
        settings: digest of the settings that both go by.
        clients: whom to ask, sorted.
        state: the checkpoint.
    """

    settings: bytes
    clients: tuple[str, ...]
    state: bytes

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bytes("settings", self.settings, DIGEST_BYTES)
        for name in self.clients:
            check_name(name)
        if not self.clients or any(a >= b for a, b in zip(self.clients, self.clients[1:], strict=False)):
            raise ProtocolError("the clients to ask are none, or not in the order of their names, each once")

    def encode(self) -> bytes:
        """The message's bytes."""
        return pack_fields("e?", [*_head(self), self.settings, "\n".join(self.clients), self.state])

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The message of these bytes.

        Raises:
            ProtocolError: they are none.
        """
        *head, settings, clients, state = unpack_fields(data, "e?", "request to an edge", len(HEAD) + 3, MAX_OPENING)
        if not isinstance(clients, str) or not isinstance(state, bytes):
            raise ProtocolError("the clients to ask are no text, or the checkpoint no bytes")
        return cls(**_named(head), settings=settings, clients=tuple(clients.split("\n")), state=state)


@dataclass(frozen=True, eq=False)
class Report(Head):
    """Edge to server: whose replies it has accepted, and what is told of each.

    Attributes:
        num_examples: how many records each has that was asked, int64[n]; 0 of those whose reply is not used.
        dropped_steps: int64[n].
        losses, sizes: float64[n], NaN where there is none; see `Contribution`.
        words: see `Part`, float64 of n or of nothing.
        refused: the places among those that were asked of those whose replies were refused.
        reasons: why, one for each of these.
    """

    num_examples: I64
    dropped_steps: I64
    losses: F64
    sizes: F64
    words: F64
    refused: tuple[int, ...]
    reasons: tuple[str, ...]

    def encode(self) -> bytes:
        """The message's bytes."""
        integers = [array.astype(INTEGER).tobytes() for array in (self.num_examples, self.dropped_steps)]
        floats = [array.astype(FLOAT).tobytes() for array in (self.losses, self.sizes, self.words)]
        refused = np.array(self.refused, PLACE).tobytes()
        return pack_fields("e!", [*_head(self), *integers, *floats, refused, "\n".join(self.reasons)])

    @classmethod
    def decode(cls, data: bytes, asked: int) -> Self:
        """The message of these bytes, of an edge that was to ask so many clients.

        Raises:
            ProtocolError: they are none.
        """
        most = OVERHEAD + asked * (6 * 8 + 4 * MAX_REASON)
        *head, examples, dropped, losses, sizes, words, refused, reasons = unpack_fields(
            data, "e!", "report of an edge", len(HEAD) + 7, most
        )
        places = tuple(read_array("refused", refused, PLACE).tolist())
        if not isinstance(reasons, str):
            raise ProtocolError("the reasons of refusals are no text")
        return cls(
            **_named(head),
            num_examples=_array("num_examples", examples, INTEGER, asked),
            dropped_steps=_array("dropped_steps", dropped, INTEGER, asked),
            losses=_array("losses", losses, FLOAT, asked),
            sizes=_array("sizes", sizes, FLOAT, asked),
            words=_array("words", words, FLOAT, asked) if words else np.zeros(0),
            refused=places,
            reasons=tuple(reasons.split("\n")) if reasons else (),
        )


@dataclass(frozen=True, eq=False)
class Asking(Head):
    """Server to edge: a question about the replies that it has accepted, see `Question`; weights None asks for lengths."""

    limit: float
    weights: F64 | None

    def encode(self) -> bytes:
        """The message's bytes."""
        weights = None if self.weights is None else self.weights.astype(FLOAT).tobytes()
        return pack_fields("n?", [*_head(self), float(self.limit), weights])

    @classmethod
    def decode(cls, data: bytes, accepted: int) -> Self:
        """The message of these bytes, to an edge that has accepted so many replies.

        Raises:
            ProtocolError: they are none.
        """
        *head, limit, weights = unpack_fields(data, "n?", "question to an edge", len(HEAD) + 2, OVERHEAD + 8 * accepted)
        if not isinstance(limit, float) or not limit > 0:
            raise ProtocolError(f"limit is {limit!r:.40}; expected a positive number")
        if weights is None:
            return cls(**_named(head), limit=limit, weights=None)
        found = _array("weights", weights, FLOAT, accepted)
        if not np.isfinite(found).all() or (found < 0).any():
            raise ProtocolError("a weight is negative or not finite")
        return cls(**_named(head), limit=limit, weights=found)


@dataclass(frozen=True, eq=False)
class LengthsReply(Head):
    """Edge to server: float64[n] and int64[n]; see `Lengths`."""

    lengths: F64
    clipped: I64

    def encode(self) -> bytes:
        """The message's bytes."""
        return pack_fields("l!", [*_head(self), self.lengths.astype(FLOAT).tobytes(), self.clipped.astype(INTEGER).tobytes()])

    @classmethod
    def decode(cls, data: bytes, accepted: int) -> Self:
        """The message of these bytes, of an edge that has accepted so many replies.

        Raises:
            ProtocolError: they are none, or a length is not one.
        """
        *head, lengths, clipped = unpack_fields(data, "l!", "answer of an edge", len(HEAD) + 2, OVERHEAD + 16 * accepted)
        found = cls(
            **_named(head),
            lengths=_array("lengths", lengths, FLOAT, accepted),
            clipped=_array("clipped", clipped, INTEGER, accepted),
        )
        for length in found.lengths.tolist():
            check_number("length", length)
        if (found.lengths < 0).any() or (found.clipped < 0).any():
            raise ProtocolError("a length, or a number of clipped scalars, is negative")
        return found


@dataclass(frozen=True, eq=False)
class SumsReply(Head):
    """Edge to server: int64[rows, K]; see `Part.rows`."""

    rows: I64

    def encode(self) -> bytes:
        """The message's bytes."""
        return pack_fields("s!", [*_head(self), self.rows.astype(INTEGER).tobytes()])

    @classmethod
    def decode(cls, data: bytes, shape: tuple[int, int]) -> Self:
        """The message of these bytes, whose numbers must have this shape.

        Raises:
            ProtocolError: they are none.
        """
        size = shape[0] * shape[1]
        *head, rows = unpack_fields(data, "s!", "sum of an edge", len(HEAD) + 1, OVERHEAD + 8 * size)
        return cls(**_named(head), rows=_array("sums", rows, INTEGER, size).reshape(shape))


def _head(message: Head) -> list[Any]:
    return list(message.head().values())


def _named(head: list[Any]) -> dict[str, Any]:
    return dict(zip(HEAD, head, strict=True))


def _array(name: str, raw: Any, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    numbers = read_array(name, raw, dtype)
    if len(numbers) != count:
        raise ProtocolError(f"{len(numbers)} {name} came; expected {count}")
    return numbers
