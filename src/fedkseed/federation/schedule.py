"""The learning rate over the rounds."""

import math


def learning_rate(schedule: str, lr: float, done: int, num_rounds: int) -> float:
    """The rate of the round after `done` of `num_rounds`: constant, or falling from `lr` towards 0 (never 0 itself)."""
    fraction = done / num_rounds
    if schedule == "linear":
        return lr * (1 - fraction)
    if schedule == "cosine":
        return lr * (1 + math.cos(math.pi * fraction)) / 2
    return lr
