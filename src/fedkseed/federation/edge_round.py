"""One attempt at a round through edges, as a state machine of the server: `ask` for messages, `hear` what came, until over.

The server never sees a reply. It knows of each what weighing needs, and of all of an edge's their sum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from fedkseed.errors import ProtocolError
from fedkseed.federation.divided import DividedRounds
from fedkseed.federation.edge import settings_digest
from fedkseed.federation.edge_messages import MAX_REASON, Asking, LengthsReply, Opening, Report, SumsReply
from fedkseed.federation.envelope import Head
from fedkseed.federation.outcome import Contribution, Outcome, Refusal
from fedkseed.federation.parts import F64, I64, ROUNDING, Closing, Lengths, Question
from fedkseed.federation.streams import place_of
from fedkseed.text import visible

T = TypeVar("T")
R = TypeVar("R")
Replies = Iterable[tuple[str, bytes]]


@dataclass(frozen=True)
class Side:
    """What an edge has told.

    Attributes:
        names: whose replies it has accepted, in their order.
        report: all that it has said of those that it was to ask.
        accepted: their places among these.
    """

    names: tuple[str, ...]
    report: Report
    accepted: I64


class EdgeRound:
    """One attempt.

    Args:
        rounds: the server; it plans its next round or attempt.
        behind: the clients behind each edge, by its name; together all that the server may ask.

    Attributes:
        asked: whom each edge is to ask, by its name.
        over: whether nothing more is to be asked.
        outcome: what became of it, once it is over.
    """

    def __init__(self, rounds: DividedRounds[Any, Any], behind: Mapping[str, Sequence[str]]) -> None:
        self._rounds = rounds
        requests = rounds.plan()
        cohort, state, head = list(rounds.asked), rounds.state(), requests[0].head()
        self.asked = {
            edge: chosen
            for edge, clients in sorted(behind.items())
            if (chosen := tuple(name for name in sorted(clients) if place_of(name, cohort) is not None))
        }
        self._head = head | {"digest": hashlib.sha256(state).digest()}
        settings = settings_digest(rounds.config)
        self._messages: dict[str, Callable[[], bytes]] = {
            edge: Opening(**self._at(edge), settings=settings, clients=clients, state=state).encode
            for edge, clients in self.asked.items()
        }
        self._hear: Callable[[dict[str, bytes]], None] = self._reports
        self._sides: dict[str, Side] = {}
        self._refusals: list[Refusal] = []
        self._missing: set[str] = set(cohort)
        self._closing: Closing | None = None
        self._told: dict[str, Lengths] = {}
        self.over = False
        self.outcome: Outcome | None = None

    def ask(self) -> dict[str, bytes]:
        """The next messages, by edge."""
        return {edge: encode() for edge, encode in self._messages.items()}

    def hear(self, replies: Replies) -> None:
        """Take what came of them, as (edge, bytes) in any order, and go on; nothing that an edge sends raises.

        Of an edge whose answer is bad or does not come, nothing is used: what the others have is asked for without it.
        """
        came: dict[str, bytes] = {}
        for edge, data in sorted(replies, key=lambda reply: reply[0]):
            if edge in self._messages:
                came.setdefault(edge, data)
            else:
                self._refusals.append(Refusal(edge, f"{edge!r} was not asked in this phase"))
        self._hear(came)

    def _reports(self, came: Mapping[str, bytes]) -> None:
        for edge, clients in self.asked.items():
            if edge in came and (side := self._used(self._side, edge, came[edge], clients)) is not None:
                self._sides[edge] = side
                self._missing -= {*side.names, *(clients[place] for place in side.report.refused)}
                self._refusals += [
                    Refusal(clients[place], visible(reason)[:MAX_REASON])
                    for place, reason in zip(side.report.refused, side.report.reasons, strict=True)
                ]
        self._begin()

    def _begin(self) -> None:
        """Weigh what the edges have accepted, and ask what closing the round needs."""
        num_examples = {
            name: count
            for side in self._sides.values()
            for name, count in zip(side.names, side.report.num_examples[side.accepted].tolist(), strict=True)
        }
        weights = self._rounds.weights(num_examples)
        if len(weights) < self._rounds.config.min_replies:
            self._end(weights, None)
            return
        names = [name for side in self._sides.values() for name in side.names]
        self._order = np.array(sorted(range(len(names)), key=names.__getitem__), np.int64)
        words = [side.report.words[side.accepted] for side in self._sides.values() if side.report.words.size]
        self._told, self._weights = {}, weights
        self._closing = self._rounds.closing(weights, np.concatenate(words)[self._order] if words else np.zeros(0))
        self._go_on(None)

    def _go_on(self, answer: Any) -> None:
        """Hear the closing's next question, and make messages of it; or the end."""
        assert self._closing is not None  # set before
        try:
            question = self._closing.send(answer)
        except StopIteration as end:
            self._end(self._weights, end.value)
            return
        sides = {edge: side for edge, side in self._sides.items() if side.names}
        shares: dict[str, F64 | None] = dict.fromkeys(sides)
        if question.weights is not None:
            by_edge = np.empty(len(self._order))
            by_edge[self._order] = question.weights
            cuts = np.cumsum([len(side.names) for side in sides.values()])[:-1]
            shares = dict(zip(sides, np.split(by_edge, cuts), strict=True))
        self._messages = {
            edge: Asking(**self._at(edge), limit=question.limit, weights=share).encode for edge, share in shares.items()
        }
        self._hear = lambda came: self._numbers(question, shares, came)

    def _numbers(self, question: Question, shares: Mapping[str, F64 | None], came: Mapping[str, bytes]) -> None:
        """Put the edges' answers together; without all of them, begin anew with those that answered."""
        found: dict[str, Any] = {}
        for edge, share in shares.items():
            if edge in came and (answer := self._used(self._answer, edge, came[edge], share)) is not None:
                found[edge] = answer
        if len(found) < len(shares):
            for edge in shares.keys() - found.keys():
                self._missing |= set(self._sides.pop(edge).names)
            self._begin()
        elif question.weights is None:
            self._told = found
            lengths = np.concatenate([told.lengths for told in found.values()])
            self._go_on(Lengths(lengths[self._order], np.concatenate([told.clipped for told in found.values()])[self._order]))
        else:
            self._go_on(np.sum(list(found.values()), axis=0))

    def _answer(self, edge: str, data: bytes, share: F64 | None) -> Lengths | I64:
        side = self._sides[edge]
        steps = np.array([self._rounds.steps[name] for name in side.names]) - side.report.dropped_steps[side.accepted]
        if share is None:
            lengths = LengthsReply.decode(data, len(side.names))
            self._check_head(edge, lengths)
            if (lengths.lengths > self._rounds.longest(steps) * ROUNDING).any():
                raise ProtocolError(f"a reply's numbers are of length {lengths.lengths.max():g}, which none can have")
            return Lengths(lengths.lengths, lengths.clipped)
        sums = SumsReply.decode(data, self._rounds.rows_shape)
        self._check_head(edge, sums)
        told = self._told.get(edge)
        self._rounds.check_rows(sums.rows, share, None if told is None else told.lengths, steps)
        return sums.rows

    def _side(self, edge: str, data: bytes, clients: tuple[str, ...]) -> Side:
        """What an edge says of its clients' replies, held to what the server would accept of them."""
        report = Report.decode(data, len(clients))
        self._check_head(edge, report)
        if (report.num_examples < 0).any():
            raise ProtocolError("a client has fewer than no records")
        accepted = np.flatnonzero(report.num_examples > 0)
        names = tuple(clients[place] for place in accepted.tolist())
        columns = (report.num_examples, report.dropped_steps, report.losses, report.sizes)
        for name, examples, dropped, loss, size in zip(names, *(column[accepted].tolist() for column in columns), strict=True):
            if np.isinf(loss):
                raise ProtocolError(f"the loss of {name!r} is {loss}; expected a finite float, or none")
            self._rounds.check_told(name, examples, None if np.isnan(loss) else loss)
            if not 0 <= dropped <= self._rounds.steps[name]:
                raise ProtocolError(f"{name!r} dropped {dropped} of {self._rounds.steps[name]} steps; expected no more")
            if not (np.isnan(size) or 0 <= size < np.inf):
                raise ProtocolError(f"the size of what {name!r} sent is {size}; expected a number from 0 on")
        if report.words.size != self._rounds.tells_words * len(clients):
            raise ProtocolError(f"{report.words.size} words about the scale of scalars came; expected one of each, or none")
        if not ((report.words >= 0) & np.isfinite(report.words)).all():
            raise ProtocolError("what is said of the scale of scalars is negative or not finite")
        odd = any(place >= len(clients) for place in report.refused)
        if odd or len(report.reasons) != len(report.refused) or len(set(report.refused)) < len(report.refused):
            raise ProtocolError("who was refused was not asked, or has not one reason each")
        return Side(names, report, accepted)

    def _used(self, read: Callable[[str, bytes, T], R], edge: str, data: bytes, about: T) -> R | None:
        """What is read of an edge's message; None if it cannot be used, which is a refusal."""
        try:
            return read(edge, data, about)
        except ProtocolError as error:
            self._refusals.append(Refusal(edge, str(error)))
            return None

    def _check_head(self, edge: str, message: Head) -> None:
        for what, expected in self._at(edge).items():
            if getattr(message, what) != expected:
                raise ProtocolError(f"answer to another question: {what} differs; expected that of this round and edge")

    def _at(self, edge: str) -> dict[str, Any]:
        return {**self._head, "client": edge}

    def _end(self, weights: Mapping[str, float], treated: Mapping[str, Mapping[str, float]] | None) -> None:
        """Say what became of the round: closed, if somebody was treated in some way or none."""
        contributions = []
        for side in self._sides.values():
            columns = (side.report.num_examples, side.report.dropped_steps, side.report.losses, side.report.sizes)
            for name, examples, dropped, loss, size in zip(
                side.names, *(column[side.accepted].tolist() for column in columns), strict=True
            ):
                sizes = {} if np.isnan(size) else {self._rounds.size_name: size}
                contributions.append(
                    Contribution(
                        name,
                        weights[name],
                        examples,
                        self._rounds.steps[name],
                        dropped,
                        None if np.isnan(loss) else loss,
                        sizes | dict((treated or {}).get(name, {})),
                    )
                )
        contributions.sort(key=lambda one: one.client)
        self.over, self._messages = True, {}
        self.outcome = self._rounds.absorb_parts(
            contributions, treated is not None, sorted(self._refusals, key=lambda one: one.client), sorted(self._missing)
        )
