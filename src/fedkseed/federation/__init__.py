"""The federation's rules as state machines: a server and clients that exchange bytes, without a transport."""

from fedkseed.federation.client import Client, Model, Task
from fedkseed.federation.config import FederationConfig, Limits
from fedkseed.federation.server import Contribution, Outcome, Refusal, Server, count_steps, seed_pool, start

__all__ = [
    "Client",
    "Contribution",
    "FederationConfig",
    "Limits",
    "Model",
    "Outcome",
    "Refusal",
    "Server",
    "Task",
    "count_steps",
    "seed_pool",
    "start",
]
