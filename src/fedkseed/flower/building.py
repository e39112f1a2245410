"""A run's strategy, built from its settings: base model, data and run folder."""

from __future__ import annotations

from functools import partial
from logging import INFO

from fedkseed.evaluation import EvalLoss, guess_loss
from fedkseed.federation.objectives import OWN
from fedkseed.flower.config import EngineConfig, FlowerConfig, open_run
from fedkseed.flower.holdings import Held, load_bound, load_for, read_held, simulated_records
from fedkseed.flower.log import Log, log
from fedkseed.flower.strategy import FedKSeed
from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.algorithms import check_base
from fedkseed.runs.learner import Learner
from fedkseed.runs.objectives import Goal, goal_of
from fedkseed.runs.records import Records
from fedkseed.runs.task import Stopwatch
from fedkseed.runs.trackers import check_trackers


def build_strategy(config: FlowerConfig) -> FedKSeed:
    """The strategy for these settings, with the server's own evaluation if they name records for it.

    Raises:
        FedKSeedError: the model, the data or the run folder cannot be used.
    """
    check_trackers(config.trackers, "run-config log")
    log(INFO, "reading data and base model: %s", config.model)
    loading = load_for(config, training=False)
    config, dealt, held_out, goal = _with_records(config, loading.learner)
    loaded, run = loading.bound, open_run(config, dealt)
    base = check_base(run.load_ledger(), loaded, config.model)
    run.write_config(config, run.driver)
    weight_bytes, guess = sum(p.nbytes for p in loaded.model.parameters()), guess_loss(loaded.model)
    if held_out is None:
        load_bound.cache_clear()  # only the identity is needed, not the weights
        return FedKSeed(run, config, base, weight_bytes, guess_loss=guess)
    examples, pad_id = held_out.examples, loading.learner.pad_id
    watched = None if goal is None else goal.task(loaded.model, examples, held_out.records, Stopwatch(), loaded.identity)

    def evaluate(ledger: Ledger) -> EvalLoss:
        heard = partial(Log().progress, f"evaluating after round {ledger.round}")
        return loaded.evaluate(ledger, examples, pad_id, heard, watched)

    return FedKSeed(run, config, base, weight_bytes, evaluate, guess)


def _with_records(config: FlowerConfig, learner: Learner) -> tuple[FlowerConfig, Records | None, Held | None, Goal | None]:
    """The settings, with no more clients than the records have where those are dealt out; these records; what to evaluate on
    here, None where clients evaluate their own; and what that is scored by, None where it is the loss or the nodes' affair."""
    if isinstance(config, EngineConfig):
        records = simulated_records(config)
        counted = config.model_copy(update={"num_clients": min(config.num_clients, len(records.clients))})
        return counted, records, Held(records.held_out, records.references, records.stop_ids), records.goal
    if config.eval_data is None:
        return config, None, None, None
    held = read_held(config, learner, config.eval_data, "evaluation", "test").drawn(config)
    goal = None if config.objective == OWN else goal_of(config, learner, held.stop_ids, held.examples, held.records)
    return config, None, held, goal
