"""A whole federation in one process: the clients share one model in memory, every message passes through its bytes."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.baselines import Parameters, TensorClient, TensorServer, TunedTensors, attach, fingerprint
from fedkseed.data import EncodedExample, collate
from fedkseed.errors import LedgerError, RunError, TooFewRepliesError
from fedkseed.evaluation import evaluate_loss, mean_loss
from fedkseed.federation import Checkpoint, Rounds
from fedkseed.federation.algorithms import SEEDS, ZEROTH_ORDER
from fedkseed.federation.envelope import Request
from fedkseed.kseed.client import Client, Task
from fedkseed.kseed.server import Server, seed_pool, start
from fedkseed.models.binding import Binding, bind
from fedkseed.models.loading import base_path, load_model
from fedkseed.runs.events import evaluation_event, round_event
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.memory import peak_memory
from fedkseed.runs.observer import Observer, Probe
from fedkseed.runs.records import Records

EVAL_BATCH = 8
DIVERGED = 1.1
"""A held-out loss that is so many times the best one before it is called divergence."""


class Stopwatch:
    """Seconds by activity since it was last read."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Count the time inside as that activity."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[activity] += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """The seconds so far, and start anew."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


class TimedModel:
    """A bound model whose sweeps are timed."""

    def __init__(self, bound: Binding, watch: Stopwatch) -> None:
        self.pool, self._bound, self._watch = bound.pool, bound, watch

    def rebuild(self, coefficients: NDArray[np.float32]) -> None:
        """See `Binding.rebuild`."""
        with self._watch("rebuild"):
            self._bound.rebuild(coefficients)

    def move(self, indices: Sequence[int], amounts: Sequence[float]) -> None:
        """See `Binding.move`."""
        with self._watch("noise"):
            self._bound.move(indices, amounts)


class TextTask:
    """A simulated client's records and their loss under the shared model; see `fedkseed.kseed.client.Task`."""

    def __init__(self, model: torch.nn.Module, examples: Sequence[EncodedExample], pad_id: int, watch: Stopwatch) -> None:
        self._model, self._examples, self._pad_id, self._watch = model, examples, pad_id, watch
        self._device = next(model.parameters()).device

    @property
    def num_examples(self) -> int:
        """How many records the client holds."""
        return len(self._examples)

    def loss(self, records: NDArray[np.int64]) -> float:
        """Mean loss over the response tokens of some records."""
        with self._watch("forward"), torch.inference_mode():
            return self._loss(records).item()

    def differentiable_loss(self, records: NDArray[np.int64]) -> torch.Tensor:
        """The same, 0-dim, for backpropagation."""
        with self._watch("forward"):
            return self._loss(records)

    def _loss(self, records: NDArray[np.int64]) -> torch.Tensor:
        batch = collate([self._examples[i] for i in records], self._pad_id, self._device)
        return mean_loss(self._model, batch)


class Participant(Protocol):
    """A simulated client of any algorithm."""

    @property
    def task(self) -> Task:
        """Its records and their loss."""
        ...

    def answer(self, data: bytes, on_step: Callable[[int, float], None] | None = None) -> bytes:
        """Train as a request's bytes say and give the reply's; `on_step` hears each step's number and loss."""
        ...


@dataclass(frozen=True)
class Federation:
    """What a driver needs of an algorithm.

    Attributes:
        model: what is evaluated; a soft prompt is part of it.
        server: the rounds.
        clients: by name.
        restore: sets the model to the server's checkpoint.
    """

    model: torch.nn.Module
    server: Rounds[Any, Any]
    clients: Mapping[str, Participant]
    restore: Callable[[], None]


