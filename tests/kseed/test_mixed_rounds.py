"""Rounds of clients that can backpropagate and of clients that cannot: what `combined` makes of both, on a quadratic.

The derivation. Let u = Z'g be the gradient by the K numbers at the round's start, u_b that of a batch, N = E|u_b - u|^2.

- A gradient client's change of n steps at a small rate is -lr sum_t u_b(t): expectation -lr n u, variance lr^2 n N.
- A two-point client's scalar is the slope u_b[k] along a seed that is drawn uniformly, so that K u_b[k] e_k has the
  expectation u, the second moment K E|u_b|^2 and so the variance V = K (N + |u|^2) - |u|^2 = K N (1 + rho) - rho N, where
  rho = |u|^2 / N. The sum s of m scalars at their seeds, times -lr, has the expectation -lr m u / K: (n / m) K s estimates
  what the gradient client's change does, with variance lr^2 n^2 V / m.
- Where a batch's noise is larger than its signal (rho small), V is K N, and the variances are as 1 to n K / m. The best
  linear unbiased mean weighs by their inverses, p for a change and p m / (K n) for scalars:

      (p change + p m / (K n) (n / m) K s) / (p + p m / (K n))  =  (p change + p s) / (p + p m / (K n)),

  which is `combined`: the K and n / m of the estimate and of the weight cancel, what is left of them is the denominator.

What it assumes is tested too: p stands for a client's share, so "best" is among clients of equal shares; where rho is not
small V is larger, and 1 / K is too much for scalars by a factor of 1 + rho. They lower the variance as long as rho < 1 + 1 / K,
and never raise it by more than |lr n u|^2 / K.
"""

from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.changes import Quadratic, config, directions, federation, flat

from fedkseed.kseed.change_messages import CHANGE, SCALARS, ChangeReply
from fedkseed.kseed.change_server import new_page
from fedkseed.kseed.changes import combined

F64 = NDArray[np.float64]
K, ROUNDS = 128, 250
LR = {"table": 1e-5, "coefficients": 1e-5 / K}  # so small that local steps do not change what they measure
bases = pytest.mark.parametrize("basis", ["table", "coefficients"])


@dataclass
class Rounds:
    """What came of many rounds from the same ledger: changes, scalars' moves and both, float64[rounds, K] each.

    Attributes:
        steps, kept: n, and m.
        gradient: u, or T, of all records, by hand.
        noise: N of a batch, by hand.
    """

    changes: F64
    moves: F64
    both: F64
    steps: int
    kept: int
    gradient: F64
    noise: float


@cache
def rounds(basis: str, spread: float) -> Rounds:
    """One gradient client and one two-point client over the same 12 records in batches of 1.

    Batches and seeds follow from the head, so that other rounds' numbers in it draw others.
    """
    steps = {"table": 2, "coefficients": 1}[basis]
    settings = config(basis=basis, lr=LR[basis], local_steps=steps, eps=1e-2, two_point_clients=0.5)
    names = ("a", "b")
    a_server, clients, bound = federation(settings, {name: lambda model: Quadratic(model, 12, 5, spread) for name in names})
    requests = {request.client: request for request in a_server.plan()}
    found: list[list[F64]] = []
    for i in range(ROUNDS):
        asked = {name: replace(request, server_round=i + 1) for name, request in requests.items()}
        replies = {name: ChangeReply.decode(clients[name].answer(request.encode())) for name, request in asked.items()}
        kinds = {replies[name].kind: name for name in names}
        assert kinds.keys() == {CHANGE, SCALARS}
        alone = [
            combined(asked, {kinds[kind]: replies[kinds[kind]]}, {kinds[kind]: 1.0}, basis)[0] for kind in (CHANGE, SCALARS)
        ]  # type: ignore[arg-type]
        found.append([*alone, combined(asked, replies, dict.fromkeys(names, 0.5), basis)[0]])  # type: ignore[arg-type]
    task, z = clients["a"].task, directions(new_page(settings, 0).pool, basis)
    bound.rebuild(np.zeros(K, np.float32))
    w = flat(bound.model)
    each = np.array([z.T @ task.gradient(w, [record]) for record in range(12)])  # type: ignore[attr-defined]
    noise = float(((each - each.mean(0)) ** 2).sum() / 12)
    changes, moves, both = np.array(found).transpose(1, 0, 2)
    return Rounds(changes, moves, both, steps, steps, each.mean(0), noise)


def along(values: F64, gradient: F64) -> tuple[float, float]:
    """The mean of what each round says of a gradient's length, and its standard error."""
    shares = values @ gradient / (gradient @ gradient)
    return float(shares.mean()), float(shares.std(ddof=1) / np.sqrt(len(shares)))


