"""What every algorithm shares, as state machines without a transport: rounds, envelope, settings, schedule, tasks."""

from fedkseed.federation.config import FederationConfig
from fedkseed.federation.rounds import Checkpoint, Contribution, Outcome, Refusal, Rounds, Summed, count_steps, shares

__all__ = [
    "Checkpoint",
    "Contribution",
    "FederationConfig",
    "Outcome",
    "Refusal",
    "Rounds",
    "Summed",
    "count_steps",
    "shares",
]
