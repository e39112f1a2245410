"""Optimisers on K numbers: two pure functions each, with their state as data that a ledger keeps.

An average of the clients' replies is a change of K numbers; an optimiser turns it into the change that the model takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
State = Mapping[str, F64]
"""Columns of numbers by name; empty for an optimiser that remembers nothing."""
DECAY, SQUARE_DECAY, TINY = 0.9, 0.99, 1e-30
"""Of momentum; of Adam's second moments (runs have tens of steps, so they are short); what keeps 0 / 0 away."""


@dataclass(frozen=True)
class Optimizer:
    """One optimiser.

    Attributes:
        name: what settings call it.
        code: what messages call it; never changes, never used again for another.
        bounded: whether the rate alone says how far a step goes, whatever the gradient's length.
        start: `(K) -> state`, before the first step.
        step: `(gradient, lr, state) -> (change, state)`: what is added to the numbers, float64[K]; pure.
    """

    name: str
    code: int
    bounded: bool
    start: Callable[[int], State]
    step: Callable[[F64, float, State], tuple[F64, State]]


def _momentum(gradient: F64, lr: float, state: State) -> tuple[F64, State]:
    mean = DECAY * state["mean"] + gradient
    return -lr * mean, {"mean": mean}


def _sign(gradient: F64, lr: float, state: State) -> tuple[F64, State]:
    mean = DECAY * state["mean"] + gradient
    return -lr * np.sign(mean), {"mean": mean}


def _adam(gradient: F64, lr: float, state: State) -> tuple[F64, State]:
    count = state["count"] + 1
    mean = DECAY * state["mean"] + (1 - DECAY) * gradient
    square = SQUARE_DECAY * state["square"] + (1 - SQUARE_DECAY) * gradient**2
    root = np.sqrt(square / (1 - SQUARE_DECAY**count)) + TINY
    return -lr * mean / (1 - DECAY**count) / root, {"mean": mean, "square": square, "count": count}


SGD = Optimizer("sgd", 0, False, lambda size: {}, lambda gradient, lr, state: (-lr * gradient, state))
"""`a <- a - lr u`: the paper's."""
OPTIMIZERS = {
    optimizer.name: optimizer
    for optimizer in (
        SGD,
        Optimizer("momentum", 1, False, lambda size: {"mean": np.zeros(size)}, _momentum),
        Optimizer(
            "adam",
            2,
            True,
            lambda size: {"mean": np.zeros(size), "square": np.zeros(size), "count": np.zeros(1)},
            _adam,
        ),
        Optimizer("sign", 3, True, lambda size: {"mean": np.zeros(size)}, _sign),
    )
}
"""By name: sgd; momentum 0.9; Adam (Kingma and Ba, 2015); the sign of a momentum (Bernstein et al., 2018)."""