def spread_of(values: F64) -> float:
    """E|x - E x|^2"""
    return float(((values - values.mean(0)) ** 2).sum(1).mean() * len(values) / (len(values) - 1))


@bases
@pytest.mark.parametrize("spread", [0.1, 5.0])
def test_a_mixed_round_has_the_expectation_of_the_gradient_clients_alone(basis: str, spread: float) -> None:
    """-lr n u: of the changes, of scalars times K, and of what is combined of them. Four standard errors."""
    run = rounds(basis, spread)
    expected = -LR[basis] * run.steps
    for values, factor in ((run.changes, 1.0), (run.moves, float(K)), (run.both, 1.0)):
        mean, error = along(values * factor, run.gradient)
        assert abs(mean - expected) <= 4 * error + 1e-3 * abs(expected)
        assert error < 0.2 * abs(expected)
    mean, error = along(run.both, run.gradient)
    weight = 0.5 * run.kept / (K * run.steps)
    np.testing.assert_allclose(run.both, (0.5 * run.changes + 0.5 * run.moves) / (0.5 + weight), rtol=1e-9, atol=1e-18)
    without_k = (0.5 * run.changes + 0.5 * run.moves) / (0.5 + 0.5 * run.kept / run.steps)  # the wrong variant
    wrong, error = along(without_k, run.gradient)
    assert abs(wrong - expected) > 8 * error
    blown_up, error = along(0.5 * run.changes + 0.5 * run.moves, run.gradient)  # and one without the denominator's first term
    assert abs(blown_up - expected) > 8 * error


@bases
@pytest.mark.parametrize("spread", [0.1, 5.0])
def test_scalars_have_about_k_times_a_gradients_variance(basis: str, spread: float) -> None:
    """V = K N (1 + rho) - rho N, by hand from the records; of the changes n N."""
    run = rounds(basis, spread)
    lr, n, m = LR[basis], run.steps, run.kept
    square = float(run.gradient @ run.gradient)
    v = K * (run.noise + square) - square
    assert spread_of(run.changes) == pytest.approx(lr**2 * n * run.noise, rel=0.2)
    assert spread_of(K * n / m * run.moves) == pytest.approx(lr**2 * n**2 * v / m, rel=0.25)
    rho = square / run.noise
    assert (rho < 0.2) == (spread == 5.0)  # what the weights assume is one of the two cases
    ratio = spread_of(K * n / m * run.moves) / spread_of(run.changes)
    assert ratio == pytest.approx(n / m * K * (1 + rho), rel=0.3)


@bases
@pytest.mark.parametrize("spread", [0.1, 5.0])
def test_a_mixed_round_varies_less_than_with_equal_weights(basis: str, spread: float) -> None:
    """Taking K s for as good as a change, which has the same expectation, is the wrong variant."""
    run = rounds(basis, spread)
    equal = 0.5 * run.changes + 0.5 * K * run.steps / run.kept * run.moves
    mean, error = along(equal, run.gradient)
    assert abs(mean + LR[basis] * run.steps) <= 4 * error
    assert spread_of(run.both) < 0.1 * spread_of(equal)


@bases
def test_the_weights_are_the_best_where_noise_is_larger_than_signal(basis: str) -> None:
    """By the measured variances: no other weight of scalars does better by more than their error; scalars help.

    var(x) = (C + x^2 S) / (1 + x)^2 of a weight x relative to a change's, C and S the variances of both estimates.
    """
    run = rounds(basis, 5.0)
    change, scalars = spread_of(run.changes), spread_of(K * run.steps / run.kept * run.moves)

    def variance(weight: float) -> float:
        return (change + weight**2 * scalars) / (1 + weight) ** 2

    chosen = run.kept / (run.steps * K)
    assert variance(chosen) < variance(0)
    assert variance(chosen) < min(variance(chosen * 4), variance(1.0))
    assert change / scalars == pytest.approx(chosen, rel=0.35)  # where the derivative is 0


@bases
def test_where_the_signal_is_larger_scalars_cost_little(basis: str) -> None:
    """The limit of the derivation: with rho > 1 the variance grows, by at most |lr n u|^2 / K."""
    run = rounds(basis, 0.1)
    square = float(run.gradient @ run.gradient)
    assert square / run.noise > 2
    more = spread_of(run.both) - spread_of(run.changes)
    assert 0 < more <= 1.2 * (LR[basis] * run.steps) ** 2 * square / K / run.kept
