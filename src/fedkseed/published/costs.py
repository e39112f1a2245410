"""What a run will cost on this machine with either noise, estimated from a few timed passes before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedkseed.noise.families import FAMILIES
from fedkseed.noise.pool import SeedPool
from fedkseed.runs.simulation import Simulation

TIMED_SEEDS = 4
"""Gaussian seeds that are timed; all others cost the same."""


@dataclass(frozen=True)
class Cost:
    """Seconds that a family of noise takes.

    Attributes:
        rebuild: at most, to rebuild the model once (gaussian: when every seed has been used).
        each_round: one round: cohort, steps and evaluation.
    """

    rebuild: float
    each_round: float


def estimate(simulation: Simulation, num_held_out: int) -> dict[str, Cost]:
    """The costs by family, on the simulation's own model and first records of its largest client."""
    config, model = simulation.config, simulation.model
    num_parameters = sum(p.numel() for p in model.parameters())
    name, largest = max(((name, p.numel()) for name, p in model.named_parameters()), key=lambda item: item[1])
    scale = num_parameters / largest
    clients = simulation.clients.values()
    task = max(clients, key=lambda client: client.task.num_examples).task
    forward = _seconds(lambda: task.loss(np.arange(min(config.batch_size, task.num_examples))))
    cohort = config.cohort_size(len(simulation.clients))
    steps = np.mean([simulation.server.steps[name] for name in simulation.clients])
    costs: dict[str, Cost] = {}
    for family in FAMILIES:
        pool = SeedPool(0, config.num_seeds, family)
        pass_over = _seconds(lambda pool=pool: pool.perturbation(name, largest, 0)) * scale  # type: ignore[misc]
        if pool.facts.pass_per_seed:
            some = np.zeros(pool.size, np.float32)
            some[:TIMED_SEEDS] = 1
            rebuild = _seconds(lambda pool=pool, some=some: pool.combine(name, largest, some)) * scale  # type: ignore[misc]
            rebuild *= pool.size / min(TIMED_SEEDS, pool.size)
            rebuilds = 1  # the clients of a round share one
        else:
            rebuild, rebuilds = pass_over, cohort + 1
        evaluation = forward * num_held_out / config.batch_size
        each_round = cohort * steps * 2 * (forward + pass_over) + rebuilds * rebuild + evaluation
        costs[family] = Cost(rebuild, float(each_round))
    return costs


def describe(costs: dict[str, Cost], chosen: str, num_rounds: int) -> list[str]:
    """The costs as lines, the chosen family first."""
    lines = []
    for family in sorted(costs, key=lambda family: family != chosen):
        cost = costs[family]
        choice = "chosen" if family == chosen else f"take it with --noise {family}"
        lines.append(
            f"cost here with {family} noise ({choice}): up to {_time(cost.rebuild)} to rebuild the model, "
            f"about {_time(cost.each_round)} a round, {_time(cost.each_round * num_rounds)} in all"
        )
    return lines


def _seconds(work: Callable[[], object]) -> float:
    work()
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _time(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} seconds"
