"""FedKSeed on Flower: a strategy, a server app and a client app; the only place that imports flwr.

An app of one's own is `app = server_app()` in one file and `app = client_app()` in another (examples/flower).
"""

try:
    import flwr as _flwr  # noqa: F401
except ImportError as error:
    raise ImportError("fedkseed.flower needs Flower; install it with: pip install 'fedkseed[flower]'") from error

from fedkseed.flower.client_app import client_app
from fedkseed.flower.config import FlowerConfig
from fedkseed.flower.server_app import server_app
from fedkseed.flower.strategy import FedKSeed

__all__ = ["FedKSeed", "FlowerConfig", "client_app", "server_app"]
