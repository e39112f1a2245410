"""The built-in demonstration: a tiny model that the project pretrained, and instruction tasks for 20 clients."""

from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fedkseed.demo.tasks import clients, held_out

__all__ = ["SETTINGS", "clients", "held_out", "model_folder"]

SETTINGS: MappingProxyType[str, Any] = MappingProxyType(
    {
        "algorithm": "fedkseed-grad",
        "num_clients": 20,
        "fraction_train": 0.2,
        "num_rounds": 8,
        "local_steps": 10,
        "batch_size": 8,
        "max_length": 96,
        "lr": 2e-3,
        "schedule": "linear",
        "num_seeds": 4096,
        "local_optimizer": "adam",
        "eval_every": 1,
        "eval_limit": "all",
        "dtype": "float32",
    }
)
"""The demo's `SimulationConfig`, but for the model and the data; dev/LOG.md (2026-11-27) says what else was tried."""


def model_folder() -> Path:
    """The Hugging Face folder of the demo's model and tokenizer; its README.md says how they were made."""
    return Path(str(files("fedkseed.demo") / "model"))
