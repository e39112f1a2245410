"""An edge: it stands between the server and some clients, and tells of their replies what the server asks (docs/edges.md).

It is a server's own state machine for the clients behind it: the same requests, the same checks, the same sums.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from fedkseed.errors import FedKSeedError, ProtocolError
from fedkseed.federation.config import FederationConfig
from fedkseed.federation.divided import DividedRounds
from fedkseed.federation.edge_messages import MAX_REASON, Asking, LengthsReply, Opening, Report, SumsReply
from fedkseed.federation.envelope import Request
from fedkseed.federation.parts import Part
from fedkseed.federation.streams import place_of
from fedkseed.text import visible


def settings_digest(config: FederationConfig) -> bytes:
    """SHA-256 of the settings that server and edge must share."""
    return hashlib.sha256(config.model_dump_json(include=set(FederationConfig.model_fields)).encode()).digest()


class Edge:
    """One edge. Call `open` with what the server sends, `close` with the clients' replies, then `answer` until it asks no more.

    Args:
        name: its stable name.
        rounds: a server of the run's settings and base, of no clients; the edge's own.
        clients: the names of those behind it.
        num_examples: how many records each has, where that is known.

    Raises:
        ProtocolError: a name is none.
        RunError: see `Rounds`.
    """

    def __init__(
        self, name: str, rounds: DividedRounds[Any, Any], clients: Sequence[str], num_examples: Mapping[str, int] | None = None
    ) -> None:
        self.name, self._rounds = name, rounds
        rounds.enrol(clients, num_examples)
        self._opening: Opening | None = None
        self._part: Part | None = None
        self._accepted = 0

    def open(self, data: bytes) -> Sequence[Request]:
        """The requests to the clients of a round, each made when it is asked for.

        Raises:
            ProtocolError: it is no opening, or not one for this edge.
        """
        self._opening = self._part = None
        opening = Opening.decode(data)
        if opening.client != self.name:
            raise ProtocolError(f"request is for edge {opening.client!r}; this is {self.name!r}")
        if opening.settings != settings_digest(self._rounds.config):
            raise ProtocolError("the server's settings are others than this edge's; give both the same")
        if opening.digest != hashlib.sha256(opening.state).digest():
            raise ProtocolError("the checkpoint does not have the digest that came with it; expected what was sent")
        strangers = [name for name in opening.clients if place_of(name, self._rounds.clients) is None]
        if strangers:
            raise ProtocolError(f"{strangers[0]!r} is not behind edge {self.name!r}; expected only clients that are")
        try:
            self._rounds.go_to(opening.state)
            requests = self._rounds.plan_for(opening.clients, opening.attempt)
        except ProtocolError:
            raise
        except FedKSeedError as error:
            raise ProtocolError(f"the checkpoint cannot be used: {error}") from error
        first: Request = requests[0]
        for what in ("run_id", "server_round", "base"):
            if getattr(first, what) != getattr(opening, what):
                raise ProtocolError(f"{what} is not the one that this edge's settings and the checkpoint give")
        self._opening = opening
        return requests

    def close(self, replies: Iterable[tuple[str, bytes]]) -> bytes:
        """What became of the replies, as (sender, bytes) in any order; nothing that a client sends raises.

        Raises:
            ProtocolError: no round is open.
        """
        if self._opening is None or self._part is not None:
            raise ProtocolError("no round is open at this edge; call open() before close()")
        opening, heard = self._opening, self._rounds.hear(replies)
        where = {name: place for place, name in enumerate(opening.clients)}
        places = [where[one.client] for one in heard.contributions]
        arrays = [np.zeros(len(opening.clients), kind) for kind in (np.int64, np.int64, float, float)]
        num_examples, dropped, losses, sizes = arrays
        losses[:], sizes[:] = np.nan, np.nan
        for place, one in zip(places, heard.contributions, strict=True):
            num_examples[place], dropped[place] = heard.num_examples[one.client], one.dropped_steps
            losses[place] = np.nan if one.loss is None else one.loss
            sizes[place] = next(iter(one.sizes.values()), np.nan)
        self._part, self._accepted = self._rounds.part(heard.replies), len(places)
        words = np.zeros(len(opening.clients) if self._rounds.tells_words else 0)
        if words.size:
            words[places] = self._part.words()
        refused: dict[int, str] = {}
        for refusal in heard.refusals:
            if refusal.client in where:  # the first of each, so that nobody can make the report long
                refused.setdefault(where[refusal.client], visible(refusal.reason)[:MAX_REASON])
        return Report(**opening.head(), num_examples=num_examples, dropped_steps=dropped, losses=losses, sizes=sizes,
                      words=words, refused=tuple(refused), reasons=tuple(refused.values())).encode()  # fmt: skip

    def answer(self, data: bytes) -> bytes:
        """The answer to one of the server's questions.

        Raises:
            ProtocolError: it is no question, or not about this round's replies.
        """
        if self._opening is None or self._part is None:
            raise ProtocolError("no round is closed at this edge; call open() and close() before answer()")
        question = Asking.decode(data, self._accepted)
        if question.head() != self._opening.head():
            raise ProtocolError("question about another round; expected the one that was opened last")
        if question.weights is None:
            told = self._part.lengths(question.limit)
            return LengthsReply(**question.head(), lengths=told.lengths, clipped=told.clipped).encode()
        return SumsReply(**question.head(), rows=self._part.rows(question.limit, question.weights)).encode()
