"""How many held-out records a run evaluates on where nobody says: so many that it costs at most a tenth of the training.

It is reckoned in forward passes of a record, not in seconds, so that it is the same on every machine; a run's `config.toml` has
the number, so that whoever goes on with the run evaluates on the same records.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedkseed.federation import count_steps
from fedkseed.runs.settings import RunConfig

SHARE = 10
"""Evaluation may take one pass for so many of the training's."""
FEWEST = 32
"""Records that are evaluated on however short the training is: fewer say nothing."""


def affordable(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """The number of records.

    Args:
        config: the settings.
        sizes: how many records each client has, by its name.

    Raises:
        RunError: a client's epochs are too many steps.
    """
    steps = sum(count_steps(config, size, name) for name, size in sizes.items()) / len(sizes)
    trained = config.num_rounds * config.cohort_size(len(sizes)) * steps * config.batch_size * config.passes_per_step
    evaluated = num_evaluations(config) * (2 if config.goal.pairs else 1)  # an evaluation, too, reads both responses of a pair
    return max(FEWEST, int(trained / SHARE / evaluated))


def num_evaluations(config: RunConfig, done: int = 0) -> int:
    """How many evaluations follow after so many rounds: every so many rounds, after the last, and of the base model."""
    rounds = range(done + 1 if done else 0, config.num_rounds + 1)
    return sum(n % config.eval_every == 0 or n == config.num_rounds for n in rounds)
