"""Perturbations as pure functions of integers, the same bits on every backend (docs/noise.md)."""

from fedkseed.noise.backend import (
    QUANTUM,
    Backend,
    GaussianMixture,
    HadamardMixture,
    Mixture,
    Slot,
    Sweep,
    get_backend,
)
from fedkseed.noise.philox import halves, philox, tensor_id

__all__ = [
    "QUANTUM",
    "Backend",
    "GaussianMixture",
    "HadamardMixture",
    "Mixture",
    "Slot",
    "Sweep",
    "get_backend",
    "halves",
    "philox",
    "tensor_id",
]
