"""What every loop over rounds shares: going on where a run was, closing a round, evaluating, saying what goes wrong.

A driver of rounds (a simulation, Flower's strategy) brings only how bytes get to clients and back.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedkseed.errors import ModelError, TooFewRepliesError
from fedkseed.evaluation import EvalLoss
from fedkseed.federation import Checkpoint, Outcome, Rounds
from fedkseed.federation.divided import DividedRounds
from fedkseed.federation.edge_round import EdgeRound
from fedkseed.federation.envelope import Request
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.federation.schedule import learning_rate
from fedkseed.kseed.distance import moved_rms
from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.audit_log import AuditLog
from fedkseed.runs.events import evaluation_event, round_event
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.metrics import best_round
from fedkseed.runs.observer import WARNING, Observer
from fedkseed.runs.privacy import Account
from fedkseed.runs.settings import RunConfig
from fedkseed.runs.trackers import tracking

if TYPE_CHECKING:  # it needs an extra
    from fedkseed.secure.server import SecureSum

Deliver = Callable[[Mapping[str, bytes]], tuple[Sequence[tuple[str, bytes]], Mapping[str, str]]]
"""Takes messages to clients, by name; (sender, bytes) of what came back, and why the rest is not even bytes, by sender."""
DIVERGED = 1.1
"""A held-out loss that is so many times the best one before it is called divergence."""


class Driver:
    """The rounds of one run.

    Args:
        run: its folder.
        server: where the run is.
        observer: who watches.
        called: what a client is called in what a person reads, such as with its node.
        log: trackers that get all numbers too; see `fedkseed.runs.trackers`.
        account: what the run's privacy has cost; None of a run without.

    Attributes:
        outcome: of the last attempt at a round.
    """

    def __init__(
        self,
        run: RunFolder,
        server: Rounds[Any, Any],
        observer: Observer,
        called: Callable[[str], str] = str,
        log: Sequence[str] = (),
        account: Account | None = None,
    ) -> None:
        self.run, self.server, self.observer, self.account = run, server, observer, account
        self._called, self._log = called, log
        self._track: Callable[[dict[str, Any]], None] = lambda event: None
        self.outcome: Outcome | None = None
        self._asked: list[str] = []
        self._sent = self._repeated = 0
        self._audit: AuditLog | None = None
        self._bounded = False
        self._begin, self._lr = time.perf_counter(), math.nan

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return self.run.config

    @property
    def round(self) -> int:
        """How many rounds are done."""
        return self.server.checkpoint.round

    def drive(self, attempt: Callable[[], bool], evaluate: Callable[[], None]) -> Checkpoint:
        """Do all rounds that are left; after each the checkpoint is on the disk.

        Args:
            attempt: `plan`s a round, takes the requests to the clients, `close`s it with what came back; says whether it
                is closed.
            evaluate: measures the checkpoint's model and tells `evaluated`.

        Raises:
            TooFewRepliesError: a round failed three times for want of replies; the checkpoint is safe.
            RunFolderError: another process is writing to the run's folder.
            RunError: a file cannot be written, or a tracker cannot be opened; the checkpoint is safe.
        """
        with self.run.held():
            if damage := self.run.cut_metrics(self.round):
                self.observer.note(damage)
            self.run.ledgers.cut(self.round)
            if self.config.audit_log == "on":
                self._audit = AuditLog(self.run.path, self.server)
                if damage := self._audit.cut():
                    self.observer.note(WARNING + damage)
            with tracking(self._log, self.run, self.round, self.observer.note) as self._track:
                return self._drive(attempt, evaluate)

    def _drive(self, attempt: Callable[[], bool], evaluate: Callable[[], None]) -> Checkpoint:
        if self._due() and self.round not in self.run.recorded().losses:
            evaluate()
        while not self.server.finished and not self._spent():
            if attempt() and self._due():
                evaluate()
        if self.round not in self.run.recorded().losses and not self.server.finished:  # the budget ended it
            evaluate()
        self._name_best()
        return self.server.checkpoint

    def _spent(self) -> bool:
        """Whether the privacy budget ends the run here."""
        why = self.account.exceeded(self.server) if self.account is not None else None
        if why is not None:
            self.observer.note(f"{why}: the run ends after round {self.round} of {self.config.num_rounds}")
        return why is not None

    @property
    def asked(self) -> Sequence[str]:
        """Whom the planned requests are for, sorted."""
        return self._asked

    def plan(self) -> Iterator[tuple[Request, bytes]]:
        """The requests of the next attempt at a round, and their bytes; one at a time, so that a cohort's need no room."""
        self._start()
        requests = self.server.plan()
        self._asked, self._sent, self._repeated = list(self.server.asked), 0, 0
        if self._audit is not None:
            self._audit.planned()
        return self._encoded(requests)

    def _encoded(self, requests: Iterable[Request]) -> Iterator[tuple[Request, bytes]]:
        for request in requests:
            data = request.encode()
            self._sent += len(data)
            if self._audit is not None:
                self._audit.sent(request, data)
            yield request, data

    def plan_edges(self, behind: Mapping[str, Sequence[str]]) -> EdgeRound:
        """The next attempt at a round, through edges, by the clients behind each."""
        self._start()
        assert isinstance(self.server, DividedRounds)  # only algorithms of such take the setting
        attempt = EdgeRound(self.server, behind)
        self._asked = [name for clients in attempt.asked.values() for name in clients]
        return attempt

    def _start(self) -> None:
        config = self.config
        self._begin, self._lr = time.perf_counter(), learning_rate(config.schedule, config.lr, self.round, config.num_rounds)

    def whole(self, client: str) -> bytes | None:
        """A planned request once more, for a client that has lost what the first one builds on; None if that is nothing."""
        request = self.server.whole(client)
        if request is None:
            return None
        data: bytes = request.encode()
        self._repeated += len(data)
        if self._audit is not None:
            self._audit.repeated(client)
        return data

    def close(
        self,
        replies: Iterable[tuple[str, bytes]],
        unreadable: Mapping[str, str] | None = None,
        measured: Callable[[], Mapping[str, Any]] = dict,
    ) -> dict[str, Any] | None:
        """Absorb what came of a planned round, and write down what that led to.

        Args:
            replies: (sender, bytes) in any order; gone through once, and none is held, but for an audit log.
            unreadable: why what came from others is not even bytes, by sender.
            measured: what the driver adds to the event, asked when all replies are absorbed.

        Returns:
            The event, or None if the round has to be planned again.

        Raises:
            TooFewRepliesError: it was the last attempt at this round.
            RunError: a file cannot be written.
        """
        lengths: list[int] = []
        kept: list[tuple[str, bytes]] = []

        def passing() -> Iterator[tuple[str, bytes]]:
            for sender, data in replies:
                lengths.append(len(data))
                if self._audit is not None:
                    kept.append((sender, data))
                yield sender, data

        outcome = self.server.absorb(passing())
        if self._audit is not None:
            self._audit.absorbed(outcome, kept, unreadable or {})
        sizes = {"bytes_down": (self._sent + self._repeated) / len(self._asked)}
        if lengths:
            sizes["bytes_up"] = sum(lengths) / len(lengths)
        return self._record(outcome, unreadable or {}, sizes, measured)

    def close_sum(
        self, conversation: SecureSum, deliver: Deliver, measured: Callable[[], Mapping[str, Any]] = dict
    ) -> dict[str, Any] | None:
        """The same of a planned round whose replies the server sees the sum of only: hold the conversation that leads to it.

        Args:
            conversation: of this round's requests.
            deliver: takes a phase's messages to the clients, and gives what came back as in `close`.
            measured: see `close`.

        Raises:
            TooFewRepliesError: it was the last attempt at this round.
            RunError: a file cannot be written.
        """
        sent, received, unreadable = 0, 0, dict[str, str]()
        while not conversation.over:
            messages = conversation.ask()
            replies, broken = deliver(messages)
            sent += sum(map(len, messages.values()))
            received += sum(len(data) for _, data in replies)
            unreadable |= broken
            conversation.hear(replies)
        outcome = self.server.absorb_sum(conversation.summed, conversation.refusals, conversation.missing)
        asked = len(self._asked)
        return self._record(
            outcome, unreadable, {"bytes_down": (sent + self._repeated) / asked, "bytes_up": received / asked}, measured
        )

    def close_edges(
        self,
        conversation: EdgeRound,
        deliver: Callable[[Mapping[str, bytes]], Sequence[tuple[str, bytes]]],
        clients: Callable[[], tuple[int, int]],
        measured: Callable[[], Mapping[str, Any]] = dict,
    ) -> dict[str, Any] | None:
        """The same of a round whose replies edges hold: hold the conversation with them that leads to its end.

        Args:
            conversation: of the server's next attempt.
            deliver: takes messages to edges, by name; (sender, bytes) of what came back.
            clients: how many bytes went to all clients and came from them, asked when all is over.
            measured: see `close`.

        Raises:
            TooFewRepliesError: it was the last attempt at this round.
            RunError: a file cannot be written.
        """
        down = up = 0
        while not conversation.over:
            messages = conversation.ask()
            replies = deliver(messages)
            down += sum(map(len, messages.values()))
            up += sum(len(data) for _, data in replies)
            conversation.hear(replies)
        assert conversation.outcome is not None  # it is over
        asked, edges = len(self._asked), len(conversation.asked)
        sent, received = clients()
        sizes = {"bytes_down": sent / asked, "bytes_up": received / asked}
        sizes |= {"edges": edges, "edge_bytes_down": down / edges, "edge_bytes_up": up / edges}
        return self._record(conversation.outcome, {}, sizes, measured)

    def _record(
        self,
        outcome: Outcome,
        unreadable: Mapping[str, str],
        sizes: Mapping[str, float],
        measured: Callable[[], Mapping[str, Any]],
    ) -> dict[str, Any] | None:
        """Write down what a round led to; see `close`."""
        self.outcome = outcome
        event = round_event(outcome, self._lr, rewards=not self.config.goal.smooth)
        if self.account is not None:
            self.account.record({name: self.server.steps[name] for name in self._asked}, outcome)
            self.run.made_with = {**(self.run.made_with or {}), "privacy": self.account.noted()}
            event["epsilon"] = self.account.epsilon()
        event["refused"] |= dict(unreadable)
        event["missing"] = [client for client in outcome.missing if client not in event["refused"]]
        for client, reason in sorted(event["refused"].items()):
            self.observer.note(f"{WARNING}round {outcome.server_round}: reply of {self._called(client)} refused: {reason}")
        if event["missing"]:
            self.observer.note(
                f"{WARNING}round {outcome.server_round}: no reply of {', '.join(map(self._called, event['missing']))} in time"
            )
        if outcome.status == "failed":
            raise TooFewRepliesError(
                f"round {outcome.server_round} ended three times with fewer than {self.config.min_replies} accepted replies"
                f"{self._reasons(event['refused'])}; round {self.round} is safe in {self.run.path}: {self._remedy(event)}, "
                "then go on"
            )
        if outcome.status == "repeat":
            return None
        if 0 < event["num_steps"] == event["dropped_steps"]:
            self.observer.note(
                f"{WARNING}round {outcome.server_round}: every step was dropped, so nothing was learnt; losses are not finite, "
                "or --loss-clip or --max-grad is too small"
            )
        event |= {
            **sizes,
            "seconds": time.perf_counter() - self._begin,
            **measured(),
        }
        if isinstance(self.server.checkpoint, Ledger):
            event["moved_rms"] = moved_rms(self.server.checkpoint)
            self._say_bounded(event["moved_rms"])
        # log and metrics first: a kill in between leaves a line too many, which a resume cuts, never one too few
        self.run.append_metrics(event)
        self.run.save_checkpoint(self.server.checkpoint)
        self._tell(event)
        return event

    def evaluated(
        self, result: EvalLoss, weight_bytes: int, seconds: float, clients: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write down the held-out loss of the checkpoint's model, and say so when the run goes the wrong way.

        Args:
            result: the loss.
            weight_bytes: what sending the weights would take.
            seconds: what the evaluation took.
            clients: the clients' own losses, where they measured them.

        Raises:
            ModelError: it is the base model's, and no number.
        """
        if self.round == 0 and not math.isfinite(result.loss):
            raise ModelError(
                f"the held-out loss of the base model is {result.loss:.4f}, so there is nothing to start from; give another "
                "--dtype, such as float32, or another model"
            )
        event = evaluation_event(self.round, result, weight_bytes, seconds) | ({"clients": clients} if clients else {})
        self._warn(result)
        checkpoint = self.server.checkpoint
        if self.account is not None:  # what its privacy cost goes with a ledger
            checkpoint = checkpoint.stamped(self.run.made_with)
        self.run.ledgers.keep(checkpoint)  # before the event: what has a loss has a ledger
        self.run.append_metrics(event)
        self._tell(event)
        return event

    def _tell(self, event: dict[str, Any]) -> None:
        self.observer.event(event)
        self._track(event)

    def _warn(self, result: EvalLoss) -> None:
        recorded = self.run.recorded()
        best = min(filter(math.isfinite, recorded.losses.values()), default=result.loss)
        if math.isfinite(result.loss) and result.loss <= DIVERGED * best:
            return
        started = next(iter(recorded.rewards.values()), None)
        if math.isfinite(result.loss) and result.reward is not None and started is not None and result.reward > started:
            self.observer.note(
                f"{WARNING}round {self.round}: the held-out reward has risen from {started:.4f} to {result.reward:.4f} and "
                f"the held-out loss from {best:.4f} to {result.loss:.4f}: the model forgets, or scores without answering. Read "
                "its answers (fedkseed evaluate --answers 20); --max-moved keeps it nearer to its base"
            )
            return
        self.observer.note(
            f"{WARNING}round {self.round}: the held-out loss is {result.loss:.4f}, it was {best:.4f}: the run diverges. "
            f"Start anew with a lower {self._rate()}"
        )

    def _reasons(self, refused: Mapping[str, str]) -> str:
        """Why most of the refused replies were refused."""
        if not refused:
            return ""
        reason = Counter(refused.values()).most_common(1)[0][0]
        return f", {len(refused)} of {len(self._asked)} refused ({reason:.200})"

    def _remedy(self, event: Mapping[str, Any]) -> str:
        if not event["missing"]:
            return "mend what they were refused for"
        return "wait longer" if self.config.min_replies == 1 else "lower --min-replies, or wait longer"

    def _rate(self) -> str:
        """The rate that says how far the model goes in a round."""
        if OPTIMIZERS[self.config.server_optimizer].bounded:  # the clients' is divided out
            return f"--server-lr than {self.config.server_lr:g}"
        return f"--lr than {self.config.lr:g}, or with --lr auto; fedkseed tune explains it"

    def _say_bounded(self, moved: float) -> None:
        """Say once that the model is as far from its base as it may go."""
        most = self.config.max_moved
        if most is not None and moved > most * (1 - 2.0**-10) and not self._bounded:
            self._bounded = True
            self.observer.note(
                f"round {self.round}: the model is as far from its base as --max-moved {most:g} lets it; it is pulled back"
            )

    def _name_best(self) -> None:
        """Say so where an earlier round was better than the last."""
        losses = self.run.recorded().losses
        best = best_round(losses)
        if best is None or best == max(losses):
            return
        kept = (
            "--round best takes its ledger" if self.config.facts.has_ledger else "of a baseline only the last tensors are kept"
        )
        what = f"after round {best}" if best else "the base model's"
        self.observer.note(f"the smallest held-out loss is {losses[best]:.4f}, {what}; {kept}")

    def _due(self) -> bool:
        return self.round % self.config.eval_every == 0 or self.round == self.config.num_rounds
