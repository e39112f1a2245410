"""The Flower strategy: how the bytes of a driver's rounds get to nodes that come, go and may lie, and back."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from logging import INFO, WARNING
from typing import TYPE_CHECKING, Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from fedkseed.errors import ProtocolError, RunError
from fedkseed.evaluation import EvalLoss
from fedkseed.federation import Outcome, count_steps, shares
from fedkseed.federation.envelope import check_loss
from fedkseed.flower.config import EngineConfig, FlowerConfig
from fedkseed.flower.envelope import Evaluation, Hello, Lacking, unwrap, wrap
from fedkseed.flower.exchange import NOTE_SECONDS, POLL_SECONDS, Exchange
from fedkseed.flower.log import Log, log
from fedkseed.flower.roll import Member, Roll
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.identity import BaseIdentity
from fedkseed.runs.algorithms import roles_of
from fedkseed.runs.driver import Driver
from fedkseed.runs.events import summary
from fedkseed.runs.extras import require_secure
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.privacy import Account

if TYPE_CHECKING:  # it needs an extra
    from fedkseed.secure.server import SecureSum

NAMES_SHOWN = 3
MOST_GUESSES = 4
"""An evaluation's loss is at most so many times that of a guess among all tokens."""


class FedKSeed(Strategy):
    """FedKSeed, FedKSeed-Pro and FedKSeed-grad, whichever the settings name, on Flower.

    `start` differs from Flower's: it takes no arrays (the model is the ledger in the run's folder), goes on from that
    ledger, closes a round at its deadline with the replies that came, and refuses a bad reply instead of ending the run.

    Args:
        run: the run's folder; its ledger, if there is one, is gone on from.
        config: the settings.
        base: identity of the base weights.
        weight_bytes: their size, to compare with.
        evaluate: the held-out loss of a ledger's model, on the server; None asks the clients that have records for it.
        guess_loss: the loss of a guess, by which the losses that clients tell are bounded; None: any finite one will do.

    Raises:
        LedgerError: the run's ledger cannot be read.
    """

    def __init__(
        self,
        run: RunFolder,
        config: FlowerConfig,
        base: BaseIdentity,
        weight_bytes: int = 0,
        evaluate: Callable[[Ledger], EvalLoss] | None = None,
        guess_loss: float | None = None,
    ) -> None:
        require_secure(config)
        self.run, self.config = run, config
        self._base, self._weight_bytes, self._evaluate_here, self._guess_loss = base, weight_bytes, evaluate, guess_loss
        self._server = roles_of(config.facts).server(config, run.load_ledger() or base, None, guess_loss, None)
        observer = Log(describe=partial(summary, num_rounds=config.num_rounds))
        account = None
        if config.privacy is not None:
            account = Account(config, {}, run.load_checkpoint())
            run.made_with = {**(run.made_with or {}), "privacy": account.noted()}
        self._driver = Driver(run, self._server, observer, self._called, config.trackers, account)
        self._members: dict[str, Member] = {}
        self._asked: dict[str, Message] = {}
        self._asked_again: set[str] = set()
        self._sum: SecureSum | None = None
        self._result = Result()

    @property
    def ledger(self) -> Ledger:
        """After the last closed round."""
        return self._server.ledger

    @property
    def outcome(self) -> Outcome | None:
        """Of the last attempt at a round."""
        return self._driver.outcome

    def summary(self) -> None:
        """Log what will be done."""
        config = self.config
        log(INFO, "%s: round %s of %s is next", config.algorithm, self.ledger.round + 1, config.num_rounds)
        log(INFO, "run folder: %s", self.run.path)

    def start(self, grid: Grid) -> Result:  # type: ignore[override]
        """Do all rounds that are left; see `fedkseed.runs.driver.Driver.drive`."""
        self.summary()
        roll = Roll(grid, self._base.fingerprint, self._check_hello, self._met())
        self._driver.drive(partial(self._attempt, grid, roll), partial(self._evaluate, grid, roll))
        log(INFO, "done: %s, digest %s", self.run.ledger_path, self.ledger.digest())
        return self._result

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """The next round's requests to the clients that are here; arrays and config are ignored."""
        self._asked_again = set()
        self._asked = {
            request.client: self._train_message(request.client, data, str(server_round))
            for request, data in self._driver.plan()
        }
        return list(self._asked.values())

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[None, MetricRecord | None]:
        """Absorb replies, in whatever order they came, into the ledger, and write it; bad ones are refused and logged.

        Returns:
            None, since the model is the ledger; the round's numbers, or None if it has to be repeated.

        Raises:
            TooFewRepliesError: it was the last attempt at this round.
            RunError: the ledger cannot be written.
        """
        event = self._driver.close(*self._read(server_round, replies))
        return None, None if event is None else _metrics(event)

    def _read(self, server_round: int, replies: Iterable[Message]) -> tuple[list[tuple[str, bytes]], dict[str, str]]:
        """The bytes of replies to what was asked, as (client, bytes), and why others have none, by client."""
        clients = {message.metadata.message_id: client for client, message in self._asked.items()}
        arrived: list[tuple[str, bytes]] = []
        unreadable: dict[str, str] = {}
        for reply in replies:
            client = clients.get(reply.metadata.reply_to_message_id)
            if client is None:
                log(WARNING, "round %s: a reply of node %s to no request", server_round, reply.metadata.src_node_id)
                continue
            try:
                arrived.append((client, unwrap(reply)))
            except ProtocolError as error:
                unreadable[client] = str(error)
        return arrived, unreadable

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """The ledger in its published form, for every client that has records to evaluate on; none where clients are hidden."""
        if self.config.dp is not None:  # a loss would tell of one what its change does not
            return []
        data = self.ledger.published().encode()
        return [
            Message(wrap(data), member.node_id, MessageType.EVALUATE, ttl=self.config.deadline, group_id=str(server_round))
            for member in self._members.values()
            if member.hello.num_eval_examples
        ]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """The clients' losses, by their response tokens, into `metrics.jsonl`; None if no reply can be used.

        No client weighs more than `max_share` has it.
        """
        names = {member.node_id: name for name, member in self._members.items()}
        wanted = self.ledger.published().digest()
        found: dict[str, Evaluation] = {}
        for reply in replies:
            name = names.get(reply.metadata.src_node_id, "a stranger")
            try:
                evaluation = Evaluation.decode(unwrap(reply))
                if evaluation.ledger != wanted:
                    raise ProtocolError(f"it is about ledger {evaluation.ledger[:16]}..., asked was {wanted[:16]}...")
                if name in names.values():
                    self._check_evaluation(self._members[name].hello, evaluation)
                    found.setdefault(name, evaluation)
            except ProtocolError as error:
                log(WARNING, "round %s: evaluation of %s refused: %s", server_round, name, error)
        if not found:
            return None
        weights = shares({name: found[name].num_tokens for name in sorted(found)}, self.config.largest_share(len(found)))
        loss = sum(weight * found[name].loss for name, weight in weights.items())
        num_examples, num_tokens = (sum(getattr(e, what) for e in found.values()) for what in ("num_examples", "num_tokens"))
        rewards = [(weights[name], e.reward) for name, e in found.items() if e.reward is not None]
        reward = sum(w * r for w, r in rewards) / sum(w for w, _ in rewards) if rewards else None
        return self._evaluated(
            replace(EvalLoss.of(loss, num_examples, num_tokens), reward=reward),
            {name: {"loss": e.loss, "num_tokens": e.num_tokens} for name, e in sorted(found.items())},
        )

    def _train_message(self, client: str, data: bytes, group_id: str) -> Message:
        node_id = self._members[client].node_id
        return Message(wrap(data), node_id, MessageType.TRAIN, ttl=self.config.deadline, group_id=group_id)

    def _called(self, client: str) -> str:
        return f"{client} (node {self._members[client].node_id})"

    def _attempt(self, grid: Grid, roll: Roll) -> bool:
        self._gather(roll)
        server_round = self.ledger.round + 1
        if self.config.secure_sums == "on":
            return self._attempt_sum(grid, server_round)
        exchange = Exchange(grid)
        requests = self.configure_train(server_round, ArrayRecord(), ConfigRecord(), grid)
        log(INFO, "round %s: %s clients are asked", server_round, len(requests))
        exchange.send(requests)
        heard = partial(self._waiting, f"round {server_round}", len(requests))
        replies = [reply for _, reply in exchange.wait(self.config.deadline, self._ask_again, heard)]
        metrics = self.aggregate_train(server_round, replies)[1]
        if metrics is not None:
            self._result.train_metrics_clientapp[server_round] = metrics
        return metrics is not None

    def _attempt_sum(self, grid: Grid, server_round: int) -> bool:
        """The same where the server sees the sum of the replies only: four messages to each client in place of one."""
        from fedkseed.runs.sums import conversation

        self._asked_again = set()
        self._sum = conversation(self.config, self._server, list(self._driver.plan()))
        talk = self._sum

        def deliver(messages: Mapping[str, bytes]) -> tuple[list[tuple[str, bytes]], dict[str, str]]:
            what = f"round {server_round}, {talk.phase}"
            self._asked = {client: self._train_message(client, data, str(server_round)) for client, data in messages.items()}
            log(INFO, "%s: %s clients are asked", what, len(messages))
            exchange = Exchange(grid)
            exchange.send(list(self._asked.values()))
            heard = partial(self._waiting, what, len(messages))
            replies = [reply for _, reply in exchange.wait(self.config.deadline, self._ask_again, heard)]
            return self._read(server_round, replies)

        event = self._driver.close_sum(talk, deliver)
        if event is not None:
            self._result.train_metrics_clientapp[server_round] = _metrics(event)
        return event is not None

    def _ask_again(self, request: Message, reply: Message) -> Message | None:
        """The whole request, for a client that has lost pages which the first one builds on; nobody gets it twice."""
        try:
            lacking = Lacking.decode(unwrap(reply))
        except ProtocolError:
            return None
        client = next((name for name, asked in self._asked.items() if asked is request), None)
        if client is None or client in self._asked_again or (data := self._driver.whole(client)) is None:
            return None
        if self._sum is not None and (data := self._sum.again(client, data)) is None:
            return None
        log(INFO, "%s has %s pages and lacks others; all are sent", self._called(client), lacking.pages)
        self._asked_again.add(client)
        self._asked[client] = self._train_message(client, data, request.metadata.group_id)
        return self._asked[client]

    def _evaluate(self, grid: Grid, roll: Roll) -> None:
        self._begin, server_round = time.perf_counter(), self.ledger.round
        if self._evaluate_here is not None:
            self._result.evaluate_metrics_serverapp[server_round] = self._evaluated(self._evaluate_here(self.ledger))
            return
        self._gather(roll)
        exchange = Exchange(grid)
        requests = self.configure_evaluate(server_round, ArrayRecord(), ConfigRecord(), grid)
        exchange.send(requests)
        heard = partial(self._waiting, f"evaluation after round {server_round}", len(requests))
        metrics = self.aggregate_evaluate(
            server_round, [reply for _, reply in exchange.wait(self.config.deadline, waiting=heard)]
        )
        self._result.evaluate_metrics_clientapp[server_round] = metrics or MetricRecord()

    def _evaluated(self, result: EvalLoss, clients: dict[str, Any] | None = None) -> MetricRecord:
        return _metrics(self._driver.evaluated(result, self._weight_bytes, time.perf_counter() - self._begin, clients))

    def _waiting(self, what: str, asked: int, open_: list[Message], passed: float) -> None:
        """Say whose replies have not come yet."""
        at = {member.node_id: name for name, member in self._members.items()}
        names = sorted(at.get(message.metadata.dst_node_id, "?") for message in open_)
        shown = ", ".join(names[:NAMES_SHOWN]) + (f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else "")
        text = "%s: waiting for %s of %s replies, %.0f s; at most %.0f s (%s)"
        log(INFO, text, what, len(names), asked, passed, self.config.deadline, shown)

    def _gather(self, roll: Roll) -> None:
        """Wait until enough clients are here, and let the server draw from them."""
        begin, noted = time.monotonic(), -math.inf
        while True:
            self._members = roll.look()
            here, wanted = len(self._members), self.config.expected_clients
            if here >= wanted and self.config.cohort_size(here) >= self.config.min_cohort:
                break
            now = time.monotonic()
            if now - noted >= NOTE_SECONDS:
                noted = now
                log(INFO, "waiting for clients: %s of %s are here, %.0f s", here, wanted, now - begin)
            time.sleep(POLL_SECONDS)
        self._server.admit(list(self._members), self._sizes(), self._forward_only())
        met = self._met()
        if not self._members.keys() <= met.keys():  # who was here, asked or not, and with how many records
            met = dict(sorted({**self._sizes(), **met}.items()))
            self.run.write_config(self.config, {**self.run.driver, "clients": met})

    def _met(self) -> dict[str, int]:
        """The clients that the run has met, and how many records each had."""
        met = self.run.driver.get("clients", {})
        return dict(met) if isinstance(met, dict) else {}  # before it had numbers, it was a list

    def _sizes(self) -> dict[str, int]:
        return {name: member.hello.num_examples for name, member in self._members.items()}

    def _forward_only(self) -> list[str] | None:
        """Who cannot backpropagate, as the nodes say; of the simulation engine's, which say nothing, the settings' share."""
        if isinstance(self.config, EngineConfig):
            return None
        return [name for name, member in self._members.items() if not member.hello.backpropagation]

    def _check_evaluation(self, hello: Hello, evaluation: Evaluation) -> None:
        for what, claimed, most in (
            ("records", evaluation.num_examples, hello.num_eval_examples),
            ("response tokens", evaluation.num_tokens, hello.num_eval_tokens),
        ):
            if claimed > most:
                raise ProtocolError(f"it claims {claimed} {what}; its hello said {most}")
        if evaluation.reward is not None and not self.config.goal.has_reward:
            raise ProtocolError(f"it tells a reward, which objective {self.config.objective} has none of")
        if evaluation.reward is not None and self.config.goal.is_share and not 0 <= evaluation.reward <= 1:
            raise ProtocolError(f"its reward is {evaluation.reward:g}; that of {self.config.objective} is from 0 to 1")
        if self._guess_loss is not None:
            check_loss(evaluation.loss, MOST_GUESSES * self._guess_loss)

    def _check_hello(self, hello: Hello) -> None:
        """Whether the run has a use for a client.

        Its steps must fit into a request: its own count of records must not end the run. Without backpropagation it answers
        with scalars, which only changes by sgd can be weighed against.
        """
        if hello.num_examples > self.config.max_examples:
            raise RunError(
                f"{hello.name!r} says it has {hello.num_examples} records; at most {self.config.max_examples} are accepted "
                "(max-examples)"
            )
        count_steps(self.config, hello.num_examples, hello.name)
        if not hello.backpropagation and self.config.facts.has_pages and self.config.local_optimizer != "sgd":
            raise RunError(
                f"{hello.name!r} cannot backpropagate, and local-optimizer {self.config.local_optimizer} has no use for its "
                "scalars; take sgd for the run"
            )
        if not hello.backpropagation and self.config.facts.has_pages and self.config.secure_sums == "on":
            raise RunError(f"{hello.name!r} cannot backpropagate, and its scalars have no place in a secure sum of changes")


def _metrics(event: dict[str, Any]) -> MetricRecord:
    """The numbers of an event as Flower keeps them."""
    record = MetricRecord()
    for name, value in event.items():
        if isinstance(value, (int, float)):
            record[name.replace("_", "-")] = value
    return record
