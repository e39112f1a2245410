"""What releases cost, against Opacus's accountants and the closed form of the Gaussian mechanism."""

import math
import sys

import pytest
from scipy import optimize, stats

from fedkseed.errors import ConfigError
from fedkseed.privacy.accountant import added, get_epsilon, get_noise_multiplier, most_spent

GOLDEN = [
    # noise multiplier, sampling rate, steps, delta; Opacus 1.6.0: by RDP, by PRV (eps_error 0.001, delta_error delta / 1000)
    (1.0, 0.01, 1000, 1e-5, 2.1013652716430564, 1.8293687321449958),
    (0.7, 0.02, 500, 1e-5, 7.664087767817455, 6.655262256717727),
    (2.0, 0.1, 200, 1e-6, 4.117558239799327, 3.807060837714902),
    (5.0, 1.0, 40, 1e-5, 6.2083564483459375, 5.760774657612588),
    (10.0, 1.0, 20, 1e-5, 1.9142498748403742, 1.761164977944066),
    (1.5, 0.25, 30, 1e-4, 4.939754304156508, 4.360931767844609),
]
rows = pytest.mark.parametrize(("noise", "rate", "steps", "delta", "by_rdp", "by_prv"), GOLDEN)


@rows
def test_epsilon_is_that_of_another_accountant(
    noise: float, rate: float, steps: int, delta: float, by_rdp: float, by_prv: float
) -> None:
    found = get_epsilon(((noise, rate, steps),), delta)
    assert found == pytest.approx(by_prv, rel=2e-3)
    assert found < by_rdp  # which bounds less tightly
    for wrong in ((noise * 1.02, rate, steps), (noise, rate, round(steps * 1.1)), (noise, min(1.0, rate * 1.05), steps + 1)):
        assert get_epsilon((wrong,), delta) != pytest.approx(by_prv, rel=2e-3)


@rows
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::UserWarning")  # Opacus's own, without sampling
def test_the_golden_values_are_what_opacus_says(
    noise: float, rate: float, steps: int, delta: float, by_rdp: float, by_prv: float
) -> None:
    accountants = pytest.importorskip("opacus.accountants")
    for accountant, wanted, more in (
        (accountants.RDPAccountant(), by_rdp, {}),
        (accountants.PRVAccountant(), by_prv, {"eps_error": 0.001, "delta_error": delta / 1000}),
    ):
        accountant.history = [(noise, rate, steps)]
        assert float(accountant.get_epsilon(delta, **more)) == pytest.approx(wanted, rel=1e-6)


def closed_form(noise: float, rounds: int, delta: float) -> float:
    """Epsilon of so many Gaussian mechanisms of sensitivity 1, which are one of noise / sqrt(rounds) (Balle and Wang, 2018)."""
    shift = math.sqrt(rounds) / noise

    def excess(epsilon: float) -> float:
        below, above = shift / 2 - epsilon / shift, -shift / 2 - epsilon / shift
        return float(stats.norm.cdf(below) - math.exp(epsilon) * stats.norm.cdf(above)) - delta

    return float(optimize.brentq(excess, 0.0, 100.0))


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (4.0, 12), (20.0, 100)])
def test_without_sampling_it_is_the_closed_form(noise: float, rounds: int) -> None:
    found = get_epsilon(((noise, 1.0, rounds),), 1e-5)
    assert closed_form(noise, rounds, 1e-5) * (1 - 1e-9) <= found  # an upper bound
    assert found == pytest.approx(closed_form(noise, rounds, 1e-5), rel=2e-3)


def test_a_history_is_composed_of_its_entries() -> None:
    history = added(added((), 1.0, 0.1, 4), 1.0, 0.1, 3)
    assert history == ((1.0, 0.1, 7),)
    apart = ((1.0, 0.1, 4), (1.0, 0.1, 3))
    assert get_epsilon(apart, 1e-5) == pytest.approx(get_epsilon(history, 1e-5), rel=1e-3)
    longer = added(history, 3.0, 0.5, 2)
    assert longer == ((1.0, 0.1, 7), (3.0, 0.5, 2))
    alone = get_epsilon(((3.0, 0.5, 2),), 1e-5)
    assert max(alone, get_epsilon(history, 1e-5)) < get_epsilon(longer, 1e-5) < alone + get_epsilon(history, 1e-5)


def test_nothing_costs_nothing_and_no_noise_costs_everything() -> None:
    assert get_epsilon((), 1e-5) == get_epsilon(((1.0, 0.5, 0),), 1e-5) == most_spent([], 1e-5) == 0
    assert get_epsilon(((0.0, 0.5, 1),), 1e-5) == get_epsilon(((1.0, 0.5, 1), (0.1, 0.5, 1)), 1e-5) == math.inf


def test_the_most_spent_client_counts() -> None:
    histories = [((2.0, rate, steps),) for rate, steps in [(0.1, 30), (0.2, 10), (0.1, 10), (0.05, 60), (0.2, 9)]]
    assert most_spent(histories, 1e-5) == max(get_epsilon(history, 1e-5) for history in histories)


def test_the_noise_for_a_budget_is_the_least() -> None:
    uses = [(0.2, 30), (0.1, 60), (0.1, 10)]
    noise = get_noise_multiplier(2.0, 1e-5, uses)
    assert max(get_epsilon(((noise, *one),), 1e-5) for one in uses) <= 2.0
    assert max(get_epsilon(((noise * 0.995, *one),), 1e-5) for one in uses) > 2.0
    with pytest.raises(ConfigError, match=r"--epsilon is 1e-09 at delta 1e-05: no noise is enough"):
        get_noise_multiplier(1e-9, 1e-5, [(1.0, 10**6)])


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting.pld", None)
    with pytest.raises(ConfigError, match=r"not installed: pip install -e '.\[privacy\]' in fedkseed's clone"):
        get_epsilon(((1.23, 0.77, 1),), 1e-5)
