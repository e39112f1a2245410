"""What a server and a client say to each other: frozen, validated messages and their versioned bytes.

A message is one msgpack array of positional fields; arrays of numbers are raw little-endian bytes. Decoding builds
integers, floats, strings and bytes, nothing else, and any input that is not a message raises `ProtocolError`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError
from fedkseed.federation.envelope import (
    ANYBODY,
    MAX_STEPS,
    Reply,
    Request,
    check_choice,
    check_eps,
    check_integer,
    check_positive,
    pack_fields,
    read_array,
    unpack_fields,
)
from fedkseed.federation.objectives import SCALINGS, Scaling
from fedkseed.kseed.rounding import DTYPES, MAX_EXPONENT, PRECISIONS, Packed
from fedkseed.noise.families import BY_CODE
from fedkseed.noise.pool import MAX_SIZE, SeedPool

REQUEST, REPLY = "k?", "k!"
"""The first field of a message; two letters, since headers count in the budget."""
MAX_BYTES = 1 << 20
MAX_FLOAT16 = 65504.0
INDEX: np.dtype[Any] = np.dtype("<u2")


def coefficients_digest(coefficients: NDArray[np.float32]) -> bytes:
    """SHA-256 of the coefficients that everybody rebuilds from, float32[K] little-endian."""
    return hashlib.sha256(coefficients.astype("<f4").tobytes()).digest()


@dataclass(frozen=True)
class TrainRequest(Request):
    """Server to client: be at these coefficients, take these steps, send back one scalar each.

    Attributes:
        run_id, server_round, attempt, client, base, lr, batch_size: see `Request`.
        digest: see `Request`; of the unpacked coefficients.
        pool: the pool of perturbations.
        coefficients: float32[K] as packed.
        indices: the seed of each local step, in order; of several directions, as many seeds a step.
        eps, max_grad, loss_clip, directions: see `fedkseed.kseed.steps.StepSettings`; one direction is not written out.
        scaling: how the client's scores are scaled; None, which is not written out, where it measures a loss. What is scored is
            the client's own affair: a request names no code.
    """

    pool: SeedPool
    coefficients: Packed
    indices: tuple[int, ...]
    eps: float
    max_grad: float
    loss_clip: float | None = None
    directions: int = 1
    scaling: Scaling | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        digest = _checked_coefficients(self.coefficients, self.pool.size)
        check_integer("number of steps", len(self.indices), 1, MAX_STEPS)
        check_integer("number of directions", self.directions, 1, MAX_STEPS)
        if len(self.indices) % self.directions:
            raise ProtocolError(
                f"{len(self.indices)} indices came for steps of {self.directions} directions; expected whole steps"
            )
        check_integer("largest index", max(self.indices), 0, self.pool.size - 1)
        check_integer("smallest index", min(self.indices), 0, self.pool.size - 1)
        check_eps(self.eps)
        check_positive("max_grad", self.max_grad)
        if self.loss_clip is not None:
            check_positive("loss_clip", self.loss_clip)
        if self.coefficients.precision == "float16" and self.max_grad > MAX_FLOAT16:
            raise ProtocolError(f"max_grad is {self.max_grad}; expected at most {MAX_FLOAT16}, which float16 can hold")
        if digest != self.digest:
            raise ProtocolError("the coefficients do not have the digest that came with them; expected what was sent")

    @property
    def num_steps(self) -> int:
        """How many local steps are asked for."""
        return len(self.indices) // self.directions

    def encode(self) -> bytes:
        """The message's bytes."""
        pool = [self.pool.key, self.pool.size, self.pool.facts.code]
        indices = np.array(self.indices, INDEX).tobytes()
        numbers = [float(self.lr), float(self.eps), self.batch_size, float(self.max_grad), self.loss_clip]
        head = [self.run_id, self.server_round, self.attempt, self.client]
        several = [self.directions] if self.directions > 1 or self.scaling else []
        if self.scaling:
            several.append(SCALINGS.index(self.scaling))
        return pack_fields(
            REQUEST, [*head, *pool, self.base, *_flat(self.coefficients), self.digest, indices, *numbers, *several]
        )

    @classmethod
    def decode(cls, data: bytes) -> TrainRequest:
        """The message of these bytes.

        Raises:
            ProtocolError: they are not a request of this version, or a field is out of its range.
        """
        fields = unpack_fields(data, REQUEST, "request", 18, MAX_BYTES, more=2)
        run_id, server_round, attempt, client, key, size, family, base = fields[:8]
        precision, exponent, numbers, digest, indices, lr, eps, batch_size, max_grad, loss_clip, *several = fields[8:]
        directions: int = several[0] if several else 1
        scaling: Scaling | None = None
        if len(several) == 1:  # one direction of what has a gradient is not written out
            check_integer("number of directions", directions, 2, MAX_STEPS)
        elif several:
            check_integer("scaling", several[1], 0, len(SCALINGS) - 1)
            scaling = SCALINGS[several[1]]
        check_integer("pool key", key, 0, 2**64 - 1)
        check_integer("pool size", size, 1, MAX_SIZE)
        check_choice("family", family, BY_CODE)
        pool = SeedPool(key, size, BY_CODE[family].name)
        packed = _unflat(precision, exponent, numbers)
        steps = tuple(read_array("indices", indices, INDEX).tolist())
        head = (run_id, server_round, attempt, client, base, digest)
        return cls(*head, lr, batch_size, pool, packed, steps, eps, max_grad, loss_clip, directions, scaling)


