"""The server of a secure sum as a state machine: `ask` for a phase's messages, `hear` what came back, four times.

It never sees a vector without masks. It takes off those of the sum: own masks of clients that stayed, by their seeds; masks in
common with clients that left, by the seeds of their keys. Of no client does it ask for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from fedkseed.errors import ProtocolError
from fedkseed.federation.cohort import shares
from fedkseed.federation.contradictions import MIN_COHORT, MOST_WEIGHT
from fedkseed.federation.outcome import Refusal, Summed
from fedkseed.secure.fixed_point import FixedPoint
from fedkseed.secure.masks import common_masks, own_mask
from fedkseed.secure.messages import (
    NO_SHARE,
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
    as_positions,
    pieces,
)
from fedkseed.secure.primitives import SEED_BYTES, KeyPair, check_public, combine, commitment

TAIL = 3
"""What a vector has at its end: the loss, whether there is one, how many steps were dropped."""
M = TypeVar("M", bound=Message)
Replies = Iterable[tuple[str, bytes]]


@dataclass(frozen=True)
class Plan:
    """What is to be summed.

    Attributes:
        where: run, round and attempt.
        train: the algorithm's own request to each client, by name.
        sizes: what a client weighs by, by name: its number of records, or 1.
        terms: 32 bytes, of what all these requests have in common.
        length: how many numbers a vector has.
        clip: the largest of them.
        max_share: the largest weight of one; at most a half whatever it is.
        min_replies: how many clients must stay at least.
    """

    where: tuple[bytes, int, int]
    train: Mapping[str, bytes]
    sizes: Mapping[str, int]
    terms: bytes
    length: int
    clip: float
    max_share: float | None = None
    min_replies: int = 1


class SecureSum:
    """One attempt at a sum.

    Args:
        plan: what is to be summed.

    Attributes:
        refusals: whose replies were not used, and why.
        missing: who was asked in some phase and sent nothing.
        phase: what is asked for now.
        over: whether nothing more is to be asked.
        summed: the sum, once it is over; None if too few stayed.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.refusals: list[Refusal] = []
        self.missing: list[str] = []
        self.over = False
        self.summed: Summed | None = None
        self._begin(plan.train)

    def ask(self) -> dict[str, bytes]:
        """The messages of the next phase, by client."""
        return {name: request.encode() for name, request in self._requests.items()}

    def again(self, client: str, train: bytes) -> bytes | None:
        """The message of the masked phase with another training request, for a client that lacks what the first builds on."""
        request = self._requests.get(client)
        return replace(request, train=train).encode() if isinstance(request, MaskedRequest) else None

    def hear(self, replies: Replies) -> None:
        """Take what came of a phase, as (sender, bytes) in any order, and go on; nothing that a client sends raises."""
        self._hear(replies)

    def _begin(self, clients: Iterable[str]) -> None:
        """Ask these for keys."""
        self._requests: dict[str, Message] = {name: KeysRequest(*self._plan.where, name) for name in sorted(clients)}
        self._hear: Callable[[Replies], None] = self._keys
        self.phase = "keys"

    def _keys(self, replies: Replies) -> None:
        """Make the roster of those who have sent keys."""
        plan, seen = self._plan, set[bytes]()

        def check(reply: KeysReply) -> None:
            for key in (reply.mask_key, reply.share_key):
                check_public(key)  # else it would lead all the others into an error
                if key in seen:
                    raise ProtocolError("a public key came twice; expected fresh ones")
                seen.add(key)

        found = self._read(KeysReply, replies, check)
        if len(found) < max(MIN_COHORT, plan.min_replies):
            self._end()
            return
        signed = all(reply.signature for reply in found.values())
        most = max(MOST_WEIGHT if plan.max_share is None else min(plan.max_share, MOST_WEIGHT), 1 / len(found))
        self._roster = roster = Roster(
            tuple(found),
            tuple(shares({name: plan.sizes[name] for name in found}, most).values()),
            tuple(reply.mask_key for reply in found.values()),
            tuple(reply.share_key for reply in found.values()),
            tuple(reply.signature if signed else b"" for reply in found.values()),
            plan.terms,
            plan.clip,
        )
        self._requests = {name: SharesRequest(*plan.where, name, roster) for name in found}
        self._hear, self.phase = self._shares, "shares"

    def _shares(self, replies: Replies) -> None:
        """Hand on the sealed shares and have all train; if some are missing, begin anew without those who owe them.

        So that whoever masks does so with the whole roster: a server that could name another set to each client would need
        fewer of them on its side to take masks off.
        """
        plan, roster, size = self._plan, self._roster, len(self._roster.names)

        def check(reply: SharesReply) -> None:
            if len(reply.sealed) != SEALED_BYTES * (size - 1):
                raise ProtocolError(f"{len(reply.sealed)} bytes of sealed shares came; expected {SEALED_BYTES * (size - 1)}")

        found = self._read(SharesReply, replies, check)
        if len(found) < size:
            self._begin(found)
            return
        self._commitments = [reply.commitment for reply in found.values()]
        boxes = [pieces(reply.sealed, SEALED_BYTES) for reply in found.values()]
        self._requests = {
            name: MaskedRequest(
                *plan.where,
                name,
                b"".join(box[me - (me > other)] for other, box in enumerate(boxes) if other != me),
                plan.train[name],
            )
            for me, name in enumerate(roster.names)
        }
        self._hear, self.phase = self._masked, "masked numbers"

    def _masked(self, replies: Replies) -> None:
        """Add up the masked vectors, and ask for what takes off the masks of the sum."""
        plan, roster, length = self._plan, self._roster, self._plan.length + TAIL

        def check(reply: MaskedReply) -> None:
            if len(reply.vector) != length:
                raise ProtocolError(f"{len(reply.vector)} masked numbers came; expected {length}")

        found = self._read(MaskedReply, replies, check)
        if len(found) < max(roster.threshold, plan.min_replies):
            self._end()
            return
        self._total = np.zeros(length, np.uint32)
        for reply in found.values():
            self._total += reply.vector
        self._stayed = tuple(position for position, name in enumerate(roster.names) if name in found)
        self._left = tuple(position for position, name in enumerate(roster.names) if name not in found)
        stayed, left = as_positions(self._stayed), as_positions(self._left)
        self._requests = {name: UnmaskRequest(*plan.where, name, stayed, left) for name in found}
        self._hear, self.phase = self._unmask, "unmasking"

    def _unmask(self, replies: Replies) -> None:
        """Put the secrets together, take off the masks, decode."""
        plan, roster, size = self._plan, self._roster, len(self._roster.names)

        def check(reply: UnmaskReply) -> None:
            if len(reply.shares) != SEED_BYTES * size:
                raise ProtocolError(f"{len(reply.shares)} bytes of shares came; expected {SEED_BYTES * size}")

        found = self._read(UnmaskReply, replies, check)
        held = {roster.names.index(name): pieces(reply.shares, SEED_BYTES) for name, reply in found.items()}
        total, about, length = self._total, roster.digest(plan.where), len(self._total)
        try:
            for position in range(size):
                given = {holder: each[position] for holder, each in held.items() if each[position] != NO_SHARE}
                if position in self._left:
                    seed = self._secret(given, lambda seed: KeyPair(seed).public, roster.mask_keys[position])
                    # what those who stayed have added in common with it
                    total = total + common_masks(KeyPair(seed), position, self._stayed, roster, about, length)
                else:
                    seed = self._secret(given, commitment, self._commitments[position])
                    total = total - own_mask(seed, length)
        except ProtocolError as error:
            self.refusals.append(Refusal(roster.names[position], str(error)))
            self._end()
            return
        weight = sum(roster.weights[position] for position in self._stayed)
        *mean, loss, known = FixedPoint(plan.clip, len(roster.names)).decode(total[:-1], weight)
        self.summed = Summed(
            {roster.names[position]: roster.weights[position] / weight for position in self._stayed},
            np.array(mean),
            float(np.clip(loss / known * plan.clip, -plan.clip, plan.clip)) if known > 0 else None,
            int(total[-1]),
        )
        self._end()

    def _secret(self, given: Mapping[int, bytes], known_by: Callable[[bytes], bytes], known: bytes) -> bytes:
        """The seed of which holders gave these shares, by what is known of it; one holder may have given a false one."""
        need = self._roster.threshold
        holders = sorted(given)
        for without in (None, *holders):
            trusted = [holder for holder in holders if holder != without][:need]
            if len(trusted) < need:
                break
            seed = combine([(holder, given[holder]) for holder in trusted])
            if known_by(seed) == known:
                return seed
        raise ProtocolError(
            f"{len(given)} shares of its secret came, of which no {need} give it back; it is left out of the next attempt"
        )

    def _end(self) -> None:
        self.over, self._requests = True, {}

    def _read(self, kind: type[M], replies: Replies, check: Callable[[M], None] = lambda reply: None) -> dict[str, M]:
        """The good replies to this phase's requests, by client in the order of names; the others go into `refusals`."""
        found: dict[str, M] = {}
        answered: set[str] = set()
        for sender, data in sorted(replies, key=lambda reply: reply[0]):
            answered.add(sender)
            try:
                if sender not in self._requests:
                    raise ProtocolError(f"{sender!r} was not asked in this phase")
                reply = kind.decode(data)
                if (*reply.where, reply.client) != (*self._plan.where, sender):
                    raise ProtocolError("reply to another request: run, round, attempt or client differ; expected those asked")
                if sender in found:
                    raise ProtocolError("a second reply to one request")
                check(reply)
                found[sender] = reply
            except ProtocolError as error:
                self.refusals.append(Refusal(sender, str(error)))
        self.missing += sorted(self._requests.keys() - answered)
        return found
