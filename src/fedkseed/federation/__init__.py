"""The federation's rules as state machines: a server and clients that exchange bytes, without a transport."""

from fedkseed.federation.client import Client, Model, Task, batches, by_step, check_addressee
from fedkseed.federation.config import FederationConfig, Limits
from fedkseed.federation.rounds import Checkpoint, Contribution, Outcome, Refusal, Rounds, count_steps
from fedkseed.federation.server import Server, seed_pool, start

__all__ = [
    "Checkpoint",
    "Client",
    "Contribution",
    "FederationConfig",
    "Limits",
    "Model",
    "Outcome",
    "Refusal",
    "Rounds",
    "Server",
    "Task",
    "batches",
    "by_step",
    "check_addressee",
    "count_steps",
    "seed_pool",
    "start",
]