@dataclass(frozen=True)
class TrainReply(Reply):
    """Client to server: one scalar for each of the request's indices, in their order.

    Attributes:
        run_id, server_round, attempt, client, base, digest, num_examples, loss: see `Reply`.
        projected_grads: one number per index, as packed; 0 where dropped.
        dropped: positions of dropped steps, ascending.
    """

    projected_grads: Packed
    dropped: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _packed("projected_grads", self.projected_grads, 1, MAX_STEPS)
        for position, following in pairwise((*self.dropped, self.num_scalars)):
            check_integer("dropped step", position, 0, self.num_scalars - 1)
            if not position < following:
                raise ProtocolError(
                    f"dropped step {position} is followed by {following}; expected ascending positions in the reply"
                )

    @property
    def num_scalars(self) -> int:
        """How many projected gradients there are."""
        return len(self.projected_grads.numbers) // DTYPES[self.projected_grads.precision].itemsize

    @property
    def num_dropped(self) -> int:
        """How many steps were dropped."""
        return len(self.dropped)

    def encode(self) -> bytes:
        """The message's bytes."""
        head = [SCALARS, self.run_id, self.server_round, self.attempt, self.client, self.base, self.digest, self.num_examples]
        dropped = np.array(self.dropped, INDEX).tobytes()
        return pack_fields(REPLY, [*head, *_flat(self.projected_grads), dropped, self.loss])

    @classmethod
    def decode(cls, data: bytes) -> TrainReply:
        """The message of these bytes.

        Raises:
            ProtocolError: they are not a reply of this version, or a field is out of its range.
        """
        fields = unpack_fields(data, REPLY, "reply", 13, MAX_BYTES)
        kind, run_id, server_round, attempt, client, base, digest, num_examples = fields[:8]
        precision, exponent, numbers, dropped, loss = fields[8:]
        check_integer("update kind", kind, SCALARS, SCALARS)
        packed = _unflat(precision, exponent, numbers)
        positions = tuple(read_array("dropped", dropped, INDEX).tolist())
        head = (run_id, server_round, attempt, client, base, digest)
        return cls(*head, num_examples, loss, packed, positions)


def terms(request: bytes) -> bytes:
    """SHA-256 of what a request says but for its client: all that is asked."""
    return hashlib.sha256(replace(TrainRequest.decode(request), client=ANYBODY).encode()).digest()


SCALARS = 0
"""The kind of an update: one scalar per prescribed seed. Another number is for another way to change K coefficients."""


def _flat(packed: Packed) -> list[Any]:
    return [PRECISIONS.index(packed.precision), packed.exponent, packed.numbers]


def _unflat(precision: Any, exponent: Any, numbers: Any) -> Packed:
    check_integer("precision", precision, 0, len(PRECISIONS) - 1)
    return Packed(PRECISIONS[precision], exponent, numbers)


def _packed(name: str, packed: Packed, low: int, high: int) -> None:
    if packed.precision not in PRECISIONS:
        raise ProtocolError(f"{name} have precision {packed.precision!r}; expected one of {PRECISIONS}")
    check_integer(f"{name}' exponent", packed.exponent, -MAX_EXPONENT, MAX_EXPONENT)
    numbers = read_array(name, packed.numbers, DTYPES[packed.precision])
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
