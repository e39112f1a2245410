"""What is said before a run starts: how long it will take, what takes most of that, and what it will move."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from fedkseed.federation.algorithms import Algorithm

if TYPE_CHECKING:
    from fedkseed.federation import FederationConfig
    from fedkseed.runs.forecast import Forecast

ACTIVITIES = {"noise": "moving weights", "rebuild": "rebuilding the model", "evaluation": "evaluation"}
"""What people call these, beside the passes."""


def describe(found: Forecast, facts: Algorithm) -> list[str]:
    """A forecast as two lines: time and bytes."""
    passes = "forward passes" if facts.measures == "two-point" else "forward and backward passes"
    total = found.total_seconds or 1.0
    shares = sorted(((seconds / total, name) for name, seconds in found.seconds.items()), reverse=True)
    told = [f"{100 * share:.0f}\u00a0% {ACTIVITIES.get(name, passes)}" for share, name in shares if share >= 0.005]
    both = found.bytes_down + found.bytes_up
    return [
        f"forecast: about {_duration(found.total_seconds)} on this machine, of which {', '.join(told)}",
        f"forecast: about {both:,.0f} bytes a client and round, {found.bytes_down:,.0f} down and {found.bytes_up:,.0f} up; "
        f"{found.total_bytes:,.0f} in all",
    ]


def cost_of_step(config: FederationConfig) -> list[str]:
    """What a step on scores costs, as a line; none of a step on the loss, which the forecast's passes say."""
    if config.goal.smooth:
        return []
    probes = 2 * config.directions
    each = f"answers of at most {config.max_new_tokens} tokens" if config.goal.answers else "pairs, two passes each"
    return [
        f"objective {config.objective}: a step has {probes} probes (2 x --directions) of {config.batch_size} records: "
        f"{probes * config.batch_size} {each}"
    ]


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))
