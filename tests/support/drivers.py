"""The two drivers of rounds, with the same three sites behind them: one law runs over every row of `DRIVERS`."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fedkseed.data import EncodedExample
from fedkseed.evaluation import EvalLoss
from fedkseed.kseed.ledger import Ledger
from fedkseed.runs import simulation as simulation_module
from fedkseed.runs import task
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.records import prepare
from fedkseed.runs.simulation import Simulation
from tests.support.flower_grid import engine, federation, node, run_config, started
from tests.support.flower_sites import simulated_settings
from tests.support.runs import Watcher


@dataclass(frozen=True)
class Driven:
    """A run that is over.

    Attributes:
        ledger: its last.
        folder: where it lies.
        notes: what went wrong, as it was told to a person.
    """

    ledger: Ledger
    folder: Path
    notes: list[str]


class Warnings(logging.Handler):
    """What the server's log says of things that went wrong; its nodes, in the same process here, log errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            self.lines.append(record.getMessage())


@contextmanager
def warned() -> Iterator[list[str]]:
    handler, logger = Warnings(), logging.getLogger("flwr")
    logger.addHandler(handler)
    try:
        yield handler.lines
    finally:
        logger.removeHandler(handler)


def in_simulation(sites: Path, folder: Path, **changes: Any) -> Driven:
    """Goes on with the run that the folder holds, as `--resume` does."""
    config, watcher = simulated_settings(sites, **changes), Watcher()
    run = RunFolder.open(folder) if (folder / "config.toml").exists() else RunFolder.create(folder, config)
    ledger = Simulation(run, prepare(config, Watcher()), watcher).train()
    assert isinstance(ledger, Ledger)
    told = [note for note in watcher.notes if not note.startswith("model: ")]
    return Driven(ledger, folder, told)


def on_flower(sites: Path, folder: Path, **changes: Any) -> Driven:
    """Nodes in the field; the held-out records are the server's."""
    config = run_config(sites, folder, **changes)
    with warned() as lines:
        return Driven(started(config, federation(sites, config)), folder, lines)


def on_flower_by_a_client(sites: Path, folder: Path, **changes: Any) -> Driven:
    """The same, but one of the nodes has the held-out records."""
    config = run_config(sites, folder, **changes, eval_data="")
    grid = federation(sites, config)
    grid.answers[102] = node(sites, "site-b", config, eval_data=str(sites / "held-out.jsonl"))
    with warned() as lines:
        return Driven(started(config, grid), folder, lines)


def on_the_engine(sites: Path, folder: Path, **changes: Any) -> Driven:
    """Flower's simulation engine, whose nodes are dealt the records."""
    config = run_config(sites, folder, data=sites / "joint.jsonl", partition="client", **changes)
    del config["min-clients"], config["deadline"]
    with warned() as lines:
        return Driven(started(config, engine(config, 3)), folder, lines)


Driver = Callable[..., Driven]
DRIVERS: dict[str, Driver] = {
    "simulation": in_simulation,
    "flower": on_flower,
    "flower, evaluated by a client": on_flower_by_a_client,
    "flower's engine": on_the_engine,
}
drivers = pytest.mark.parametrize("driver", DRIVERS.values(), ids=DRIVERS)


def on_evaluation(patch: pytest.MonkeyPatch, measure: Callable[[list[EncodedExample]], float]) -> None:
    """Put `measure` in place of the loss of held-out records, whoever asks for it."""

    def evaluate_loss(model: Any, examples: Any, *rest: Any) -> EvalLoss:
        return EvalLoss.of(measure(list(examples)), len(examples), sum(example.num_targets for example in examples))

    for module in (simulation_module, task):
        patch.setattr(module, "evaluate_loss", evaluate_loss)
