"""A whole federation in one process: the clients share one model in memory, every message passes through its bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fedkseed.evaluation import evaluate_loss
from fedkseed.federation import Checkpoint
from fedkseed.federation.envelope import Request
from fedkseed.models.loading import load_model
from fedkseed.runs.algorithms import kind_of
from fedkseed.runs.driver import Driver
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.memory import peak_memory
from fedkseed.runs.observer import Observer, Probe
from fedkseed.runs.records import Records
from fedkseed.runs.task import EVAL_BATCH, Stopwatch


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
        federation = kind_of(config.facts).federate(config, model, run.load_checkpoint(), records, self._watch)
        self.model, self.server, self.clients = federation.model, federation.server, federation.clients
        self.restore = federation.restore
        self._driver = Driver(run, self.server, observer)

    def train(self) -> Checkpoint:
        """Do all rounds that are left; see `Driver.drive`."""
        return self._driver.drive(self._attempt, self._evaluate)

    def _attempt(self) -> bool:
        requests = self._driver.plan()
        replies = [
            (request.client, self.clients[request.client].answer(data, self._hear(request, place, len(requests))))
            for place, (request, data) in enumerate(requests, start=1)
        ]
        return self._driver.close(replies, measured=self._measured) is not None

    def _measured(self) -> dict[str, Any]:
        return {"seconds_by": self._watch.read(), "peak_bytes": peak_memory(self.config.device)}

    def _hear(self, request: Request, place: int, cohort: int) -> Callable[[int, float], None]:
        """Tells the observer of each loss that this client measures in this round."""

        def heard(step: int, loss: float) -> None:
            self.observer.probe(Probe(request.server_round, request.client, place, cohort, step, request.num_steps, loss))

        return heard

    def _evaluate(self) -> None:
        begin = time.perf_counter()
        self.restore()
        heard = partial(self.observer.progress, f"evaluating after round {self._driver.round}")
        result = evaluate_loss(self.model, self._records.held_out, EVAL_BATCH, self._records.pad_id, heard)
        self._watch.read()  # the rebuild here is part of the evaluation's own seconds
        self._driver.evaluated(result, sum(p.nbytes for p in self.model.parameters()), time.perf_counter() - begin)
