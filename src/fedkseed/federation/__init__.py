"""What every algorithm shares, as state machines without a transport: rounds, envelope, settings, schedule, tasks."""

from fedkseed.federation.checkpoint import Checkpoint
from fedkseed.federation.cohort import count_steps, shares
from fedkseed.federation.config import FederationConfig
from fedkseed.federation.outcome import Contribution, Outcome, Refusal, Summed
from fedkseed.federation.rounds import Rounds

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
