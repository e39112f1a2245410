"""The distance from the base, from the K numbers alone, against the weights themselves."""

import numpy as np
import pytest
import torch
from tests.support.changes import config as of_changes
from tests.support.changes import play, server

import fedkseed as fk
from fedkseed.kseed.distance import moved_rms


def model() -> torch.nn.Module:
    draw = torch.Generator().manual_seed(3)
    made = torch.nn.Linear(256, 64, bias=False)
    made.weight.data = torch.randn(64, 256, generator=draw)
    return made


@pytest.mark.parametrize(("noise", "within"), [("hadamard", 1e-5), ("gaussian", 0.03)])
def test_it_is_how_far_the_weights_are(noise: str, within: float) -> None:
    """Exactly where directions are orthogonal; and not the sum of the coefficients, nor their root mean square."""
    module = model()
    base = module.weight.detach().double().numpy().ravel().copy()
    bound = fk.bind(module, fk.SeedPool(key=5, size=128, family=noise))
    coefficients = np.random.default_rng(1).normal(0, 0.1, 128).astype(np.float32)
    bound.rebuild(coefficients)
    found = np.sqrt(np.mean((module.weight.detach().double().numpy().ravel() - base) ** 2))
    ledger = fk.Ledger.of(bound, coefficients)
    assert moved_rms(ledger) == pytest.approx(found, rel=within)
    assert abs(np.sqrt(np.mean(coefficients.astype(float) ** 2)) / found - 1) > 0.5
    assert abs(np.abs(coefficients).sum() / found - 1) > 0.5


@pytest.mark.parametrize("basis", ["coefficients", "table"])
def test_pages_add_up_by_their_squares_whatever_the_basis(basis: str) -> None:
    a_server = server(basis=basis, rounds_per_page=1, num_rounds=3, num_seeds=of_changes().num_seeds)
    play(a_server, 3)
    pages = a_server.ledger.pages
    assert len(pages) == 3
    squares = [float(np.sum(page.coefficients().astype(float) ** 2)) for page in pages]
    assert moved_rms(a_server.ledger) == pytest.approx(np.sqrt(sum(squares)))
    assert min(squares) > 0
