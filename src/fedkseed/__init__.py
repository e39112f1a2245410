"""fedkseed: federated fine-tuning of all parameters of a language model, for a few kilobytes a round.

Names are loaded when first used, so that `fedkseed --help` does not wait for torch.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedkseed.binding import Binding, bind
    from fedkseed.errors import FedKSeedError
    from fedkseed.ledger import Ledger
    from fedkseed.pool import SeedPool
    from fedkseed.tuned_model import apply

__version__ = version("fedkseed")
__all__ = ["Binding", "FedKSeedError", "Ledger", "SeedPool", "__version__", "apply", "bind"]

_HOMES = {
    "Binding": "fedkseed.binding",
    "FedKSeedError": "fedkseed.errors",
    "Ledger": "fedkseed.ledger",
    "SeedPool": "fedkseed.pool",
    "apply": "fedkseed.tuned_model",
    "bind": "fedkseed.binding",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedkseed' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
