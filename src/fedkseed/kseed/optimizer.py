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
"""Columns of K numbers by name; empty for an optimiser that remembers nothing."""


@dataclass(frozen=True)
class Optimizer:
    """One optimiser.

    Attributes:
        name: what settings call it.
        start: `(K) -> state`, before the first round.
        step: `(gradient, lr, state) -> (change, state)`: what is added to the coefficients, float64[K]; pure.
    """

    name: str
    start: Callable[[int], State]
    step: Callable[[F64, float, State], tuple[F64, State]]


SGD = Optimizer("sgd", lambda size: {}, lambda gradient, lr, state: (-lr * gradient, state))
"""`a <- a - lr u`: the paper's."""
