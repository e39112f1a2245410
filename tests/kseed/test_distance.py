"""The distance from the base, from the K numbers alone, against the weights themselves."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.support.changes import config as of_changes
from tests.support.changes import play, server

import fedkseed as fk
from fedkseed.errors import LedgerError
from fedkseed.kseed.distance import difference, moved_rms, pulled_back
from fedkseed.kseed.ledger import Ledger


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


# --- Two ledgers beside each other ---

POOLS = [fk.SeedPool(5, 128), fk.SeedPool(6, 64, "gaussian"), fk.SeedPool(7, 256)]


def over(pool: fk.SeedPool, seed: int) -> Ledger:
    bound = fk.bind(model(), pool)
    return Ledger.of(bound, np.random.default_rng(seed).normal(0, 0.1, pool.size).astype(np.float32))


def moves(ledger: Ledger) -> np.ndarray:
    tuned = model()
    base = tuned.weight.detach().double().numpy().ravel().copy()
    fk.apply(tuned, ledger)
    found: np.ndarray = tuned.weight.detach().double().numpy().ravel() - base
    return found


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2)))


@pytest.mark.parametrize(
    ("one", "other", "within"),
    [
        (over(POOLS[0], 1), over(POOLS[0], 2), 1e-5),  # one pool: exact, whatever the cosine
        (over(POOLS[0], 1), 0.5 * over(POOLS[0], 1) + over(POOLS[0], 2), 1e-5),
        (over(POOLS[1], 1), over(POOLS[1], 2), 0.04),  # 1 / sqrt(16384) is 0.008
        (over(POOLS[0], 1), over(POOLS[2], 2), 0.03),
        (over(POOLS[0], 1) + over(POOLS[2], 2), over(POOLS[2], 3) - over(POOLS[1], 2), 0.04),
    ],
    ids=["one pool", "alike", "gaussian", "two pools", "several"],
)
def test_lengths_and_cosine_are_those_of_the_weights(one: Ledger, other: Ledger, within: float) -> None:
    found, x, y = difference(one, other), moves(one), moves(other)
    assert found.moved == pytest.approx((rms(x), rms(y)), rel=within)
    assert found.apart == pytest.approx(rms(x - y), rel=within)
    cosine = float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert found.cosine == pytest.approx(cosine, abs=within)
    assert found.apart != pytest.approx(abs(rms(x) - rms(y)), rel=0.1)  # the controls: lengths do not subtract
    assert found.apart != pytest.approx(rms(x) + rms(y), rel=0.1)
    assert found.movement == "absolute"


def test_the_same_ledger_lies_nowhere_apart() -> None:
    a = over(POOLS[0], 1)
    found = difference(a, a)
    assert (found.apart, found.shared) == (0, True)
    assert found.cosine == pytest.approx(1)
    assert difference(a, a - a).cosine == 0
    assert not difference(a, over(POOLS[1], 1)).shared


def test_what_no_distance_measures_is_refused() -> None:
    a = over(POOLS[0], 1)
    page = replace((a + a).pages[0], movement="proportional")
    proportional = Ledger.of_pages(a.base, 1, [page], "float32", None)
    with pytest.raises(LedgerError, match="pages of A and B move weights by their sum and others in proportion"):
        difference(a, proportional, ("A", "B"))
    assert difference(proportional, proportional).movement == "proportional"
    with pytest.raises(LedgerError, match=r"B is over the base model abab.*, A over"):
        difference(a, replace(a, base=replace(a.base, fingerprint="ab" * 32)), ("A", "B"))


def test_coefficients_are_pulled_back_to_a_limit_and_no_shorter_ones_are_touched() -> None:
    coefficients = np.random.default_rng(1).normal(0, 0.1, 128)
    length = float(np.linalg.norm(coefficients))
    for most in (None, length, 2 * length):
        assert pulled_back(coefficients, most) is coefficients
    short = pulled_back(coefficients, length / 3)
    assert np.linalg.norm(short) == pytest.approx(length / 3)
    np.testing.assert_allclose(short * 3, coefficients)  # in the same direction
