"""What every algorithm shares, as state machines without a transport: rounds, envelope, settings, schedule, tasks."""

from fedkseed.federation.config import FederationConfig, Limits
from fedkseed.federation.rounds import Checkpoint, Contribution, Outcome, Refusal, Rounds, count_steps

__all__ = [
    "Checkpoint",
    "Contribution",
    "FederationConfig",
    "Limits",
    "Outcome",
    "Refusal",
    "Rounds",
    "count_steps",
]
