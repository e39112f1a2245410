"""A client of secure sums as a state machine: it answers each phase of an attempt once, and none out of its order.

An attempt has four: keys, shares, the masked vector, unmasking. What a client keeps between them is bytes (`state`), since a
process may end with each message; they hold its secrets, and go when the attempt is over.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import ProtocolError
from fedkseed.federation.envelope import pack_fields, unpack_fields
from fedkseed.secure.fixed_point import FixedPoint
from fedkseed.secure.masks import common_masks, own_mask
from fedkseed.secure.messages import (
    MAX_BYTES,
    NO_SHARE,
    NUMBER,
    SEALED_BYTES,
    KeysReply,
    KeysRequest,
    MaskedReply,
    MaskedRequest,
    Message,
    Roster,
    SharesReply,
    SharesRequest,
    UnmaskReply,
    UnmaskRequest,
    pieces,
    positions,
)
from fedkseed.secure.primitives import SEED_BYTES, KeyPair, commitment, seal, split, unseal

F64 = NDArray[np.float64]
STATE = "a client's secrets"
NOTHING, KEYS, SHARES, MASKED = range(4)
"""What a client has answered last."""


@dataclass(frozen=True)
class Trained:
    """What came of local training, to be summed and never sent as it is.

    Attributes:
        vector: float64[n].
        loss: mean training loss; None if every step was dropped.
        dropped_steps: how many were.
    """

    vector: F64
    loss: float | None
    dropped_steps: int


class Identity(Protocol):
    """Who a client is to the others, by keys that do not come from the server."""

    def sign(self, data: bytes) -> bytes:
        """A signature by this client's own key."""
        ...

    def check(self, name: str, data: bytes, signature: bytes) -> None:
        """Raise a ProtocolError if these bytes are not signed by the key that a client of that name is known to have."""
        ...


@dataclass(frozen=True)
class _State:
    """What a client keeps.

    Attributes:
        answered: which phase, of the attempt at `where`.
        finished: round and attempt of the last one that it has helped to unmask.
    """

    answered: int = NOTHING
    run_id: bytes = bytes(8)
    server_round: int = 1
    attempt: int = 0
    finished: tuple[int, int] = (0, 0)
    mask_seed: bytes = b""
    share_seed: bytes = b""
    own_seed: bytes = b""
    shares: bytes = b""
    roster: tuple[Any, ...] = ()

    @property
    def where(self) -> tuple[bytes, int, int]:
        return self.run_id, self.server_round, self.attempt

    def encode(self) -> bytes:
        head = [self.answered, *self.where, *self.finished]
        return pack_fields(STATE, [*head, self.mask_seed, self.share_seed, self.own_seed, self.shares, *self.roster])

    @classmethod
    def decode(cls, data: bytes) -> _State:
        if not data:
            return cls()
        fields = unpack_fields(data, STATE, STATE, 10, MAX_BYTES, more=7)
        mask_seed, share_seed, own_seed, shares, *roster = fields[6:]
        secrets = (mask_seed, share_seed, own_seed, shares, tuple(roster))
        return cls(fields[0], fields[1], fields[2], fields[3], (fields[4], fields[5]), *secrets)


