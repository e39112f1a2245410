"""Which file of a run's folder is its checkpoint, by what the algorithm's clients send, and who reads it.

Whoever only looks at a run needs no more of its algorithm than this: torch is loaded where tensors are read.
"""

from __future__ import annotations

from pathlib import Path

from fedkseed.federation import Checkpoint
from fedkseed.federation.algorithms import Algorithm
from fedkseed.kseed.ledger import LEDGER, Ledger

TENSORS = "tensors.safetensors"
FILES = {"scalars": LEDGER, "changes": LEDGER, "tensors": TENSORS}
"""The checkpoint's name in a run's folder, by what clients send."""


def file_of(algorithm: Algorithm) -> str:
    """The name of an algorithm's checkpoint in a run's folder."""
    return FILES[algorithm.sends]


def load_checkpoint(file: Path) -> Checkpoint:
    """A checkpoint, by what its file is called.

    Raises:
        FedKSeedError: it cannot be read.
    """
    if file.name != TENSORS:
        return Ledger.load(file)
    from fedkseed.baselines import TunedTensors

    return TunedTensors.load(file)
