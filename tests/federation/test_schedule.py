"""Schedules of the learning rate; kseed/test_server.py has their values, as requests carry them."""

from itertools import pairwise

import numpy as np
import pytest

from fedkseed.federation.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("num_rounds", [1, 2, 7, 100_000])
def test_schedules_are_positive_and_never_rise(schedule: str, num_rounds: int) -> None:
    done = sorted({int(x) for x in np.linspace(0, num_rounds - 1, 50)})
    rates = [learning_rate(schedule, 3e-7, d, num_rounds) for d in done]
    assert rates[0] == 3e-7
    assert all(later <= earlier for earlier, later in pairwise(rates))
    assert rates[-1] > 0
