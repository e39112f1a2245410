"""FedKSeed-Pro: which seeds are worth drawing (the paper's section on non-uniform sampling)."""

import numpy as np
from numpy.typing import NDArray

from fedkseed.federation.config import FederationConfig


def seed_probabilities(
    config: FederationConfig, grad_sums: NDArray[np.float64], grad_counts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """How likely each seed is to be drawn for a step now, float64[K], by what its steps have measured so far.

    Args:
        config: whose algorithm draws seeds uniformly or by importance.
        grad_sums: sums of a seed's |clipped projected gradients|, float64[K].
        grad_counts: how many went into each, int64[K].
    """
    if config.facts.draws == "importance":
        return probabilities(importances(grad_sums, grad_counts, config.importance_start))
    return np.full(len(grad_sums), 1 / len(grad_sums))


def importances(grad_sums: NDArray[np.float64], grad_counts: NDArray[np.int64], start: float = 0.0) -> NDArray[np.float64]:
    """phi, float64[K]: mean of a seed's |clipped projected gradients|, its history starting with one entry `start`."""
    return (start + grad_sums) / (grad_counts + 1)


def probabilities(phi: NDArray[np.float64]) -> NDArray[np.float64]:
    """P = softmax(minmax(phi)), float64[K]: no seed is more than e times as likely as another."""
    spread = phi.max() - phi.min()
    scaled = (phi - phi.min()) / spread if spread > 0 else np.zeros_like(phi)
    weights = np.exp(scaled)
    share: NDArray[np.float64] = weights / weights.sum()
    return share
