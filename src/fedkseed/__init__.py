"""fedkseed: federated fine-tuning of all parameters of a language model, for a few kilobytes a round.

Names are loaded when first used, so that `fedkseed --help` does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkseed.errors import FedKSeedError
    from fedkseed.kseed.apply import apply
    from fedkseed.kseed.ledger import Ledger
    from fedkseed.models.binding import Binding, bind
    from fedkseed.noise.pool import SeedPool

__version__ = version("fedkseed")
__all__ = ["Binding", "FedKSeedError", "Ledger", "SeedPool", "__version__", "apply", "bind"]

_HOMES = {
    "Binding": "fedkseed.models.binding",
    "FedKSeedError": "fedkseed.errors",
    "Ledger": "fedkseed.kseed.ledger",
    "SeedPool": "fedkseed.noise.pool",
    "apply": "fedkseed.kseed.apply",
    "bind": "fedkseed.models.binding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedkseed' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
