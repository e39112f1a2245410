"""What a node is to the federation: the answers to the server's three questions."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from functools import lru_cache, partial
from logging import INFO
from typing import Any

import numpy as np

from fedkseed.errors import ConfigError, ProtocolError
from fedkseed.federation.envelope import Request
from fedkseed.flower import summing
from fedkseed.flower.budget import KeptHistory
from fedkseed.flower.config import EngineConfig, node_settings
from fedkseed.flower.envelope import Evaluation, Hello, Lacking
from fedkseed.flower.holdings import NOTHING, Held, load_for, read_held, simulated_records
from fedkseed.flower.kept import KeptPages
from fedkseed.flower.log import Log, log
from fedkseed.kseed.change_client import ChangeClient, patched
from fedkseed.kseed.change_messages import ChangeRequest
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.pages import Page
from fedkseed.kseed.private_steps import sampling_rate
from fedkseed.kseed.server import seed_pool
from fedkseed.privacy import WITHHELD
from fedkseed.runs.algorithms import roles_of
from fedkseed.runs.answer_task import AnswerTask
from fedkseed.runs.objectives import goal_of
from fedkseed.runs.preferences import PairTask
from fedkseed.runs.task import Stopwatch, TextTask


class Participant:
    """A client in the field, or one of Flower's simulation engine.

    Args:
        run_config: the run's settings.
        node_config: the node's own.

    Raises:
        FedKSeedError: the settings, the data or the model cannot be used.
    """

    def __init__(self, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> None:
        begin = time.perf_counter()
        node = node_settings(run_config, node_config)
        who, config = node.client, node.config
        loaded = load_for(config, training=True)
        if isinstance(who, int) and isinstance(config, EngineConfig):
            records = simulated_records(config)
            names = sorted(records.clients)
            if who >= len(names):
                raise ConfigError(f"there are {len(names)} clients in the data and more SuperNodes; start {len(names)}")
            self.name = names[who]
            self._own = Held(records.clients[self.name], list(records.sources[self.name]), records.stop_ids)
            self._held_out, self._pad_id, self._goal = NOTHING, records.pad_id, records.goal
        else:
            self.name = str(who)
            learner = loaded.learner
            self._pad_id = learner.pad_id
            self._own = read_held(config, learner, node.data or "", "training", "train")
            self._held_out = (
                read_held(config, learner, node.eval_data, "evaluation", "test").drawn(config) if node.eval_data else NOTHING
            )
            everything = [*self._own.examples, *self._held_out.examples], [*self._own.records, *self._held_out.records]
            self._goal = goal_of(config, learner, self._own.stop_ids, *everything, where="node-config objective")
        self._node, self._config, self._backpropagation = node, config, node.backpropagation
        self._privacy, self._history = node.privacy, KeptHistory(node.state, self.name)
        self._loaded = loaded.bound
        self._kept = KeptPages(node.state, self.name, self._loaded.identity)
        self._seconds_loading = time.perf_counter() - begin

    def answer(self, kind: str, data: bytes) -> bytes:
        """The answer to a message of a kind: `hello`, `train`, `evaluate` or `add`."""
        known = {"hello": self.hello, "train": self.train, "evaluate": self.evaluate, "add": self.add}
        if kind == "train" and self._node.sums_only:
            raise ConfigError(
                f"{self.name!r} takes part in secure sums only, and the run has secure-sums off; change the run, or "
                "secure-sums in the node-config"
            )
        answer: bytes = known[kind](data)
        return answer

    def add(self, data: bytes) -> bytes:
        """The answer to a phase of a secure sum; see `fedkseed.flower.summing.answer`."""
        return summing.answer(self._node, self.name, self.train, data)

    def hello(self, data: bytes) -> bytes:
        """Who this is; the request's bytes say nothing."""
        return Hello(
            name=self.name,
            base=self._loaded.identity.fingerprint,
            num_examples=len(self._own.examples) if self._privacy is None else WITHHELD,
            num_eval_examples=len(self._held_out.examples),
            num_eval_tokens=sum(example.num_targets for example in self._held_out.examples),
            backpropagation=self._backpropagation,
        ).encode()

    def train(self, data: bytes) -> bytes:
        """Train as a request's bytes say; the reply's bytes, or those of `Lacking`.

        Raises:
            PrivacyError: the node's privacy budget is spent.
            ProtocolError: see `answer` of `fedkseed.kseed.client.Client` and `fedkseed.kseed.change_client.ChangeClient`.
        """
        begin = time.perf_counter()
        watch, roles, loaded = Stopwatch(), roles_of(self._config.facts), self._loaded
        request = roles.request(data)
        task = self._task(self._own, watch) or TextTask(loaded.model, self._own.examples, self._pad_id, watch)
        client = roles.client(self.name, loaded.bound, loaded.identity, task, watch, self._privacy)
        said = Log()

        def heard(step: int, loss: float) -> None:
            said.progress(f"{self.name}: round {request.server_round}, loss {loss:.4f}, steps", step + 1, request.num_steps)

        if isinstance(client, ChangeClient) and isinstance(request, ChangeRequest):
            client.pages = self._kept.load(request.run_id)
            if _lacks(client.pages, request):
                log(INFO, "%s: round %s builds on pages that are not here; asking for all", self.name, request.server_round)
                return Lacking(pages=len(client.pages)).encode()
            self._spend(request)
            reply = client.answer(data, heard)
            self._kept.save(request, client.pages)
        else:
            self._spend(request)
            reply = client.answer(data, heard)
        spent = ", ".join(f"{activity} {seconds:.2f} s" for activity, seconds in watch.read().items())
        log(
            INFO,
            "%s: round %s, %s steps in %.2f s (%s) after %.2f s of loading",
            *(self.name, request.server_round, request.num_steps, time.perf_counter() - begin, spent, self._seconds_loading),
        )
        self._seconds_loading = 0.0  # of what it keeps for the next
        return reply

    def _spend(self, request: Request) -> None:
        """Count what the reply will cost, before it is made: a node that dies in between has counted too much.

        Raises:
            PrivacyError: the budget does not allow it.
        """
        if (privacy := self._privacy) is None:
            return
        if privacy.unit == "record":
            epsilon = self._history.spend(
                privacy, sampling_rate(request.batch_size, len(self._own.examples)), request.num_steps
            )
        else:
            epsilon = self._history.spend(privacy, 1.0, 1)
        log(INFO, "%s: epsilon is %.3f at delta %g after this round, of a %s", self.name, epsilon, privacy.delta, privacy.unit)

    def evaluate(self, data: bytes) -> bytes:
        """The loss of this node's evaluation records under the published ledger of these bytes.

        Raises:
            LedgerError: not a ledger.
            ProtocolError: it is of another base model or pool, or this node has no such records, or their loss is no number.
        """
        ledger = Ledger.decode(data)
        if not self._held_out.examples:
            raise ProtocolError(f"{self.name!r} has no records to evaluate on; give eval-data in its node-config")
        difference = ledger.base.difference(self._loaded.identity, self._loaded.bound.names)
        first = ledger.pages[0].pool if ledger.pages else ledger.pool
        if difference or first != seed_pool(self._config) or bool(ledger.pages) != self._config.facts.has_pages:
            raise ProtocolError(f"the ledger is of another base model or pool than {self.name!r} has ({difference or first})")
        heard = partial(Log().progress, f"{self.name}: evaluating")
        watched = self._task(self._held_out, Stopwatch())
        result = self._loaded.evaluate(ledger, self._held_out.examples, self._pad_id, heard, watched)
        if not math.isfinite(result.loss):  # which an `Evaluation` does not carry: one client's NaN would be everybody's
            raise ProtocolError(
                f"the held-out loss of {self.name!r} is {result.loss:.4f}: the run diverges. Start anew with a lower lr"
            )
        return Evaluation(
            ledger=ledger.digest(),
            loss=result.loss,
            num_examples=result.num_examples,
            num_tokens=result.num_tokens,
            reward=result.reward if result.reward is not None and math.isfinite(result.reward) else None,
        ).encode()

    def _task(self, held: Held, watch: Stopwatch) -> AnswerTask | PairTask | None:
        """What is tuned on, where that is not the loss."""
        if self._goal is None:
            return None
        if self._config.goal.pairs:  # which are compared with what the base model thinks of them
            self._loaded.bound.open_page(seed_pool(self._config), [], self._config.movement)
            self._loaded.bound.rebuild(np.zeros(self._config.num_seeds, np.float32))
        return self._goal.task(self._loaded.model, held.examples, held.records, watch, self._loaded.identity)


def participant_of(run_id: int, run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> Participant:
    """The participant of a Flower run; in a process that lives on, its records are read once a run.

    Raises:
        FedKSeedError: see `Participant`.
    """
    return _kept(run_id, *(tuple(sorted(config.items())) for config in (run_config, node_config)))


@lru_cache(maxsize=1)
def _kept(run_id: int, run_config: tuple[tuple[str, Any], ...], node_config: tuple[tuple[str, Any], ...]) -> Participant:
    return Participant(dict(run_config), dict(node_config))


def _lacks(pages: tuple[Page, ...], request: ChangeRequest) -> bool:
    """Whether a request builds on other pages than these."""
    if request.is_whole:
        return False
    try:
        patched(pages, request)
    except ProtocolError:
        return True
    return False
