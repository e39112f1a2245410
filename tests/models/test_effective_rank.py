"""Why K numbers are enough: the decrease of the best step along a projected gradient is 1 / (1 + r / K) of the full one's.

r = tr(H) / lambda_g, lambda_g = g'Hg / g'g, on a quadratic of Hessian H. With p = Z Z'g / K and E z z' = I, E g'p = |g|^2, and
E p'Hp = g'Hg + (tr(H) |g|^2 + O(g'Hg)) / K; so the best decrease (g'p)^2 / (2 p'Hp) is near |g|^4 / (2 g'Hg) / (1 + r / K),
up to terms of the order of 1 / K. Where perturbations are orthogonal within a block of B elements (hadamard) no pair of them
collides: tr(H) |g|^2 counts pairs in different blocks only, one block's part of it less.
"""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import fedkseed as fk

F64 = NDArray[np.float64]


def quadratic(d: int, r: float, seed: int = 0) -> tuple[F64, F64]:
    """The spectrum of H and a gradient with that effective rank, shuffled over the elements.

    Eigenvalues fall as 1 / i; the gradient is i^-s of them, with s such that r comes out.
    """
    rng = np.random.default_rng(seed)
    h = 1.0 / np.arange(1, d + 1)
    low, high = -0.5, 4.0
    for _ in range(60):
        s = (low + high) / 2
        g = np.arange(1, d + 1) ** -s
        low, high = (s, high) if effective_rank(h, g) > r else (low, s)
    order = rng.permutation(d)
    return h[order], (g * rng.choice([-1.0, 1.0], d))[order]


def effective_rank(h: F64, g: F64) -> float:
    return float(h.sum() * (g @ g) / (g @ (h * g)))


def parts(h: F64, g: F64, family: str, size: int, pools: int) -> F64:
    """The best decrease along Z Z'g over many pools, as a part of the full gradient's."""
    d = len(g)
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.zeros(d))
    gradient, exact = torch.from_numpy(g).float(), torch.from_numpy(g).float().double().numpy()
    full = (exact @ exact) ** 2 / (exact @ (h * exact))
    found = []
    for key in range(pools):
        bound = fk.bind(model, fk.SeedPool(key, size, family))
        bound.rebuild((bound.project({"w": gradient}) / size).astype(np.float32))
        p = model.w.detach().double().numpy()
        found.append((exact @ p) ** 2 / (p @ (h * p)) / full)
        model.w.data.zero_()
    return np.array(found)


CASES = [
    *[("hadamard", 1024, 1024 * 24, r, 60) for r in (20.0, 1024.0, 5000.0)],
    ("hadamard", 128, 128 * 40, 128.0, 120),
    *[("gaussian", 64, 3000, r, 60) for r in (64.0, 250.0)],
]


@pytest.mark.parametrize(("family", "size", "d", "r", "pools"), CASES, ids=lambda x: str(x))
def test_k_directions_keep_one_over_one_plus_r_over_k(family: str, size: int, d: int, r: float, pools: int) -> None:
    h, g = quadratic(d, r)
    assert effective_rank(h, g) == pytest.approx(r, rel=1e-6)
    each = parts(h, g, family, size, pools)
    mean, error = each.mean(), each.std(ddof=1) / np.sqrt(pools)
    law = 1 / (1 + r / size)
    blocks = 1 - (size / d if family == "hadamard" else 0)
    corrected = 1 / (1 + blocks * r / size)
    low, high = min(law, corrected), max(law, corrected)
    slack = 4 * error + 4 / size * mean
    assert low - slack <= mean <= high + slack
    wrong = {
        "the number of weights, not the effective rank": 1 / (1 + d / size),
        "half of it": 1 / (1 + r / (2 * size)),
        "twice": 1 / (1 + 2 * r / size),
        "by lambda_max": 1 / (1 + h.sum() / h.max() / size),
    }
    for name, value in wrong.items():
        if abs(value - law) > 0.15 * law:  # else they say the same here
            assert not abs(mean - value) <= slack, name
    assert abs(wrong["the number of weights, not the effective rank"] - law) > 0.15 * law


def test_a_two_point_step_keeps_one_over_r() -> None:
    """K = 1, signs and a diagonal H: z'Hz is tr(H) whatever z, so that the mean part is 1 / r exactly, next to 1 / (1 + r)."""
    h, g = quadratic(4000, 40.0)
    slopes = np.random.default_rng(3).choice([-1.0, 1.0], (1500, 4000)) @ g
    each = slopes**2 / h.sum() / ((g @ g) ** 2 / (g @ (h * g)))
    error = each.std(ddof=1) / np.sqrt(len(each))
    assert abs(each.mean() - 1 / 40) <= 4 * error
    assert error < 0.1 / 40