class SumClient:
    """One participant.

    Args:
        name: its stable name.
        train: answers the algorithm's own request, with what is to be summed.
        terms: 32 bytes of such a request, the same for all who are asked to do the same.
        identity: its key, and the others'; None trusts the server to hand on the others' keys as they are.
        entropy: so many random bytes; the system's, which no server can compute again.

    Attributes:
        state: what it keeps between messages; secret.
    """

    def __init__(
        self,
        name: str,
        train: Callable[[bytes], Trained],
        terms: Callable[[bytes], bytes],
        identity: Identity | None = None,
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self.name, self.state = name, b""
        self._train, self._terms, self._identity, self._entropy = train, terms, identity, entropy

    def answer(self, data: bytes) -> bytes:
        """The answer to a request of any phase; `state` has moved on with it.

        Raises:
            ProtocolError: not a request, or one for another client, or out of its order, or one whose answer would tell more
                than a sum; the state is as it was.
        """
        request = _request(data)
        if request.client != self.name:
            raise ProtocolError(f"request is for client {request.client!r}; this is {self.name!r}")
        state = _State.decode(self.state)
        reply: Message
        if isinstance(request, KeysRequest):
            reply, after = self._keys(request, state)
        elif isinstance(request, SharesRequest):
            reply, after = self._shares(request, state)
        elif isinstance(request, MaskedRequest):
            reply, after = self._masked(request, state)
        else:
            reply, after = self._unmask(request, state)
        self.state = after.encode()
        return reply.encode()

    def _keys(self, request: KeysRequest, state: _State) -> tuple[KeysReply, _State]:
        if request.run_id == state.run_id and (request.server_round, request.attempt) <= state.finished:
            raise ProtocolError(
                f"{self.name!r} has helped to unmask round {state.finished[0]}, attempt {state.finished[1]}; it takes part in "
                "no second sum of it"
            )
        mask_seed, share_seed = self._entropy(SEED_BYTES), self._entropy(SEED_BYTES)
        keys = KeyPair(mask_seed).public, KeyPair(share_seed).public
        signature = b"" if self._identity is None else self._identity.sign(signed_keys(request, *keys))
        finished = state.finished if request.run_id == state.run_id else (0, 0)
        return (
            KeysReply(*request.where, self.name, *keys, signature),
            _State(KEYS, *request.where, finished, mask_seed, share_seed),
        )

    def _shares(self, request: SharesRequest, state: _State) -> tuple[SharesReply, _State]:
        self._expect(state, request, KEYS)
        roster, about = request.roster, request.roster.digest(request.where)
        me, share_keys = self._place(roster, state), KeyPair(state.share_seed)
        if self._identity is not None:
            for name, mask_key, share_key, signature in zip(
                roster.names, roster.mask_keys, roster.share_keys, roster.signatures, strict=True
            ):
                self._identity.check(name, signed_keys(request, mask_key, share_key), signature)
        own_seed = self._entropy(SEED_BYTES)
        size = len(roster.names)
        pairs = [
            own + mask
            for own, mask in zip(
                split(own_seed, roster.threshold, size), split(state.mask_seed, roster.threshold, size), strict=True
            )
        ]
        sealed = [
            seal(share_keys.agree(key, _direction(me, other)), pairs[other], about)
            for other, key in enumerate(roster.share_keys)
            if other != me
        ]
        secrets = (state.mask_seed, state.share_seed, own_seed, pairs[me])
        kept = _State(SHARES, *state.where, state.finished, *secrets, tuple(roster.flat()))
        return SharesReply(*request.where, self.name, commitment(own_seed), b"".join(sealed)), kept

    def _masked(self, request: MaskedRequest, state: _State) -> tuple[MaskedReply, _State]:
        self._expect(state, request, SHARES)
        roster = Roster.of(*state.roster)
        about, me = roster.digest(state.where), self._place(roster, state)
        others = [position for position in range(len(roster.names)) if position != me]
        sealed = pieces(request.sealed, SEALED_BYTES)
        if len(sealed) != len(others):  # of fewer, masks with the others would be missing
            raise ProtocolError(f"sealed shares of {len(sealed)} clients came; the roster has {len(others)} others")
        if self._terms(request.train) != roster.terms:
            raise ProtocolError(
                f"{self.name!r} is asked to do something else than the roster's clients; alone with it, it would add what shows"
            )
        coding = FixedPoint(roster.clip, len(roster.names))
        share_keys = KeyPair(state.share_seed)
        pairs = {me: state.shares}
        for other, piece in zip(others, sealed, strict=True):
            try:
                pairs[other] = unseal(share_keys.agree(roster.share_keys[other], _direction(other, me)), piece, about)
            except ProtocolError:  # its sender's fault or the server's: without enough shares the sum fails, and that is all
                pairs[other] = 2 * NO_SHARE
        numbers = coded(self._train(request.train), coding, roster.weights[me])
        masks = own_mask(state.own_seed, len(numbers)) + common_masks(
            KeyPair(state.mask_seed), me, others, roster, about, len(numbers)
        )
        shares = b"".join(pairs[position] for position in sorted(pairs))
        kept = _State(MASKED, *state.where, state.finished, shares=shares, roster=state.roster)
        return MaskedReply(*request.where, self.name, (numbers + masks).astype(NUMBER).tobytes()), kept

    def _unmask(self, request: UnmaskRequest, state: _State) -> tuple[UnmaskReply, _State]:
        self._expect(state, request, MASKED)
        roster = Roster.of(*state.roster)
        stayed, left = positions("stayed", request.stayed), positions("left", request.left)
        if both := set(stayed) & set(left):
            raise ProtocolError(f"{_named(roster, both)!r} is said to have stayed and left; its vector would lie open")
        if tuple(sorted((*stayed, *left))) != tuple(range(len(roster.names))):
            raise ProtocolError("those who stayed and left are others than the roster; expected each once")
        if self.name not in (roster.names[position] for position in stayed):
            raise ProtocolError(f"{self.name!r} is not among those who stayed, and was asked")
        if len(stayed) < roster.threshold:
            raise ProtocolError(f"{len(stayed)} of {len(roster.names)} clients stayed; expected at least {roster.threshold}")
        pairs = pieces(state.shares, 2 * SEED_BYTES)
        shares = [pair[:SEED_BYTES] if i in stayed else pair[SEED_BYTES:] for i, pair in enumerate(pairs)]
        done = _State(NOTHING, *state.where, (request.server_round, request.attempt))
        return UnmaskReply(*request.where, self.name, b"".join(shares)), done

    def _expect(self, state: _State, request: Message, answered: int) -> None:
        if state.answered != answered or state.where != request.where:
            raise ProtocolError(
                f"{self.name!r} has answered phase {state.answered} of round {state.server_round}, attempt {state.attempt}; "
                f"round {request.server_round}, attempt {request.attempt} wants phase {answered}, and each is answered once"
            )

    def _place(self, roster: Roster, state: _State) -> int:
        if self.name not in roster.names:
            raise ProtocolError(f"the roster lacks {self.name!r}, whom it was sent to")
        me = roster.names.index(self.name)
        keys = KeyPair(state.mask_seed).public, KeyPair(state.share_seed).public
        if (roster.mask_keys[me], roster.share_keys[me]) != keys:
            raise ProtocolError(f"the roster has other keys of {self.name!r} than it has made")
        return me


def coded(trained: Trained, coding: FixedPoint, weight: float) -> NDArray[np.uint32]:
    """What a client adds to the sum, uint32[n + 3]: its vector, its loss, whether it has one, how many steps it dropped.

    Raises:
        ProtocolError: a number is not finite.
    """
    known = 0.0 if trained.loss is None else 1.0
    mean = np.concatenate([trained.vector, [trained.loss or 0.0, known * coding.clip]])
    return np.append(coding.encode(mean, weight), np.uint32(trained.dropped_steps))


def signed_keys(request: Message, mask_key: bytes, share_key: bytes) -> bytes:
    """What a client's node key signs: its fresh keys, for one attempt."""
    return pack_fields("keys of a secure sum", [*request.where, mask_key, share_key])


def _direction(sender: int, receiver: int) -> bytes:
    return b"share %d %d" % (sender, receiver)


def _named(roster: Roster, found: set[int]) -> str:
    return roster.names[min(found)] if min(found) < len(roster.names) else "a stranger"


def _request(data: Any) -> KeysRequest | SharesRequest | MaskedRequest | UnmaskRequest:
    """The request of these bytes, whose kind are two letters after the first byte."""
    kind = data[2:4] if isinstance(data, bytes) and data[1:2] == b"\xa2" else None
    for one in (KeysRequest, SharesRequest, MaskedRequest, UnmaskRequest):
        if kind == one.kind.encode():
            return one.decode(data)
    raise ProtocolError("message is no request of a secure sum; expected one, and this client answers nothing else")
