"""A membership attack: who looks at the losses of records can tell which were trained on, unless each was hidden."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from tests.support.changes import config
from tests.support.entropy import Bytes
from tests.support.private import chosen

import fedkseed as fk
from fedkseed.kseed.change_client import ChangeClient
from fedkseed.kseed.change_server import ChangeServer, new_page
from fedkseed.privacy.accountant import get_epsilon

RECORDS, SHADOWS, STEPS = 24, 6, 40
NOISE = 25.0


class Labels:
    """Points with labels that nothing explains: only learning them by heart lowers their loss."""

    def __init__(self, model: torch.nn.Module, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.model = model
        self.x = torch.randn(2 * RECORDS, 12, generator=draw)
        self.y = torch.randint(0, 4, (2 * RECORDS,), generator=draw)
        self.num_examples = RECORDS  # the others are never trained on

    def differentiable_loss(self, records: NDArray[np.int64]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.model(self.x[records]), self.y[records])

    def loss(self, records: NDArray[np.int64]) -> float:
        with torch.no_grad():
            return self.differentiable_loss(records).item()


def network(seed: int) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(12, 24), torch.nn.Tanh(), torch.nn.Linear(24, 4))
    draw = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3
    return model


def shadow(seed: int, privacy: Any) -> tuple[list[float], list[float]]:
    """A run of one client's local steps: the final losses of its records, and of as many others."""
    settings = config(
        num_seeds=256, local_steps=STEPS, batch_size=RECORDS, lr=0.03, local_optimizer="adam", seed=seed, num_rounds=1
    )
    model = network(seed)
    bound = fk.bind(model, new_page(settings, 0).pool)
    task = Labels(model, seed)
    client = ChangeClient("a", bound, bound.identity(), task, privacy)
    server = ChangeServer(settings, bound.identity(), ["a"])
    server.absorb([("a", client.answer(server.plan()[0].encode()))])
    bound.rebuild(server.ledger.coefficients)
    losses = [task.loss(np.array([i])) for i in range(2 * RECORDS)]
    return losses[:RECORDS], losses[RECORDS:]


def advantage(private: bool) -> tuple[float, float]:
    """How often a member's loss is below another record's, over all shadow runs, and the p-value that it is chance."""
    inside, outside = [], []
    for seed in range(SHADOWS):
        members, others = shadow(seed, chosen("record", 1.0, NOISE, Bytes(f"shadow {seed}")) if private else None)
        inside += members
        outside += others
    found = stats.mannwhitneyu(outside, inside, alternative="greater")
    return float(found.statistic) / (len(inside) * len(outside)), float(found.pvalue)


@pytest.mark.slow
def test_the_attack_succeeds_on_what_was_learnt_by_heart_and_is_at_chance_under_privacy() -> None:
    area, chance = advantage(private=False)
    assert area > 0.85
    assert chance < 1e-10
    area, chance = advantage(private=True)
    assert area < 0.58
    assert chance > 0.01
    assert get_epsilon(((NOISE, 1.0, STEPS),), 1e-3) < 1
