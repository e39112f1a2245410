"""Perturbations as pure functions of integers, the same bits on every backend (docs/noise.md)."""

from fedkseed.noise.backend import (
    QUANTUM,
    Backend,
    Directions,
    Fold,
    GaussianDirections,
    GaussianMixture,
    HadamardDirections,
    HadamardMixture,
    Mixture,
    Slot,
    Source,
    Sweep,
    get_backend,
)
from fedkseed.noise.philox import halves, philox, tensor_id

__all__ = [
    "QUANTUM",
    "Backend",
    "Directions",
    "Fold",
    "GaussianDirections",
    "GaussianMixture",
    "HadamardDirections",
    "HadamardMixture",
    "Mixture",
    "Slot",
    "Source",
    "Sweep",
    "get_backend",
    "halves",
    "philox",
    "tensor_id",
]
