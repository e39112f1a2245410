"""What a run's privacy costs: the noise that a budget allows, what has been spent, and when to stop (docs/privacy.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fedkseed.errors import ConfigError
from fedkseed.federation import Checkpoint, Outcome
from fedkseed.federation.cohort import draw_cohort
from fedkseed.kseed.private_steps import sampling_rate
from fedkseed.privacy import DELTA, Privacy
from fedkseed.privacy.accountant import (
    LEAST_NOISE,
    History,
    added,
    get_noise_multiplier,
    most_spent,
    require_accountant,
)
from fedkseed.runs.observer import WARNING
from fedkseed.runs.settings import RunConfig
from fedkseed.text import counted

EVERYONE = "*"
"""In place of a name where all clients are counted alike."""


class Server(Protocol):
    """What an account needs of a server."""

    steps: dict[str, int]

    def cohort(self) -> Sequence[str]:
        """Who would be asked next."""
        ...


class Account:
    """What a run has spent.

    Of `record`, every step of a client is one use of the mechanism on a Poisson sample of its records; clients share no
    records, so the most spent one counts. Of `client`, every closed round is one use on all clients, whoever was asked.

    Args:
        config: the settings, with privacy.
        sizes: how many records each client has; needed of `record`.
        checkpoint: where the run is; None before its first round.

    Raises:
        ConfigError: dp-accounting is not installed; or the run's earlier rounds hid something else, or nothing.
    """

    def __init__(self, config: RunConfig, sizes: Mapping[str, int], checkpoint: Checkpoint | None) -> None:
        require_accountant()
        privacy = config.privacy
        if privacy is None:
            raise ConfigError("an account is of a run with --dp")
        self.privacy: Privacy = privacy
        before = _noted(checkpoint)
        hid = (before or {}).get("unit", "nothing")
        if checkpoint is not None and checkpoint.round and hid != privacy.unit:
            raise ConfigError(
                f"--dp is {privacy.unit}, and the run's {counted(checkpoint.round, 'round')} hid {hid}; start a run of its own"
            )
        self._rates = {name: sampling_rate(config.batch_size, size) for name, size in sizes.items()}
        self._histories: dict[str, History] = {
            name: tuple((float(noise), float(rate), int(steps)) for noise, rate, steps in history)
            for name, history in (before or {}).get("histories", {}).items()
        }

    def epsilon(self) -> float | None:
        """What the most spent has spent, at the settings' delta; None where next to no noise bounds nothing."""
        return _finite(most_spent(self._histories.values(), self.privacy.delta))

    def record(self, steps: Mapping[str, int], outcome: Outcome) -> None:
        """Count an attempt at a round: of records whatever was asked, since it was answered; of clients what was published.

        Args:
            steps: how many each client was asked for that was asked.
            outcome: what became of it.
        """
        if self.privacy.unit == "record":
            for client, number in steps.items():
                self._histories[client] = self._more(client, number)
        elif outcome.status == "closed":
            self._histories[EVERYONE] = self._more(EVERYONE, 1)

    def exceeded(self, server: Server) -> str | None:
        """Why the next attempt at a round must not be; None if the budget allows it."""
        budget = self.privacy.epsilon
        if budget is None:
            return None
        if self.privacy.unit == "record":
            following = [self._more(name, server.steps[name]) for name in server.cohort()]
        else:
            following = [self._more(EVERYONE, 1)]
        epsilon = most_spent(following, self.privacy.delta)
        if epsilon <= budget:
            return None
        spent, at = self.epsilon(), f"at delta {self.privacy.delta:g}"
        return (
            f"the privacy budget is spent: epsilon is {0 if spent is None else spent:.3f} {at}, another round would make it "
            f"{epsilon:.3f}, and --epsilon is {budget:g}"
        )

    def noted(self) -> dict[str, Any]:
        """What a checkpoint holds of it; without the histories, what may be published."""
        return {
            "unit": self.privacy.unit,
            "clip_norm": self.privacy.clip_norm,
            "noise_multiplier": self.privacy.noise_multiplier,
            "delta": self.privacy.delta,
            "epsilon": self.epsilon(),
            "histories": {name: [list(entry) for entry in history] for name, history in sorted(self._histories.items())},
        }

    def _more(self, name: str, steps: int) -> History:
        rate = self._rates[name] if self.privacy.unit == "record" else 1.0
        return added(self._histories.get(name, ()), self.privacy.noise_multiplier, rate, steps)


def with_noise(config: RunConfig, sizes: Mapping[str, int]) -> dict[str, float]:
    """The setting that is found out where a budget is given and no noise: the least with which all rounds keep to it.

    Args:
        config: the settings.
        sizes: how many records each client has.

    Raises:
        ConfigError: no noise is enough, the noise that is given costs more than the budget in the first round, or
            dp-accounting is not installed.
    """
    if config.dp is None or config.epsilon is None:
        return {}
    delta = DELTA if config.delta is None else config.delta
    names = sorted(sizes)
    if config.noise_multiplier is not None:
        asked = draw_cohort(config, names, config.cohort_size(len(names)), 1, 0)
        rate = max(sampling_rate(config.batch_size, sizes[name]) for name in asked)
        use = (1.0, 1) if config.dp == "client" else (rate, config.local_steps)
        cost = most_spent([added((), config.noise_multiplier, *use)], delta)
        if cost > config.epsilon:
            raise ConfigError(
                f"--epsilon is {config.epsilon:g} and one round with --noise-multiplier {config.noise_multiplier:g} costs "
                f"{cost:.3g} at delta {delta:g}; raise one of them"
            )
        return {}
    if config.dp == "client":
        return {"noise_multiplier": get_noise_multiplier(config.epsilon, delta, [(1.0, config.num_rounds)])}
    rounds = dict.fromkeys(names, 0)
    for server_round in range(1, config.num_rounds + 1):
        for name in draw_cohort(config, names, config.cohort_size(len(names)), server_round, 0):
            rounds[name] += 1
    uses = [(sampling_rate(config.batch_size, sizes[name]), rounds[name] * config.local_steps) for name in names]
    return {"noise_multiplier": get_noise_multiplier(config.epsilon, delta, uses)}


def warnings(privacy: Privacy, sizes: Mapping[str, int]) -> list[str]:
    """What makes a promise worth little, in words for a person."""
    said = []
    if privacy.noise_multiplier < LEAST_NOISE:
        said.append(f"{WARNING}--noise-multiplier {privacy.noise_multiplier:g} is next to no noise: nothing is promised")
    count = min(sizes.values(), default=0) if privacy.unit == "record" else len(sizes)
    if count and privacy.delta >= 1 / count:
        said.append(
            f"{WARNING}--delta {privacy.delta:g} is not below 1 in {count:,} {privacy.unit}s, so that telling one of them "
            "as it is would keep the promise; take a smaller one"
        )
    return said


def _finite(epsilon: float) -> float | None:
    return epsilon if math.isfinite(epsilon) else None


def _noted(checkpoint: Checkpoint | None) -> dict[str, Any] | None:
    made_with = checkpoint.made_with if checkpoint is not None else None
    noted = (made_with or {}).get("privacy")
    return noted if isinstance(noted, dict) else None
