"""How long a run will take and what it will move, from one step and one batch of the evaluation, measured before it starts.

What is measured leaves no trace: throwaway copies of server and client carry the step out on the shared model, whose weights
are set to the checkpoint's again afterwards, as before every evaluation.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedkseed.data import EncodedExample
from fedkseed.evaluation import evaluate_loss
from fedkseed.kseed.pages import is_replaced
from fedkseed.randomness import generator
from fedkseed.runs.algorithms import Federation
from fedkseed.runs.held_out import num_evaluations
from fedkseed.runs.records import Records
from fedkseed.runs.settings import SimulationConfig
from fedkseed.runs.task import EVAL_BATCH, ScoredTask, Stopwatch, TextTask

QUICK = 0.3
"""Seconds: a step that takes less is taken once more, since the first of a process also compiles."""
DRAWN = 64
"""Batches of which the usual size is found."""


@dataclass(frozen=True)
class Forecast:
    """What the rounds that are left will take.

    Attributes:
        seconds: by activity: `passes` of local steps, moving weights (`noise`), `rebuild`, `evaluation`.
        bytes_down, bytes_up: of a client in a round, on average.
        replies: how many times a client will be asked.
    """

    seconds: Mapping[str, float]
    bytes_down: float
    bytes_up: float
    replies: int

    @property
    def total_seconds(self) -> float:
        """In all."""
        return sum(self.seconds.values())

    @property
    def total_bytes(self) -> float:
        """Both ways, of all clients and rounds."""
        return (self.bytes_down + self.bytes_up) * self.replies


def forecast(config: SimulationConfig, federation: Federation, records: Records, watch: Stopwatch) -> Forecast:
    """Measure a step and a batch of the evaluation, and reckon what the rounds that are left will take.

    Args:
        config: the settings.
        federation: ready to run, with rounds left; its model's weights are the checkpoint's afterwards.
        records: the run's.
        watch: what its clients count their seconds with; read and started anew.
    """
    server, rounds = federation.server, config.num_rounds - federation.server.checkpoint.round
    requests = copy.copy(server).plan()
    steps = float(np.mean([server.steps[name] for name in server.clients]))
    try:
        spent, reply = _step(config, federation, records, watch, requests[0].client)
        evaluation = _evaluation_seconds(federation.model, records) + _scoring_seconds(federation.watched, records)
    finally:
        federation.restore()
        watch.read()
    replies = rounds * len(requests)
    seconds = {name: value * steps * replies for name, value in spent.items()}
    rebuilds = replies + num_evaluations(config, server.checkpoint.round)
    seconds["rebuild"] = spent["rebuild"] * rebuilds
    seconds["evaluation"] = evaluation * num_evaluations(config, server.checkpoint.round)
    down, up = float(np.mean([len(request.encode()) for request in requests])), float(len(reply))
    if config.facts.sends == "scalars":
        up += (steps - 1) * config.directions * (2 if config.wire == "float16" else 4)
    if config.facts.sends == "changes":
        down += up * _parts(config, server.checkpoint.round, len(requests) / len(server.clients))
    if config.secure_sums == "on":
        beside, up = sum_bytes(config, len(requests), requests[0].client)
        down += beside
    return Forecast(seconds, down, up, replies)


def sum_bytes(config: SimulationConfig, cohort: int, name: str) -> tuple[float, float]:
    """What a secure sum takes down, beside the training request, and up, of a client and round."""
    from fedkseed.secure.messages import bytes_beside
    from fedkseed.secure.server import TAIL

    return bytes_beside(cohort, config.num_seeds + TAIL, name)


def _step(
    config: SimulationConfig, federation: Federation, records: Records, watch: Stopwatch, name: str
) -> tuple[dict[str, float], bytes]:
    """The seconds of a step by activity, with `rebuild` before it, and the reply of a client that takes one."""
    server, client = copy.copy(federation.server), copy.copy(federation.clients[name])
    server.steps = dict.fromkeys(server.clients, 1)
    (request,) = (request for request in server.plan() if request.client == name)
    own = records.clients[name]
    everyone = own if records.goal else [example for examples in records.clients.values() for example in examples]
    batch = _usual_batch(everyone, config)
    client.task = (  # type: ignore[misc]  # a copy's own
        client.task.subset(batch)  # type: ignore[attr-defined]
        if records.goal
        else TextTask(federation.model, [everyone[i] for i in batch], records.pad_id, watch)
    )
    data = request.encode()
    for _ in range(2):
        watch.read()
        begin = time.perf_counter()
        reply = client.answer(data)
        total, by = time.perf_counter() - begin, watch.read()
        if total > QUICK:
            break
    rebuild, noise = by.get("rebuild", 0.0), by.get("noise", 0.0)
    return {"passes": max(total - rebuild - noise, 0.0), "noise": noise, "rebuild": rebuild}, reply


def _usual_batch(examples: Sequence[EncodedExample], config: SimulationConfig) -> list[int]:
    """The places of the batch, of some that are drawn, whose size in tokens is nearest to their mean."""
    draw, size = generator(config.seed, "forecast"), min(config.batch_size, len(examples))
    batches = [draw.choice(len(examples), size, replace=False).tolist() for _ in range(DRAWN)]
    widths = np.array([max(len(examples[i].input_ids) for i in batch) for batch in batches])
    usual: list[int] = batches[int(np.abs(widths - widths.mean()).argmin())]
    return usual


def _evaluation_seconds(model: Any, records: Records) -> float:
    """One evaluation, from its middle batch: the seconds go with the tokens."""
    ordered = sorted(records.held_out, key=lambda example: -len(example.input_ids))
    batches = [ordered[first : first + EVAL_BATCH] for first in range(0, len(ordered), EVAL_BATCH)]
    tokens = [len(batch) * len(batch[0].input_ids) for batch in batches]
    middle = len(batches) // 2
    begin = time.perf_counter()
    evaluate_loss(model, batches[middle], EVAL_BATCH, records.pad_id)
    return (time.perf_counter() - begin) * sum(tokens) / tokens[middle]


def _scoring_seconds(watched: ScoredTask | None, records: Records) -> float:
    """What the scores of an evaluation take, from a few of its records."""
    if watched is None:
        return 0.0
    number = len(records.held_out)
    few = range(0, number, -(-number // EVAL_BATCH))  # every so many, at most a batch
    some = watched.subset(few)
    begin = time.perf_counter()
    some.reward()
    return (time.perf_counter() - begin) * number / len(few)


def _parts(config: SimulationConfig, done: int, share: float) -> float:
    """How many rounds' changes a request holds on average: those since the client was asked last, or all.

    Of a wire that sends a page as a whole, that of the open page, and of each one that was closed since.
    """
    rounds, each = range(done, config.num_rounds), config.rounds_per_page or config.num_rounds
    if is_replaced(config.wire):
        closed = [sum((1 - share) ** (n - end) for end in range(each, n + 1, each)) for n in rounds]
        return float(np.mean([before + (n % each > 0) for n, before in zip(rounds, closed, strict=True)]))
    return float(np.mean([(1 - (1 - share) ** n) / share for n in rounds]))
