"""A learning rate for any algorithm, from short federations at rates a factor of three apart.

Calibration by slope and curvature (`fedkseed.kseed.calibration`) is of two-point steps. Whatever else an algorithm does is
tried: the same few rounds at each rate, on the run's own clients, and the loss on records that all of them hold.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedkseed.data import collate
from fedkseed.errors import InvalidValueError
from fedkseed.evaluation import mean_loss
from fedkseed.federation.algorithms import ALGORITHMS
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.models.loading import load_model
from fedkseed.randomness import generator
from fedkseed.runs.algorithms import Federation, kind_of
from fedkseed.runs.observer import WARNING, Observer
from fedkseed.runs.records import Records
from fedkseed.runs.settings import SimulationConfig
from fedkseed.runs.task import Stopwatch

FACTOR = 3.0
TRIAL_ROUNDS, TRIAL_STEPS, TRIAL_CLIENTS = 3, 8, 4
TRIAL_BATCHES, BATCH = 8, 8
MAX_TRIALS = 7
SAFETY = 1 / 3
"""What goes well for a few rounds can overshoot in many: the rate taken is a factor below the best one."""


@dataclass(frozen=True)
class Attempt:
    """A short federation at one rate: the mean loss of some records after it."""

    lr: float
    after: float


@dataclass(frozen=True)
class Rate:
    """What was found, and how.

    Attributes:
        lr: the learning rate to take.
        before: the loss of the records under the base model.
        attempts: the rates that were tried, ascending.
        num_steps: local steps that it took.
    """

    lr: float
    before: float
    attempts: tuple[Attempt, ...]
    num_steps: int


def find_rate(config: SimulationConfig, records: Records, observer: Observer, model: Any = None) -> Rate:
    """Try rates around the algorithm's usual one; the best that is not at an end, else further ones.

    Args:
        config: the settings; its rate is not looked at.
        records: the clients' records.
        observer: hears of every attempt.
        model: a loaded model, which is left as it was; None loads the one that the settings name, for each attempt.

    Raises:
        InvalidValueError: no rate lowers the loss.
    """
    names = sorted(records.clients)[:TRIAL_CLIENTS]
    own = {name: records.clients[name] for name in names}
    pooled = [example for examples in own.values() for example in examples]
    drawn = generator(config.seed, "rates").choice(len(pooled), min(TRIAL_BATCHES * BATCH, len(pooled)), replace=False)
    held = [pooled[i] for i in drawn.tolist()]
    few = replace(records, clients=own, held_out=held, references=[])
    short = config.model_copy(
        update={
            "num_rounds": TRIAL_ROUNDS,
            "fraction_train": 1.0,
            "min_replies": 1,
            "secure_sums": "off",
            "local_unit": "steps",
            "local_steps": min(config.local_steps, TRIAL_STEPS) if config.local_unit == "steps" else TRIAL_STEPS,
        }
    )

    def loss(federation: Federation) -> float:
        with torch.inference_mode():
            device = next(federation.model.parameters()).device
            parts = [held[i : i + BATCH] for i in range(0, len(held), BATCH)]
            return float(np.mean([mean_loss(federation.model, collate(p, records.pad_id, device)).item() for p in parts]))

    def attempt(lr: float) -> Attempt:
        federation = _federate(short.model_copy(update={"lr": lr}), few, model)
        server = federation.server
        while not server.finished:
            requests = server.plan()
            replies: list[tuple[str, bytes]] = []
            for request in requests:
                done = (server.checkpoint.round * len(requests) + len(replies)) * short.local_steps
                heard = _told(observer, lr, done, TRIAL_ROUNDS * len(requests) * short.local_steps)
                replies.append((request.client, federation.clients[request.client].answer(request.encode(), heard)))
            if server.absorb(replies).status == "failed":  # no reply was usable
                observer.note(f"lr {lr:.3g}: no step was usable")
                return Attempt(lr, math.inf)
        federation.restore()
        after = loss(federation)
        observer.note(f"lr {lr:.3g}: loss {after:.4f}")
        return Attempt(lr, after if math.isfinite(after) else math.inf)

    before = loss(_federate(short.model_copy(update={"lr": config.facts.usual_lr}), few, model))
    observer.note(f"base model: loss {before:.4f}")
    attempts = _search(usual_rate(config), attempt, before)
    best = min(attempts, key=lambda a: a.after)
    if not best.after < before:
        tried = ", ".join(f"{a.lr:.3g}" for a in attempts)
        remedy = "another --server-lr" if OPTIMIZERS[config.server_optimizer].bounded else "a larger --batch-size"
        raise InvalidValueError(
            f"no rate of {tried} lowers the loss of {before:.4f} in {TRIAL_ROUNDS} rounds; "
            f"give {remedy}, or choose --lr by hand"
        )
    if best in (attempts[0], attempts[-1]):
        observer.note(
            f"{WARNING}the best rate, {best.lr:.3g}, is at the end of what was tried; a further one may do better, so look "
            "at both sides of it by hand"
        )
    steps = len(attempts) * TRIAL_ROUNDS * len(names) * short.local_steps
    return Rate(float(f"{best.lr * SAFETY:.2g}"), before, tuple(attempts), steps)


def usual_rate(config: SimulationConfig) -> float:
    """Where to begin. Of two-point clients alone at FedKSeed's rate, which on a table's K numbers is K times as large."""
    if config.two_point_clients < 1:
        return config.facts.usual_lr
    return ALGORITHMS["fedkseed"].usual_lr * (config.num_seeds if config.basis == "table" else 1)


def _search(usual: float, attempt: Callable[[float], Attempt], before: float) -> list[Attempt]:
    """Attempts at three rates, and at further ones while the best is at an end; ascending.

    Losses of rates that are all too large are in no order, so while none is below the base model's, lower ones follow.
    """
    attempts = [attempt(usual * FACTOR**i) for i in (-1, 0, 1)]
    while len(attempts) < MAX_TRIALS:
        best = min(range(len(attempts)), key=lambda i: attempts[i].after)
        if best == 0 or not attempts[best].after < before:
            attempts.insert(0, attempt(attempts[0].lr / FACTOR))
        elif best == len(attempts) - 1:
            attempts.append(attempt(attempts[-1].lr * FACTOR))
        else:
            break
    return attempts


def _told(observer: Observer, lr: float, before: int, total: int) -> Callable[[int, float], None]:
    """Tells an observer how many of an attempt's steps are done."""
    return lambda step, loss: observer.progress(f"trying lr {lr:.3g}", min(before + step + 1, total), total)


def _federate(config: SimulationConfig, records: Records, given: Any) -> Federation:
    model = load_model(config.model, config.dtype, config.device) if given is None else copy.deepcopy(given)
    model.train(False)
    return kind_of(config.facts).federate(config, model, None, records, Stopwatch())
