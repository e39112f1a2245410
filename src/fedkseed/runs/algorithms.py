"""The registry: from what an algorithm's clients send to its checkpoint and to the federation that a driver drives.

An algorithm is a row of `fedkseed.federation.algorithms`; only one that sends something of a new kind needs more here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fedkseed.baselines import Parameters, TensorClient, TensorServer, TunedTensors, attach, fingerprint
from fedkseed.errors import LedgerError, RunError
from fedkseed.federation import Checkpoint, Rounds
from fedkseed.federation.algorithms import Algorithm
from fedkseed.federation.task import Task
from fedkseed.kseed.change_client import ChangeClient
from fedkseed.kseed.change_server import ChangeServer, new_page
from fedkseed.kseed.client import Client
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.server import Server, seed_pool
from fedkseed.models.identity import BaseIdentity
from fedkseed.runs.records import Records
from fedkseed.runs.settings import RunConfig
from fedkseed.runs.task import BoundModel, Stopwatch, TextTask, TimedModel, TimedPages, bind_loaded, checkpoint_activations

LEDGER, TENSORS = "ledger.safetensors", "tensors.safetensors"


class Participant(Protocol):
    """A client of any algorithm."""

    @property
    def task(self) -> Task:
        """Its records and their loss."""
        ...

    def answer(self, data: bytes, on_step: Callable[[int, float], None] | None = None) -> bytes:
        """Train as a request's bytes say and give the reply's; `on_step` hears each step's number and loss."""
        ...


@dataclass(frozen=True)
class Federation:
    """What a simulation needs of an algorithm.

    Attributes:
        model: what is evaluated; a soft prompt is part of it.
        server: the rounds.
        clients: by name.
        restore: sets the model to the server's checkpoint.
    """

    model: torch.nn.Module
    server: Rounds[Any, Any]
    clients: Mapping[str, Participant]
    restore: Callable[[], None]


@dataclass(frozen=True)
class Kind:
    """What becomes of one kind of replies.

    Attributes:
        file: the checkpoint's name in a run's folder.
        load: reads it.
        federate: `(settings, model, checkpoint or None, records, stopwatch) -> Federation`.
    """

    file: str
    load: Callable[[Path], Checkpoint]
    federate: Callable[[RunConfig, torch.nn.Module, Any, Records, Stopwatch], Federation]


def over_seeds(
    config: RunConfig, model: torch.nn.Module, ledger: Ledger | None, records: Records, watch: Stopwatch
) -> Federation:
    """K numbers: one model bound to the run's pool, shared by all clients.

    Raises:
        LedgerError: the ledger is of another base model.
    """
    loaded = bind_loaded(config.model, model, seed_pool(config))
    check_base(ledger, loaded, config.model)
    base, bound = loaded.identity, loaded.bound
    server = Server(config, ledger or base, list(records.clients), num_examples=records.sizes)
    shared = TimedModel(bound, watch)
    clients = {
        name: Client(name, shared, base, TextTask(model, examples, records.pad_id, watch))
        for name, examples in records.clients.items()
    }
    return Federation(model, server, clients, lambda: bound.rebuild(server.ledger.coefficients))


def over_changes(
    config: RunConfig, model: torch.nn.Module, ledger: Ledger | None, records: Records, watch: Stopwatch
) -> Federation:
    """Pages of K numbers: one model bound to them, shared by all clients.

    Raises:
        LedgerError: the ledger is of another base model or of other settings.
    """
    loaded = bind_loaded(config.model, model, new_page(config, 0).pool)
    base, bound = check_base(ledger, loaded, config.model), loaded.bound
    if config.checkpointing == "on":
        checkpoint_activations(model)
    server = ChangeServer(config, ledger or base, list(records.clients), num_examples=records.sizes)
    shared = TimedPages(bound, watch)
    clients = {
        name: ChangeClient(name, shared, base, TextTask(model, examples, records.pad_id, watch))
        for name, examples in records.clients.items()
    }

    def restore() -> None:
        *closed, page = server.ledger.pages
        bound.open_page(page.pool, [one.closed() for one in closed], page.movement)
        bound.rebuild(page.coefficients())

    return Federation(model, server, clients, restore)


def check_base(ledger: Ledger | None, loaded: BoundModel, source: str) -> BaseIdentity:
    """The identity of a loaded model, which a run's ledger must be of.

    Raises:
        LedgerError: it is not.
    """
    if ledger is not None and (difference := ledger.base.difference(loaded.identity, loaded.bound.names)):
        raise LedgerError(f"{LEDGER} is of another base model than {source}: {difference}")
    return loaded.identity


def over_tensors(
    config: RunConfig, model: torch.nn.Module, saved: TunedTensors | None, records: Records, watch: Stopwatch
) -> Federation:
    """Whole tensors: one model with what the algorithm tunes, shared by all clients.

    Raises:
        RunError: the run's tensors are of another base model or algorithm.
        FedKSeedError: the algorithm's extra is missing, or does not know this architecture.
    """
    base = fingerprint(model)
    if saved is not None and saved.base != base:
        raise RunError(f"{TENSORS} is of another base model than {config.model}; go on with the run's own")
    attached = attach(model, config)
    parameters = Parameters(attached)
    first = saved or TunedTensors(config.algorithm, base, 0, parameters.read())
    server = TensorServer(config, first, list(records.clients), num_examples=records.sizes)
    clients = {
        name: TensorClient(name, config, attached, base, TextTask(attached, examples, records.pad_id, watch))
        for name, examples in records.clients.items()
    }
    return Federation(attached, server, clients, lambda: parameters.write(server.checkpoint.tensors))


KINDS = {
    "scalars": Kind(LEDGER, Ledger.load, over_seeds),
    "changes": Kind(LEDGER, Ledger.load, over_changes),
    "tensors": Kind(TENSORS, TunedTensors.load, over_tensors),
}
"""By what clients send."""


def kind_of(algorithm: Algorithm) -> Kind:
    """What becomes of an algorithm's replies."""
    return KINDS[algorithm.sends]


def checkpoint_path(path: Path) -> Path:
    """The checkpoint's file: in a run's folder whichever is there (a ledger, if none is yet); else the path itself."""
    if not path.is_dir():
        return path
    kept = [path / kind.file for kind in KINDS.values() if (path / kind.file).exists()]
    return kept[-1] if kept else path / LEDGER
