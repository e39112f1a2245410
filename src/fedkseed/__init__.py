"""fedkseed: federated fine-tuning of all parameters of a language model, for a few kilobytes a round.

Names are loaded when first used, so that `fedkseed --help` does not wait for torch. docs/python.md shows them at work.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkseed.errors import FedKSeedError
    from fedkseed.federation.config import FederationConfig
    from fedkseed.federation.task import DifferentiableTask, Task
    from fedkseed.kseed.adapter import ledger_of, prepare, release
    from fedkseed.kseed.applied import applied, swap
    from fedkseed.kseed.apply import apply
    from fedkseed.kseed.arithmetic import merge
    from fedkseed.kseed.client import Client
    from fedkseed.kseed.ledger import Ledger
    from fedkseed.kseed.server import Server, seed_pool
    from fedkseed.kseed.sharing import load
    from fedkseed.models.binding import Binding, bind
    from fedkseed.models.lora import seed_lora
    from fedkseed.noise.pool import SeedPool
    from fedkseed.runs.progress import Progress
    from fedkseed.runs.scoring import evaluate
    from fedkseed.runs.settings import SimulationConfig
    from fedkseed.runs.simulation import simulate
    from fedkseed.runs.tuning import tune

__version__ = version("fedkseed")

_HOMES = {
    "Binding": "fedkseed.models.binding",
    "Client": "fedkseed.kseed.client",
    "DifferentiableTask": "fedkseed.federation.task",
    "FedKSeedError": "fedkseed.errors",
    "FederationConfig": "fedkseed.federation.config",
    "Ledger": "fedkseed.kseed.ledger",
    "Progress": "fedkseed.runs.progress",
    "SeedPool": "fedkseed.noise.pool",
    "Server": "fedkseed.kseed.server",
    "SimulationConfig": "fedkseed.runs.settings",
    "Task": "fedkseed.federation.task",
    "applied": "fedkseed.kseed.applied",
    "apply": "fedkseed.kseed.apply",
    "bind": "fedkseed.models.binding",
    "evaluate": "fedkseed.runs.scoring",
    "ledger_of": "fedkseed.kseed.adapter",
    "load": "fedkseed.kseed.sharing",
    "merge": "fedkseed.kseed.arithmetic",
    "prepare": "fedkseed.kseed.adapter",
    "release": "fedkseed.kseed.adapter",
    "seed_lora": "fedkseed.models.lora",
    "seed_pool": "fedkseed.kseed.server",
    "simulate": "fedkseed.runs.simulation",
    "swap": "fedkseed.kseed.applied",
    "tune": "fedkseed.runs.tuning",
}
__all__ = [
    "Binding",
    "Client",
    "DifferentiableTask",
    "FedKSeedError",
    "FederationConfig",
    "Ledger",
    "Progress",
    "SeedPool",
    "Server",
    "SimulationConfig",
    "Task",
    "__version__",
    "applied",
    "apply",
    "bind",
    "evaluate",
    "ledger_of",
    "load",
    "merge",
    "prepare",
    "release",
    "seed_lora",
    "seed_pool",
    "simulate",
    "swap",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedkseed' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
