"""What the servers of all algorithms have in common: who is asked, whose reply counts, and for how much of a round."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import InvalidValueError, ProtocolError, RunError
from fedkseed.federation.checkpoint import Checkpoint
from fedkseed.federation.cohort import count_steps, draw_cohort, shares
from fedkseed.federation.config import FederationConfig
from fedkseed.federation.envelope import Reply, Request, check_loss, check_name
from fedkseed.federation.exact_sum import MAX_TERMS
from fedkseed.federation.outcome import Contribution, Outcome, Refusal, Status, Summed
from fedkseed.federation.parts import Treated
from fedkseed.federation.schedule import learning_rate
from fedkseed.federation.streams import InTurn, Read, Taken
from fedkseed.privacy import WITHHELD

MAX_ATTEMPTS = 3
MOST_GUESSES = 10_000
"""A mean loss of training is at most so many times that of a guess; a run that diverges makes it large by itself."""


RequestT = TypeVar("RequestT", bound=Request)
ReplyT = TypeVar("ReplyT", bound=Reply)


@dataclass(frozen=True)
class Heard(Generic[ReplyT]):
    """What is to be used of the replies to a round's requests.

    Attributes:
        taken: the bytes of those that were accepted, by client.
        replies: what these say, read anew whenever it is asked for.
        num_examples: how many records each of these clients has.
        contributions: what is told of each, sorted by client, without its weight.
        refusals, missing: see `Outcome`.
    """

    taken: Mapping[str, bytes]
    replies: Mapping[str, ReplyT]
    num_examples: Mapping[str, int]
    contributions: tuple[Contribution, ...]
    refusals: tuple[Refusal, ...]
    missing: tuple[str, ...]


class Rounds(ABC, Generic[RequestT, ReplyT]):
    """A server as a state machine: `plan` a round's requests, `absorb` what came back. It never loops, sends or logs.

    What is sent, and what becomes of accepted replies, is the algorithm's: the abstract methods.

    Args:
        config: the settings.
        run_id: 8 bytes, the same for all messages of the run.
        clients: the stable names of all clients; `admit` changes them between rounds; None if nobody is here yet.
        guess_loss: the loss of a guess; a mean loss below 0 or above 10,000 times this is refused; None, or another objective
            than the loss: any finite one will do.
        num_examples: how many records each client has, by its name, which its replies must say too; needed where `local_unit`
            is epochs.

    Attributes:
        mechanism: what each round's mean goes through where the settings hide clients; None where they do not.

    Raises:
        RunError: there are fewer clients than `min_replies`, or a name twice, or a client's epochs are too many steps.
        InvalidValueError: the loss of a guess, or a number of records, is none.
    """

    def __init__(
        self,
        config: FederationConfig,
        run_id: bytes,
        clients: Sequence[str] | None,
        guess_loss: float | None = None,
        num_examples: Mapping[str, int] | None = None,
    ) -> None:
        is_number = isinstance(guess_loss, Real) and not isinstance(guess_loss, bool)
        if guess_loss is not None and not (is_number and 0 < guess_loss < math.inf):
            raise InvalidValueError(f"guess_loss is {guess_loss!r:.40}; expected a finite number above 0, or None")
        self.config, self.run_id, self.guess_loss = config, run_id, guess_loss
        self.mechanism = config.privacy.mechanism if config.dp == "client" and config.privacy else None
        self._attempt = 0
        self._failed: set[str] = set()
        self._num_examples: Mapping[str, int] = {}
        self.forward_only: frozenset[str] | None = None
        self._pending: Mapping[str, RequestT] = {}
        self.clients: tuple[str, ...] = ()
        if clients is not None:
            self.admit(clients, num_examples)

    @property
    @abstractmethod
    def checkpoint(self) -> Checkpoint:
        """Where the federation is after the last closed round."""

    @abstractmethod
    def _requests(self, server_round: int, attempt: int, cohort: Sequence[str], lr: float) -> Mapping[str, RequestT]:
        """What to ask of each client of a cohort, in its order: `Requests`, where there may be many."""

    @abstractmethod
    def _decode(self, data: bytes) -> ReplyT:
        """The reply of these bytes, or a ProtocolError."""

    @abstractmethod
    def _check(self, request: RequestT, reply: ReplyT) -> None:
        """Raise a ProtocolError if what the reply holds, beside its head, is not an answer to the request."""

    @abstractmethod
    def _close(self, replies: Mapping[str, ReplyT], weights: Mapping[str, float]) -> Treated:
        """Move the checkpoint on by the accepted replies, in the order of the clients' names.

        Each reply is read anew whenever it is asked for, so that a cohort's need not fit into memory.

        Returns:
            What became of a client's numbers on the way, by the names that `metrics.jsonl` has for it; {} if nothing did.
        """

    def _close_mean(self, mean: NDArray[np.float64]) -> None:
        """Move the checkpoint on by the weighted mean of vectors of which none is known, where clients can send such."""
        raise RunError(f"{self.config.algorithm} has no use for a sum of vectors; leave out --secure-sums")

    def _sizes(self, request: RequestT, reply: ReplyT) -> Mapping[str, float]:
        """How large what an accepted reply sends is, by the names that `metrics.jsonl` has for it; nothing by default."""
        return {}

    def admit(
        self,
        clients: Sequence[str],
        num_examples: Mapping[str, int] | None = None,
        forward_only: Collection[str] | None = None,
    ) -> None:
        """Set whom the next rounds may ask, by their stable names; `num_examples` as above.

        Args:
            clients, num_examples: see the class.
            forward_only: those of them that cannot backpropagate, where clients say so; None: as the settings have it.

        Raises:
            ProtocolError: a name is not 1 to 64 bytes of printable text.
            RunError: there are fewer clients than `min_replies`, or a name twice, or a client's epochs are too many steps.
            InvalidValueError: a number of records is none.
        """
        cohort_size = self.config.cohort_size(len(clients))
        if cohort_size < self.config.min_replies or not clients:
            raise RunError(
                f"a round asks {cohort_size} of {len(clients)} clients, too few for min_replies = {self.config.min_replies}; "
                "raise --fraction-train or --num-clients, or lower --min-replies"
            )
        if cohort_size < self.config.min_cohort:
            raise RunError(
                f"a round asks {cohort_size} of {len(clients)} clients, and a secure sum hides nobody among fewer than "
                f"{self.config.min_cohort}; raise --fraction-train or --num-clients"
            )
        if self.config.summation == "exact" and cohort_size > MAX_TERMS:
            raise RunError(f"a round asks {cohort_size} clients; an exact sum has at most {MAX_TERMS}: lower --fraction-train")
        self.enrol(clients, num_examples)
        self.cohort_size = cohort_size
        self.forward_only = None if forward_only is None else frozenset(forward_only)

    def enrol(self, clients: Sequence[str], num_examples: Mapping[str, int] | None = None) -> None:
        """Know these clients, however many there are: an edge's, whose cohorts somebody else draws; see `admit`."""
        for name in clients:
            check_name(name)
        for name, number in (num_examples or {}).items():
            if not isinstance(number, Integral) or isinstance(number, bool) or number < 0:
                raise InvalidValueError(f"num_examples of {name!r:.80} is {number!r:.40}; expected how many records it has")
        if len(set(clients)) != len(clients):
            raise RunError("two clients have the same name; names must be distinct")
        known = dict(num_examples or {})
        self.steps = {name: count_steps(self.config, known.get(name), name) for name in clients}
        self.clients, self._num_examples = tuple(sorted(clients)), known

    def roster(self) -> dict[str, Any]:
        """What `admit` was last given, by the names of its arguments."""
        asked_for_scalars = None if self.forward_only is None else sorted(self.forward_only)
        return {
            "clients": list(self.clients),
            "num_examples": {name: self._num_examples[name] for name in self.clients if name in self._num_examples},
            "forward_only": asked_for_scalars,
        }

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self.checkpoint.round >= self.config.num_rounds

    def plan(self) -> Sequence[RequestT]:
        """The requests of the next round, or of the next attempt at it, sorted by client; each is made when it is asked for.

        Another attempt asks none whose reply the ones before lacked, as long as enough others are there.

        Raises:
            RunError: all rounds are done, or the last attempt at this one has failed.
        """
        if self.finished:
            done = f"all {self.config.num_rounds} rounds are" if self.config.num_rounds > 1 else "the only round is"
            raise RunError(f"{done} done; raise --num-rounds to go on")
        if not self.clients:
            raise RunError("nobody is here; admit clients before a round is planned")
        if self._attempt >= MAX_ATTEMPTS:
            raise RunError(f"round {self.checkpoint.round + 1} failed {MAX_ATTEMPTS} times; see the refusals, then resume")
        return self.plan_for(self.cohort(), self._attempt)

    def plan_for(self, cohort: Sequence[str], attempt: int) -> Sequence[RequestT]:
        """The same for a cohort that somebody else has drawn, sorted; its clients are known."""
        done = self.checkpoint.round
        lr = learning_rate(self.config.schedule, self.config.lr, done, self.config.num_rounds)
        self._pending = self._requests(done + 1, attempt, cohort, lr)
        return InTurn(self._pending)

    @property
    def asked(self) -> Collection[str]:
        """Whom the planned requests are for, sorted."""
        return self._pending.keys()

    def cohort(self) -> list[str]:
        """Whom the next round's requests, or those of the next attempt at it, are for; sorted."""
        others = [name for name in self.clients if name not in self._failed]
        asked = others if len(others) >= self.config.min_cohort else self.clients
        return draw_cohort(self.config, asked, self.cohort_size, self.checkpoint.round + 1, self._attempt)

    def whole(self, client: str) -> RequestT | None:
        """A planned request for a client that has lost what it was taken to have; None if the planned one builds on nothing."""
        return None

    def absorb(self, replies: Iterable[tuple[str, bytes]]) -> Outcome:
        """Close the round with the replies that came, as (sender, bytes) in any order, or ask for another attempt.

        Nothing that a client sends raises: a reply that is malformed, is not an answer to this round's request, or
        breaks a limit is refused, and the rest goes on without it. Of a sender's replies the first good one counts.

        Raises:
            RunError: no round is planned.
        """
        heard = self.hear(replies)
        weights = self.weights(heard.num_examples)
        server_round = self.checkpoint.round + 1
        treated: Treated = {}
        if len(weights) < self.config.min_replies:
            status = self._repeat(self._pending.keys() - weights.keys())
        else:
            treated = self._close(heard.replies, weights)
            status = self._closed()
        contributions = tuple(
            replace(one, weight=weights[one.client], sizes={**one.sizes, **treated.get(one.client, {})})
            for one in heard.contributions
        )
        self._pending = {}
        return Outcome(server_round, status, contributions, heard.refusals, heard.missing, heard.taken)

    def hear(self, replies: Iterable[tuple[str, bytes]]) -> Heard[ReplyT]:
        """What is to be used of the replies that came, as (sender, bytes) in any order; the first half of `absorb`.

        Raises:
            RunError: no round is planned, or there is no room for the replies.
        """
        if not self._pending:
            raise RunError("no round is planned; call plan() before absorb()")
        cohort = list(self._pending)
        taken, answered = Taken(cohort), set[str]()
        num_examples: dict[str, int] = {}
        contributions: list[Contribution] = []
        refusals: list[Refusal] = []
        for sender, data in replies:
            answered.add(sender)
            try:
                request, reply = self._checked(sender, data)
                if sender in num_examples:
                    raise ProtocolError("a second reply to one request")
            except ProtocolError as error:
                refusals.append(Refusal(sender, str(error)))
                continue
            taken.add(sender, data)
            num_examples[sender] = reply.num_examples
            contributions.append(self._contribution(request, reply))
        return Heard(
            taken,
            Read(taken, self._decode),
            num_examples,
            tuple(sorted(contributions, key=lambda one: one.client)),
            tuple(sorted(refusals, key=lambda one: one.client)),
            tuple(name for name in cohort if name not in answered),
        )

    def close_with(self, requests: Mapping[str, RequestT], replies: Mapping[str, bytes]) -> None:
        """Move the checkpoint on by replies that were accepted elsewhere, unchecked, whatever requests they answer.

        For a replay of what a run accepted without some of it: the requests are those of the run, whose model is another one.

        Args:
            requests: by client, as they were planned there; those of more clients than replied.
            replies: bytes, by client; weights are shared among these alone. Of none, the round passes and nothing moves.
        """
        accepted = {name: self._decode(data) for name, data in sorted(replies.items())}
        weights = self.weights({name: reply.num_examples for name, reply in accepted.items()})
        self._pending = dict(requests)
        self._close({name: accepted[name] for name in weights}, weights)
        self._pending = {}

    def absorb_sum(self, summed: Summed | None, refusals: Sequence[Refusal], missing: Sequence[str]) -> Outcome:
        """Close the round with the sum of what its clients sent, or ask for another attempt.

        Args:
            summed: the sum; None if too few clients stayed.
            refusals, missing: see `Outcome`.

        Raises:
            RunError: no round is planned.
        """
        if not self._pending:
            raise RunError("no round is planned; call plan() before absorb_sum()")
        server_round = self.checkpoint.round + 1
        contributions: tuple[Contribution, ...] = ()
        if summed is None:
            status = self._repeat({*missing, *(refusal.client for refusal in refusals)} & self._pending.keys())
        else:
            self._close_mean(summed.mean)
            status = self._closed()
            steps = sum(request.num_steps for request in self._pending.values())
            summed = replace(summed, dropped_steps=min(summed.dropped_steps, steps))  # anything, if one of them lied
            contributions = tuple(
                Contribution(name, weight, self._num_examples[name], self._pending[name].num_steps, 0, None)
                for name, weight in summed.weights.items()
            )
        self._pending = {}
        return Outcome(server_round, status, contributions, tuple(refusals), tuple(missing), summed=summed)

    def sizes(self) -> dict[str, int]:
        """What each client that is asked weighs by: its number of records, or 1."""
        by_examples = self.config.weighting == "examples"
        return {name: self._num_examples[name] if by_examples else 1 for name in self._pending}

    def _repeat(self, failed: Collection[str]) -> Status:
        """Another attempt, if one is left, without those that have failed this one."""
        self._attempt += 1
        self._failed |= set(failed)
        return "failed" if self._attempt >= MAX_ATTEMPTS else "repeat"

    def _closed(self) -> Status:
        self._attempt, self._failed = 0, set()
        return "closed"

    def _checked(self, sender: str, data: bytes) -> tuple[RequestT, ReplyT]:
        reply, request = self._decode(data), self._pending.get(sender)
        if request is None:
            raise ProtocolError(f"{sender!r} was not asked in this round")
        for name, expected in request.head().items():
            found = getattr(reply, name)
            if found != expected:
                shown = [value.hex()[:16] if isinstance(value, bytes) else value for value in (found, expected)]
                raise ProtocolError(f"reply to another request: {name} is {shown[0]!r}, expected {shown[1]!r}")
        self.check_told(sender, reply.num_examples, reply.loss)
        self._check(request, reply)
        return request, reply

    def check_told(self, client: str, num_examples: int, loss: float | None) -> None:
        """Refuse what no reply may say of a client.

        Raises:
            ProtocolError: it is that.
        """
        known = self._num_examples.get(client, num_examples)
        if num_examples != known:
            raise ProtocolError(f"num_examples is {num_examples}; this client came with {known}")
        if num_examples > self.config.max_examples:
            raise ProtocolError(f"num_examples is {num_examples}; at most {self.config.max_examples} are accepted")
        if self.guess_loss is not None and self.config.goal.bounded_below:
            check_loss(loss or 0.0, MOST_GUESSES * self.guess_loss)

    def _contribution(self, request: RequestT, reply: ReplyT) -> Contribution:
        """What is told of an accepted reply; its weight is known when all have come."""
        if self.mechanism is not None:  # what is written down of a round may be published too
            return Contribution(reply.client, 0.0, WITHHELD, request.num_steps, 0, None)
        return Contribution(
            reply.client,
            0.0,
            reply.num_examples,
            request.num_steps,
            reply.num_dropped,
            reply.loss,
            self._sizes(request, reply),
        )

    def _released(self, vectors: Iterable[NDArray[np.float64]], size: int) -> NDArray[np.float64]:
        """The noisy mean of what the replies amount to, a vector each; over how many were asked, which tells nothing."""
        assert self.mechanism is not None  # asked only where clients are hidden
        return self.mechanism.release(vectors, size, len(self._pending))

    def weights(self, num_examples: Mapping[str, int]) -> dict[str, float]:
        """p_i of those whose replies were accepted, in the order of the names, by how many records each has."""
        by_examples = self.config.weighting == "examples"
        sizes = {name: num_examples[name] if by_examples else 1 for name in sorted(num_examples)}
        return shares(sizes, self.config.largest_share(len(sizes)))
