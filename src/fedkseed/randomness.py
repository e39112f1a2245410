"""Random numbers as a function of where they are used: never a global state, the same again after a resume."""

import hashlib
import json

import numpy as np


def derive(seed: int, *path: str | int) -> int:
    """An unsigned 64-bit key from a run's seed and a path, such as (server_round, client, "batches")."""
    digest = hashlib.blake2b(json.dumps([seed, *path]).encode(), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def generator(seed: int, *path: str | int) -> np.random.Generator:
    """A NumPy generator (Philox) with that key."""
    return np.random.Generator(np.random.Philox(key=derive(seed, *path)))
