"""Whom a round asks, for how many steps, and what each of those who answer weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedkseed.errors import RunError
from fedkseed.federation.config import FederationConfig
from fedkseed.federation.envelope import MAX_STEPS
from fedkseed.randomness import generator


def draw_cohort(config: FederationConfig, asked: Sequence[str], size: int, server_round: int, attempt: int) -> list[str]:
    """So many of the clients that may be asked, or all, sorted; a function of the run's seed, the round and the attempt."""
    draw = generator(config.seed, server_round, attempt, "cohort")
    return sorted(draw.choice(list(asked), min(size, len(asked)), replace=False).tolist())


def shares(sizes: Mapping[str, int], limit: float) -> dict[str, float]:
    """What each of some weighs, in proportion to its size and no more than a limit; together 1.

    What the largest would have beyond their share goes to the others in proportion.

    Args:
        sizes: positive, by name.
        limit: at least an equal share; see `FederationConfig.largest_share`.
    """
    held, free, rest = set(), 1.0, sum(sizes.values())
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if free * sizes[name] / rest <= limit:
            break
        held.add(name)
        free, rest = free - limit, rest - sizes[name]
    return {name: limit if name in held else free * size / rest for name, size in sizes.items()}


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
    most = MAX_STEPS // config.directions
    if not 1 <= steps <= most:
        raise RunError(
            f"{config.local_steps} epochs of client {client!r} are {steps} steps; expected 1 to {most}, "
            "so lower --local-steps or raise --batch-size"
        )
    return steps
