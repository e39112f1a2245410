"""FedKSeed on Flower: a strategy, a server app and a client app; the only place that imports flwr.

An app of one's own is `app = server_app()` in one file and `app = client_app()` in another (examples/flower).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedkseed.errors import installing

try:
    import flwr as _flwr  # noqa: F401
except ImportError as error:
    raise ImportError(f"fedkseed.flower needs Flower; install it with: {installing('flower')}") from error

from fedkseed.flower.client_app import client_app
from fedkseed.flower.server_app import server_app

if TYPE_CHECKING:
    from fedkseed.flower.config import FlowerConfig
    from fedkseed.flower.strategy import FedKSeed

__all__ = ["FedKSeed", "FlowerConfig", "client_app", "server_app"]
_HOMES = {"FedKSeed": "fedkseed.flower.strategy", "FlowerConfig": "fedkseed.flower.config"}
"""Loaded when first used: they need torch, which a node's message that is handed on does not."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedkseed.flower' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
