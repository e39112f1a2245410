"""What releases cost: epsilon at delta, counted by Google's dp-accounting; the only module that imports it.

A history is a list of (noise multiplier, sampling rate, steps), as Opacus has it: so many uses of the Gaussian mechanism, each
on a Poisson sample at that rate. Neighbouring data sets differ by one unit added or removed. The count is by privacy loss
distributions (Koskela et al., 2020; Doroshenko et al., 2022), rounded so that epsilon is an upper bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, TypeAlias

from fedkseed.errors import ConfigError, installing

Entry: TypeAlias = tuple[float, float, int]
History: TypeAlias = tuple[Entry, ...]
INTERVAL, POINTS = 1e-3, 1e5
"""Privacy losses are rounded up to multiples of the first, or of what makes about so many points of a large epsilon."""
LEAST_NOISE, MOST_NOISE = 0.2, 1e6
"""Less counts as none: one use of all records would cost more than 30, and counting would take minutes. More is not tried."""
PRECISION = 1e-3
"""Of a noise multiplier that is looked for, relative."""


def require_accountant() -> None:
    """Refuse to go on without dp-accounting.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import dp_accounting.pld  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--dp counts epsilon with dp-accounting, which is not installed: {installing('privacy')}") from error


def added(history: History, noise_multiplier: float, sample_rate: float, steps: int) -> History:
    """A history with more steps."""
    if history and history[-1][:2] == (noise_multiplier, sample_rate):
        return (*history[:-1], (noise_multiplier, sample_rate, history[-1][2] + steps))
    return (*history, (noise_multiplier, sample_rate, steps))


@lru_cache(maxsize=1024)
def get_epsilon(history: History, delta: float) -> float:
    """Epsilon at delta of what a history released; infinite if some of it had next to no noise.

    Raises:
        ConfigError: see `require_accountant`.
    """
    used = [entry for entry in history if entry[2] and entry[1]]
    if not used:
        return 0.0
    if any(noise_multiplier < LEAST_NOISE for noise_multiplier, _, _ in used):
        return math.inf
    total: Any = None
    interval = max(INTERVAL, sum(_roughly(*entry, delta) for entry in used) / POINTS)
    for noise_multiplier, sample_rate, steps in used:
        losses = _losses(noise_multiplier, sample_rate, interval).self_compose(steps)
        total = losses if total is None else total.compose(losses)
    epsilon: float = total.get_epsilon_for_delta(delta)
    return epsilon


def most_spent(histories: Iterable[History], delta: float) -> float:
    """The largest epsilon of some histories; those that another one covers are not computed."""
    kept: list[History] = []
    for history in sorted(set(histories), key=lambda history: [(steps, rate) for _, rate, steps in history], reverse=True):
        if not any(_covers(other, history) for other in kept):
            kept.append(history)
    return max((get_epsilon(history, delta) for history in kept), default=0.0)


def get_noise_multiplier(epsilon: float, delta: float, uses: Iterable[tuple[float, int]]) -> float:
    """The smallest noise multiplier from 0.2 on, to a thousandth, with which none of some clients spends more than epsilon.

    Args:
        epsilon, delta: the budget.
        uses: the sampling rate and the number of steps of each client.

    Raises:
        ConfigError: no noise is enough, or see `require_accountant`.
    """
    each = set(uses)

    def spent(noise_multiplier: float) -> float:
        return most_spent((((noise_multiplier, rate, steps),) for rate, steps in each), delta)

    shift = max((rate * math.sqrt(steps) for rate, steps in each), default=0.0)
    high = max(2 * LEAST_NOISE, shift * math.sqrt(2 * math.log(1 / delta)) / epsilon)  # about where it is: far off counts long
    while high <= MOST_NOISE and spent(high) > epsilon:
        high *= 2
    if high > MOST_NOISE:
        raise ConfigError(f"--epsilon is {epsilon:g} at delta {delta:g}: no noise is enough for so many steps; raise it")
    low = high / 2
    while low > LEAST_NOISE and spent(low) <= epsilon:
        low, high = low / 2, low
    low = max(low, LEAST_NOISE)
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (low, middle) if spent(middle) <= epsilon else (middle, high)
    return high


@lru_cache(maxsize=64)
def _losses(noise_multiplier: float, sample_rate: float, interval: float) -> Any:
    require_accountant()
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sample_rate, value_discretization_interval=interval
    )


def _roughly(noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """About what epsilon will be: mean and deviation of the privacy loss, as if it were normal; too little for little noise."""
    shift = sample_rate * math.sqrt(steps) / noise_multiplier
    return shift**2 / 2 + shift * math.sqrt(2 * math.log(1 / delta))


def _covers(one: History, other: History) -> bool:
    """Whether one history costs at least what another does, entry by entry."""
    return len(one) == len(other) and all(
        a[0] <= b[0] and a[1] >= b[1] and a[2] >= b[2] for a, b in zip(one, other, strict=True)
    )
