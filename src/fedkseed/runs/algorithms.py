"""The registry: from what an algorithm's clients send to the federation that a driver drives.

An algorithm is a row of `fedkseed.federation.algorithms`; only one that sends something of a new kind needs more here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.baselines import TensorClient, TensorServer, TunedTensors, attach, fingerprint, parameters_of
from fedkseed.errors import LedgerError, RunError
from fedkseed.evaluation import guess_loss
from fedkseed.federation import Rounds
from fedkseed.federation.algorithms import Algorithm
from fedkseed.federation.envelope import Reply, Request
from fedkseed.federation.task import Task
from fedkseed.kseed.change_client import ChangeClient
from fedkseed.kseed.change_messages import ChangeRequest
from fedkseed.kseed.change_messages import terms as change_terms
from fedkseed.kseed.change_server import ChangeServer
from fedkseed.kseed.change_server import vector as change_vector
from fedkseed.kseed.client import Client
from fedkseed.kseed.ledger import LEDGER, Ledger
from fedkseed.kseed.messages import TrainRequest
from fedkseed.kseed.messages import terms as train_terms
from fedkseed.kseed.server import Server, seed_pool
from fedkseed.kseed.server import vector as scalars_vector
from fedkseed.models.binding import Binding
from fedkseed.models.identity import BaseIdentity
from fedkseed.privacy import WITHHELD, Privacy
from fedkseed.runs.checkpoints import TENSORS
from fedkseed.runs.records import Records
from fedkseed.runs.settings import IN_MEMORY, RunConfig
from fedkseed.runs.task import (
    BoundModel,
    ScoredTask,
    Stopwatch,
    TextTask,
    TimedModel,
    TimedPages,
    bind_loaded,
    checkpoint_activations,
    compile_passes,
    tune_all_but,
)


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
        to_base: sets a model that was given in memory to what it was before the run.
        watched: the held-out records' scores, of a run that is tuned on scores.
    """

    model: torch.nn.Module
    server: Rounds[Any, Any]
    clients: Mapping[str, Participant]
    restore: Callable[[], None]
    to_base: Callable[[], None]
    watched: ScoredTask | None = None


@dataclass(frozen=True)
class Roles:
    """Server and client of runs whose model is a ledger, for a simulation and for Flower alike.

    Attributes:
        server: `(settings, ledger or the base's identity, clients or None, the loss of a guess or None, sizes or None)`.
        request: reads a request's bytes.
        client: `(name, bound model, the base's identity, task, stopwatch, its own privacy or None) -> Participant`.
        vector: `(request's bytes, reply's bytes) -> (what it adds to a secure sum, the reply)`.
        terms: `(request's bytes) -> 32 bytes`, the same for all who are asked to do the same.
    """

    server: Callable[
        [RunConfig, Ledger | BaseIdentity, Sequence[str] | None, float | None, Mapping[str, int] | None], Server | ChangeServer
    ]
    request: Callable[[bytes], Request]
    client: Callable[[str, Binding, BaseIdentity, TextTask, Stopwatch, Privacy | None], Participant]
    vector: Callable[[bytes, bytes], tuple[NDArray[np.float64], Reply]]
    terms: Callable[[bytes], bytes]


SCALARS = Roles(
    Server,
    TrainRequest.decode,
    lambda name, bound, base, task, watch, privacy: Client(name, TimedModel(bound, watch), base, task, privacy),
    scalars_vector,
    train_terms,
)
CHANGES = Roles(
    ChangeServer,
    ChangeRequest.decode,
    lambda name, bound, base, task, watch, privacy: ChangeClient(name, TimedPages(bound, watch), base, task, privacy),
    change_vector,
    change_terms,
)


@dataclass(frozen=True)
class Kind:
    """What becomes of one kind of replies.

    Attributes:
        federate: `(settings, model, checkpoint or None, records, stopwatch) -> Federation`.
        roles: who takes part, wherever they are; None of what runs in simulations only.
    """

    federate: Callable[[RunConfig, torch.nn.Module, Any, Records, Stopwatch], Federation]
    roles: Roles | None = None


def over_ledger(
    roles: Roles, config: RunConfig, model: torch.nn.Module, ledger: Ledger | None, records: Records, watch: Stopwatch
) -> Federation:
    """K numbers: one model bound to the run's pool, shared by all clients.

    Raises:
        LedgerError: the ledger is of another base model or of other settings.
    """
    loaded = bind_loaded(config.model, model, seed_pool(config), records.frozen)
    base = check_base(ledger, loaded, config.model)
    if config.checkpointing == "on":
        checkpoint_activations(model)
    if config.compile == "on":
        compile_passes(model)
    own = config.privacy if config.dp == "record" else None
    sizes = records.sizes if own is None else dict.fromkeys(records.clients, WITHHELD)
    server = roles.server(config, ledger or base, list(records.clients), guess_loss(model), sizes)
    clients = {
        name: roles.client(name, loaded.bound, base, records.task(model, name, watch, base), watch, own)
        for name in records.clients
    }
    watched = records.watched(model, watch, base)
    return Federation(model, server, clients, lambda: loaded.restore(server.ledger), loaded.to_base, watched)


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
    tune_all_but(model, records.frozen)
    attached = attach(model, config)
    parameters = parameters_of(attached, config)
    first = saved or TunedTensors(config.algorithm, base, 0, parameters.read())
    given = parameters.read() if config.model.startswith(IN_MEMORY) else None  # else a copy would be held for nothing
    server = TensorServer(config, first, list(records.clients), guess_loss(model), records.sizes)
    clients = {
        name: TensorClient(name, config, attached, base, TextTask(attached, examples, records.pad_id, watch), parameters)
        for name, examples in records.clients.items()
    }
    return Federation(
        attached,
        server,
        clients,
        lambda: parameters.write(server.checkpoint.tensors),
        lambda: None if given is None else parameters.write(given),
    )


KINDS = {
    "scalars": Kind(partial(over_ledger, SCALARS), SCALARS),
    "changes": Kind(partial(over_ledger, CHANGES), CHANGES),
    "tensors": Kind(over_tensors),
}
"""By what clients send."""


def kind_of(algorithm: Algorithm) -> Kind:
    """What becomes of an algorithm's replies."""
    return KINDS[algorithm.sends]


def roles_of(algorithm: Algorithm) -> Roles:
    """Server and client of an algorithm whose model is a ledger.

    Raises:
        RunError: it is none of those.
    """
    roles = kind_of(algorithm).roles
    if roles is None:
        raise RunError(f"{algorithm.name} sends {algorithm.sends}; it runs in fedkseed simulate only")
    return roles