class Simulation:
    """A federation that is ready to run: model loaded, server where the run's checkpoint is.

    Args:
        run: the run's folder; its checkpoint, if there is one, is gone on from.
        records: the data.
        observer: who watches.

    Raises:
        FedKSeedError: the model or the checkpoint cannot be used.
    """

    def __init__(self, run: RunFolder, records: Records, observer: Observer) -> None:
        config = run.config
        self.run, self.config, self.observer = run, config, observer
        self._records, self._watch = records, Stopwatch()
        model = load_model(config.model, config.dtype, config.device)
        d, dtype = sum(p.numel() for p in model.parameters()), str(model.dtype).removeprefix("torch.")
        observer.note(f"model: {config.model}, {d:,} parameters in {dtype}")
        federation = (over_seeds if config.algorithm in SEEDS else over_tensors)(run, model, records, self._watch)
        self.model, self.server, self.clients = federation.model, federation.server, federation.clients
        self.restore = federation.restore

    def train(self) -> Checkpoint:
        """Do all rounds that are left; after each the checkpoint is on the disk.

        Raises:
            TooFewRepliesError: a round failed three times for want of replies; the checkpoint is safe.
            RunError: a file cannot be written; the checkpoint is safe.
        """
        self.run.cut_metrics(self.server.checkpoint.round)
        evaluated = {event["server_round"] for event in self.run.metrics() if event["event"] == "evaluation"}
        if self._due(self.server.checkpoint.round) and self.server.checkpoint.round not in evaluated:
            self._evaluate()
        while not self.server.finished:
            self._round()
            if self._due(self.server.checkpoint.round):
                self._evaluate()
        return self.server.checkpoint

    def _round(self) -> None:
        status = "repeat"
        while status == "repeat":
            begin = time.perf_counter()
            requests = [(request, request.encode()) for request in self.server.plan()]
            replies = []
            for place, (request, data) in enumerate(requests, start=1):
                heard = self._hear(request, place, len(requests))
                replies.append((request.client, self.clients[request.client].answer(data, heard)))
            outcome = self.server.absorb(replies)
            status = outcome.status
            event = round_event(outcome, request.lr) | {
                "bytes_down": sum(len(data) for _, data in requests) / len(requests),
                "bytes_up": sum(len(data) for _, data in replies) / len(replies),
                "seconds": time.perf_counter() - begin,
                "seconds_by": self._watch.read(),
                "peak_bytes": peak_memory(self.config.device),
            }
            for refusal in outcome.refusals:
                self.observer.note(f"round {outcome.server_round}: reply of {refusal.client} refused: {refusal.reason}")
            if status == "closed":
                # metrics first: a kill in between leaves a line too many, which a resume cuts, never one too few
                self.run.append_metrics(event)
                self.server.checkpoint.save(self.run.checkpoint_path)
                self.observer.event(event)
        if status == "failed":
            raise TooFewRepliesError(
                f"round {outcome.server_round} ended three times with fewer than {self.config.min_replies} accepted replies; "
                f"round {self.server.checkpoint.round} is safe in {self.run.path}: lower --min-replies, then --resume"
            )

    def _hear(self, request: Request, place: int, cohort: int) -> Callable[[int, float], None]:
        """Tells the observer of each loss that this client measures in this round."""

        def heard(step: int, loss: float) -> None:
            self.observer.probe(Probe(request.server_round, request.client, place, cohort, step, request.num_steps, loss))

        return heard

    def _due(self, server_round: int) -> bool:
        return server_round % self.config.eval_every == 0 or server_round == self.config.num_rounds

    def _evaluate(self) -> None:
        server_round = self.server.checkpoint.round
        begin = time.perf_counter()
        self.restore()
        heard = partial(self.observer.progress, f"evaluating after round {server_round}")
        result = evaluate_loss(self.model, self._records.held_out, EVAL_BATCH, self._records.pad_id, heard)
        self._warn(server_round, result.loss)
        weight_bytes = sum(p.nbytes for p in self.model.parameters())
        event = evaluation_event(server_round, result, weight_bytes, time.perf_counter() - begin)
        self._watch.read()  # the rebuild here is part of the evaluation's own seconds
        self.run.append_metrics(event)
        self.observer.event(event)

    def _warn(self, server_round: int, loss: float) -> None:
        """Say so when the run goes the wrong way."""
        best = min((e["eval_loss"] for e in self.run.metrics() if e["event"] == "evaluation"), default=loss)
        if math.isfinite(loss) and loss <= DIVERGED * best:
            return
        self.observer.note(
            f"round {server_round}: the held-out loss is {loss:.4f}, it was {best:.4f}: the run diverges. "
            f"Start anew with a lower --lr than {self.config.lr:g}"
            + (", or with --lr auto; fedkseed tune explains it" if self.config.algorithm in ZEROTH_ORDER else "")
        )


def over_seeds(run: RunFolder, model: torch.nn.Module, records: Records, watch: Stopwatch) -> Federation:
    """FedKSeed and FedKSeed-Pro: one model bound to the run's pool, shared by all clients.

    Raises:
        LedgerError: the run's ledger is of another base model, or damaged.
    """
    config, ledger = run.config, run.load_ledger()
    model.requires_grad_(True)
    # a GPU keeps its own copy of the base: the file would go through the bus at every rebuild
    bound = bind(model, seed_pool(config), base_path(config.model, model) if config.device == "cpu" else None)
    base = bound.identity()
    if ledger is not None and (difference := ledger.base.difference(base, bound.names)):
        raise LedgerError(f"{run.ledger_path} is of another base model than {config.model}: {difference}")
    server = Server(config, ledger or start(config, base), list(records.clients), num_examples=records.sizes)
    shared = TimedModel(bound, watch)
    clients = {
        name: Client(name, shared, base, TextTask(model, examples, records.pad_id, watch))
        for name, examples in records.clients.items()
    }
    return Federation(model, server, clients, lambda: bound.rebuild(server.ledger.coefficients))


def over_tensors(run: RunFolder, model: torch.nn.Module, records: Records, watch: Stopwatch) -> Federation:
    """The baselines: one model with what the algorithm tunes, shared by all clients.

    Raises:
        RunError: the run's tensors are of another base model or algorithm, or damaged.
        FedKSeedError: the algorithm's extra is missing, or does not know this architecture.
    """
    config, saved = run.config, run.load_tensors()
    base = fingerprint(model)
    if saved is not None and saved.base != base:
        raise RunError(f"{run.tensors_path} is of another base model than {config.model}; go on with the run's own")
    attached = attach(model, config)
    parameters = Parameters(attached)
    first = saved or TunedTensors(config.algorithm, base, 0, parameters.read())
    server = TensorServer(config, first, list(records.clients), num_examples=records.sizes)
    clients = {
        name: TensorClient(name, config, attached, base, TextTask(attached, examples, records.pad_id, watch))
        for name, examples in records.clients.items()
    }
    return Federation(attached, server, clients, lambda: parameters.write(server.checkpoint.tensors))
