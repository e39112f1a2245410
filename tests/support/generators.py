"""The global generators of random, NumPy and torch, which nothing of ours reads or moves."""

import random

import numpy as np
import torch


def global_states() -> list[object]:
    """Where each of them is: equal before and after what does not draw from them."""
    _, words, position, *rest = np.random.get_state()  # noqa: NPY002 (the global one is the point)
    return [torch.get_rng_state().tolist(), words.tolist(), position, rest, random.getstate()]


def seed_globally(seed: int) -> None:
    """Put each of them elsewhere."""
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002
