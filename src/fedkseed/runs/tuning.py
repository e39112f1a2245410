"""A learning rate and a probe distance for the settings of a run, measured on its clients' records."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedkseed.data import collate
from fedkseed.errors import ConfigError
from fedkseed.evaluation import mean_loss
from fedkseed.kseed.calibration import Calibration, calibrate
from fedkseed.kseed.server import seed_pool
from fedkseed.randomness import generator
from fedkseed.runs.inputs import Inputs, separate
from fedkseed.runs.learner import load_learner
from fedkseed.runs.observer import Nobody, Observer
from fedkseed.runs.rates import Rate, find_rate
from fedkseed.runs.records import prepare
from fedkseed.runs.resolution import eps_warning
from fedkseed.runs.settings import SimulationConfig, build, settings_given
from fedkseed.runs.task import bind_loaded


def tune(settings: Mapping[str, Any] | str | Path | SimulationConfig, observer: Observer | None = None) -> Calibration | Rate:
    """Find a workable `lr` (of two-point algorithms `eps` too) for a model and data; what `fedkseed tune` does.

    Two-point algorithms are calibrated by slope and curvature, the others by short federations at several rates.

    Args:
        settings: as of `fedkseed.simulate`; `lr` and `eps` are not looked at. A loaded model is left as it was: what is tried
            is tried on copies.
        observer: who watches; None for nobody.

    Returns:
        What was found and why. Its `.lr`, and the `.eps` of a `Calibration`, are to be taken.

    Raises:
        FedKSeedError: a setting, the data or the model cannot be used, or no rate was found.
    """
    named, inputs = separate({**settings_given(settings), "lr": 1.0})
    return find(build(named), observer or Nobody(), inputs)


def find(config: SimulationConfig, observer: Observer, inputs: Inputs | None = None) -> Calibration | Rate:
    """The same for settings that are valid.

    Raises:
        FedKSeedError: the data or the model cannot be used, or no rate was found.
    """
    if config.dp is not None:
        raise ConfigError(f"--dp is {config.dp}, and a rate is looked for on the records without noise; give --lr a number")
    if config.objective != "loss":
        raise ConfigError(f"--lr auto and fedkseed tune measure the loss, and --objective is {config.objective}; give --lr")
    given = inputs or Inputs()
    if config.facts.measures != "two-point":
        records = prepare(config, observer, given)
        observer.note("trying rates: a few rounds at each, on the clients' records")
        return find_rate(config, records, observer, given.model)
    learner = load_learner(config, observer, given)
    records = prepare(config, observer, given, learner)
    pooled = [example for examples in records.clients.values() for example in examples]
    model = learner.model if given.model is None else copy.deepcopy(given.model)
    model.train(False)
    bound = bind_loaded(config.model, model, seed_pool(config), records.frozen).bound
    observer.note("calibrating: a few hundred forward passes on batches of the clients' records")

    def loss(batch: int) -> float:
        draw = generator(config.seed, "calibration", batch)
        chosen = draw.choice(len(pooled), min(config.batch_size, len(pooled)), replace=False)
        with torch.inference_mode():
            return mean_loss(model, collate([pooled[i] for i in chosen], records.pad_id, model.device)).item()

    try:
        heard = partial(observer.progress, "calibrating: forward passes")
        cohort = config.cohort_size(len(records.clients))
        found = calibrate(bound, loss, generator(config.seed, "calibration directions"), cohort, config.directions, heard)
        if warning := eps_warning(model, found.eps):
            observer.note(warning)
        return found
    finally:  # also where it stopped half way
        bound.rebuild(np.zeros(config.num_seeds, np.float32))
