"""FedKSeed-Pro: which seeds are worth drawing (the paper's section on non-uniform sampling)."""

import numpy as np
from numpy.typing import NDArray


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
