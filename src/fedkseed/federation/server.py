"""The server as a state machine: `plan` a round's requests, `absorb` what came back. It never loops, sends or logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedkseed.errors import LedgerError, ProtocolError, RunError
from fedkseed.federation.config import FederationConfig, Limits
from fedkseed.federation.pro import importances, probabilities
from fedkseed.federation.schedule import learning_rate
from fedkseed.identity import BaseIdentity
from fedkseed.ledger import History, Ledger
from fedkseed.messages import MAX_STEPS, TrainReply, TrainRequest, check_name, coefficients_digest
from fedkseed.pool import SeedPool
from fedkseed.randomness import derive, generator
from fedkseed.wire import pack

MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class Contribution:
    """An accepted reply: whose it is, its weight in the round, what the client reported."""

    client: str
    weight: float
    num_examples: int
    dropped_steps: int
    loss: float | None


@dataclass(frozen=True)
class Refusal:
    """A reply that was not used, and why."""

    client: str
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What became of a round's replies.

    Attributes:
        server_round: the round, counted from 1.
        status: `closed` (the ledger has moved on), `repeat` (too few replies: plan again) or `failed` (no attempt is left).
        contributions: the accepted replies, sorted by client.
        refusals: the others that came.
        missing: clients that were asked and sent nothing.
    """

    server_round: int
    status: Literal["closed", "repeat", "failed"]
    contributions: tuple[Contribution, ...]
    refusals: tuple[Refusal, ...]
    missing: tuple[str, ...]

    @property
    def dropped_steps(self) -> int:
        """Steps that the accepted clients dropped."""
        return sum(contribution.dropped_steps for contribution in self.contributions)


def seed_pool(config: FederationConfig) -> SeedPool:
    """The pool of a run: its key is drawn from the run's seed."""
    return SeedPool(derive(config.seed, "pool"), config.num_seeds, config.noise)


def start(config: FederationConfig, base: BaseIdentity) -> Ledger:
    """The ledger before the first round."""
    return Ledger.start(seed_pool(config), base, config.wire)


