"""A run's strategy, built from its settings: base model, data and run folder."""

from __future__ import annotations

from functools import partial
from logging import INFO

from fedkseed.data import EncodedExample
from fedkseed.evaluation import EvalLoss, guess_loss
from fedkseed.flower.config import EngineConfig, FlowerConfig, open_run
from fedkseed.flower.log import Log, log
from fedkseed.flower.participant import drawn, load_bound, load_for, read_examples, simulated_records
from fedkseed.flower.strategy import FedKSeed
from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.algorithms import check_base
from fedkseed.runs.learner import Learner
from fedkseed.runs.records import Records
from fedkseed.runs.trackers import check_trackers


def build_strategy(config: FlowerConfig) -> FedKSeed:
    """The strategy for these settings, with the server's own evaluation if they name records for it.

    Raises:
        FedKSeedError: the model, the data or the run folder cannot be used.
    """
    check_trackers(config.trackers, "run-config log")
    log(INFO, "reading data and base model: %s", config.model)
    loading = load_for(config, training=False)
    config, dealt, held_out = _with_records(config, loading.learner)
    loaded, run = loading.bound, open_run(config, dealt)
    base = check_base(run.load_ledger(), loaded, config.model)
    run.write_config(config, run.driver)
    weight_bytes, guess = sum(p.nbytes for p in loaded.model.parameters()), guess_loss(loaded.model)
    if held_out is None:
        load_bound.cache_clear()  # only the identity is needed, not the weights
        return FedKSeed(run, config, base, weight_bytes, guess_loss=guess)
    examples, pad_id = held_out

    def evaluate(ledger: Ledger) -> EvalLoss:
        heard = partial(Log().progress, f"evaluating after round {ledger.round}")
        return loaded.evaluate(ledger, examples, pad_id, heard)

    return FedKSeed(run, config, base, weight_bytes, evaluate, guess)


def _with_records(
    config: FlowerConfig, learner: Learner
) -> tuple[FlowerConfig, Records | None, tuple[list[EncodedExample], int | None] | None]:
    """The settings, with no more clients than the records have where those are dealt out; these records; and what to evaluate
    on here with what padding holds, None where clients evaluate their own."""
    if isinstance(config, EngineConfig):
        records = simulated_records(config)
        counted = config.model_copy(update={"num_clients": min(config.num_clients, len(records.clients))})
        return counted, records, (records.held_out, records.pad_id)
    if config.eval_data is not None:
        examples = drawn(config, read_examples(config, learner, config.eval_data, "evaluation", "test"))
        return config, None, (examples, learner.pad_id)
    return config, None, None