def count_steps(config: FederationConfig, num_examples: int | None, client: str) -> int:
    """How many steps a client does in a round.

    Args:
        config: the settings.
        num_examples: the client's records, as far as they are known; only epochs need them.
        client: its name, for messages.

    Raises:
        RunError: they are not known, or the client's epochs are too many steps for a request.
    """
    if config.local_unit == "steps":
        return config.local_steps
    if num_examples is None:
        raise RunError(f"local_unit is epochs and client {client!r} has not said how many records it has; use steps")
    steps = config.local_steps * -(-num_examples // config.batch_size)
    if not 1 <= steps <= MAX_STEPS:
        raise RunError(
            f"{config.local_steps} epochs of client {client!r} are {steps} steps; expected 1 to {MAX_STEPS}, "
            "so lower --local-steps or raise --batch-size"
        )
    return steps


class Server:
    """One federation: its settings, its clients and its ledger.

    Args:
        config: the settings.
        ledger: where to go on from; `start` gives a fresh one.
        clients: the stable names of all clients; `admit` changes them between rounds.
        limits: what a reply must keep to.
        num_examples: how many records each client has, by its name; needed where `local_unit` is epochs.

    Raises:
        LedgerError: the ledger is of another pool or precision than the settings, or is a published one.
        RunError: there are fewer clients than `min_replies`, or a name twice, or a client's epochs are too many steps.
    """

    def __init__(
        self,
        config: FederationConfig,
        ledger: Ledger,
        clients: Sequence[str],
        limits: Limits | None = None,
        num_examples: Mapping[str, int] | None = None,
    ) -> None:
        if ledger.history is None:
            raise LedgerError("a published ledger has no accumulators; go on from a run's own ledger.safetensors")
        if ledger.pool != seed_pool(config) or ledger.precision != config.wire:
            raise LedgerError(
                f"the ledger is of {ledger.pool} in {ledger.precision}, "
                f"the settings give {seed_pool(config)} in {config.wire}; "
                "go on with the settings that the run was started with"
            )
        self.config, self.ledger, self.limits = config, ledger, limits or Limits()
        self.run_id = derive(config.seed, "run", f"{ledger.pool.key:016x}", ledger.base.fingerprint).to_bytes(8, "little")
        self._attempt = 0
        self._pending: dict[str, TrainRequest] = {}
        self.admit(clients, num_examples)

    def admit(self, clients: Sequence[str], num_examples: Mapping[str, int] | None = None) -> None:
        """Set whom the next rounds may ask, by their stable names; `num_examples` as above.

        Raises:
            ProtocolError: a name is not 1 to 64 bytes of printable text.
            RunError: there are fewer clients than `min_replies`, or a name twice, or a client's epochs are too many steps.
        """
        for name in clients:
            check_name(name)
        if len(set(clients)) != len(clients):
            raise RunError("two clients have the same name; names must be distinct")
        cohort_size = self.config.cohort_size(len(clients))
        if cohort_size < self.config.min_replies or not clients:
            raise RunError(
                f"a round asks {cohort_size} of {len(clients)} clients, too few for min_replies = {self.config.min_replies}; "
                "raise --fraction-train or --num-clients, or lower --min-replies"
            )
        self.steps = {name: count_steps(self.config, (num_examples or {}).get(name), name) for name in clients}
        self.clients, self.cohort_size = tuple(sorted(clients)), cohort_size

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self.ledger.round >= self.config.num_rounds

    def probabilities(self) -> NDArray[np.float64]:
        """How likely each seed is to be drawn for a step now, float64[K]."""
        history = self._history
        if self.config.algorithm == "fedkseed-pro":
            return probabilities(importances(history.grad_sums, history.grad_counts, self.config.importance_start))
        return np.full(self.ledger.pool.size, 1 / self.ledger.pool.size)

    def plan(self) -> tuple[TrainRequest, ...]:
        """The requests of the next round, or of the next attempt at it, sorted by client.

        Raises:
            RunError: all rounds are done, or the last attempt at this one has failed.
        """
        if self.finished:
            raise RunError(f"all {self.config.num_rounds} rounds are done; raise --num-rounds to go on")
        if self._attempt >= MAX_ATTEMPTS:
            raise RunError(f"round {self.ledger.round + 1} failed {MAX_ATTEMPTS} times; see the refusals, then resume")
        config, server_round = self.config, self.ledger.round + 1
        draw = generator(config.seed, server_round, self._attempt, "cohort")
        cohort = sorted(draw.choice(self.clients, self.cohort_size, replace=False).tolist())
        likely = self.probabilities() if config.algorithm == "fedkseed-pro" else None
        coefficients, digest = pack(self._history.accumulators, config.wire), coefficients_digest(self.ledger.coefficients)
        self._pending = {
            client: TrainRequest(
                run_id=self.run_id,
                server_round=server_round,
                attempt=self._attempt,
                client=client,
                pool=self.ledger.pool,
                base=bytes.fromhex(self.ledger.base.fingerprint),
                coefficients=coefficients,
                digest=digest,
                indices=self._draw_seeds(server_round, client, likely),
                lr=learning_rate(config.schedule, config.lr, self.ledger.round, config.num_rounds),
                eps=config.eps,
                batch_size=config.batch_size,
                max_grad=self.limits.max_grad,
                loss_clip=config.loss_clip,
            )
            for client in cohort
        }
        return tuple(self._pending.values())

    def absorb(self, replies: Iterable[tuple[str, bytes]]) -> Outcome:
        """Close the round with the replies that came, as (sender, bytes) in any order, or ask for another attempt.

        Nothing that a client sends raises: a reply that is malformed, is not an answer to this round's request, or
        breaks a limit is refused, and the rest goes on without it.

        Raises:
            RunError: no round is planned.
        """
        if not self._pending:
            raise RunError("no round is planned; call plan() before absorb()")
        accepted: dict[str, TrainReply] = {}
        refusals: list[Refusal] = []
        answered: set[str] = set()
        for sender, data in sorted(replies):
            answered.add(sender)
            try:
                if sender in accepted:
                    raise ProtocolError("a second reply to one request")
                accepted[sender] = self._check(sender, TrainReply.decode(data))
            except ProtocolError as error:
                refusals.append(Refusal(sender, str(error)))
        weights = self._weights(accepted, refusals)
        server_round = self.ledger.round + 1
        missing = tuple(sorted(set(self._pending) - answered))
        if len(weights) < self.config.min_replies:
            self._attempt += 1
            status: Literal["closed", "repeat", "failed"] = "failed" if self._attempt >= MAX_ATTEMPTS else "repeat"
        else:
            self.ledger = self.ledger.advance(self._aggregate({name: accepted[name] for name in weights}, weights))
            self._attempt, status = 0, "closed"
        contributions = tuple(
            Contribution(name, weight, accepted[name].num_examples, len(accepted[name].dropped), accepted[name].loss)
            for name, weight in weights.items()
        )
        self._pending = {}
        return Outcome(server_round, status, contributions, tuple(refusals), missing)

    @property
    def _history(self) -> History:
        assert self.ledger.history is not None  # checked in __init__, and every later ledger is an `advance`
        return self.ledger.history

    def _draw_seeds(self, server_round: int, client: str, likely: NDArray[np.float64] | None) -> tuple[int, ...]:
        draw = generator(self.config.seed, server_round, self._attempt, client, "seeds")
        return tuple(draw.choice(self.ledger.pool.size, self.steps[client], p=likely).tolist())

    def _check(self, sender: str, reply: TrainReply) -> TrainReply:
        request = self._pending.get(sender)
        if request is None:
            raise ProtocolError(f"{sender!r} was not asked in this round")
        for name in ("client", "run_id", "server_round", "attempt", "base", "digest"):
            found, expected = getattr(reply, name), getattr(request, name)
            if found != expected:
                shown = [value.hex()[:16] if isinstance(value, bytes) else value for value in (found, expected)]
                raise ProtocolError(f"reply to another request: {name} is {shown[0]!r}, expected {shown[1]!r}")
        if reply.num_examples > self.limits.max_examples:
            raise ProtocolError(f"num_examples is {reply.num_examples}; at most {self.limits.max_examples} are accepted")
        grads = reply.projected_grads.unpack()
        if len(grads) > len(request.indices):
            raise ProtocolError(f"{len(grads)} scalars came for {len(request.indices)} steps; expected no more")
        if reply.projected_grads.precision != request.coefficients.precision:
            raise ProtocolError(f"scalars are {reply.projected_grads.precision}; expected {request.coefficients.precision}")
        largest = float(np.abs(grads).max())
        if largest > self.limits.max_grad:
            raise ProtocolError(f"a projected gradient is {largest:g}; at most {self.limits.max_grad:g} is accepted")
        if np.any(grads[list(reply.dropped)] != 0):
            raise ProtocolError("a dropped step has a projected gradient; expected 0")
        return reply

    def _weights(self, accepted: dict[str, TrainReply], refusals: list[Refusal]) -> dict[str, float]:
        """p_i by client, in the order of the names; replies with too large a share are refused, the largest first."""
        sizes = {name: accepted[name].num_examples if self.config.weighting == "examples" else 1 for name in sorted(accepted)}
        while sizes:
            total, largest = sum(sizes.values()), max(sizes, key=lambda name: sizes[name])
            if sizes[largest] <= self.limits.max_share * total:
                return {name: size / total for name, size in sizes.items()}
            share = sizes.pop(largest) / total
            refusals.append(
                Refusal(largest, f"its share of the round is {share:.3f}; at most {self.limits.max_share} is accepted")
            )
        return {}

    def _aggregate(self, replies: dict[str, TrainReply], weights: dict[str, float]) -> History:
        """a_k <- a_k - lr sum_i p_i (sum of client i's g at k), in float64 and in the order of the clients' names."""
        total = np.zeros(self.ledger.pool.size)
        sums, counts = self._history.grad_sums.copy(), self._history.grad_counts.copy()
        lr = next(iter(self._pending.values())).lr
        for name, reply in replies.items():
            grads = reply.projected_grads.unpack().astype(np.float64)
            indices = np.array(self._pending[name].indices[: len(grads)])
            kept = np.ones(len(grads), bool)
            kept[list(reply.dropped)] = False
            change = np.zeros_like(total)
            np.add.at(change, indices, grads)
            total += weights[name] * change
            np.add.at(sums, indices[kept], np.minimum(np.abs(grads[kept]), self.config.importance_clip))
            np.add.at(counts, indices[kept], 1)
        return History(self._history.accumulators - lr * total, sums, counts)
