"""Federations whose clients send changes of K numbers, of models small enough to know every derivative of."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import fedkseed as fk
from fedkseed.federation import FederationConfig, Outcome
from fedkseed.kseed.change_client import ChangeClient
from fedkseed.kseed.change_messages import CHANGE, ChangeReply, ChangeRequest
from fedkseed.kseed.change_server import ChangeServer, new_page
from fedkseed.kseed.coding import encode
from fedkseed.models.identity import BaseIdentity
from tests.support import laws

F64 = NDArray[np.float64]
BASE = BaseIdentity.of({"a": bytes(range(32)), "b": bytes(32)})
SHAPES = {"first": (16, 25), "norm": (7,), "second": (331,)}


def config(**changes: Any) -> FederationConfig:
    settings = {
        "algorithm": "fedkseed-grad",
        "lr": 0.5,
        "num_rounds": 6,
        "fraction_train": 1.0,
        "local_steps": 1,
        "num_seeds": 128,
        "wire": "float32",
        "aggregator": "mean",
        "seed": 7,
    }
    return FederationConfig(**(settings | changes))


# --- Servers without models: their clients answer with numbers of a generator ---


def numbers_of(request: ChangeRequest) -> F64:
    """A change that depends on client, round and attempt."""
    seed = [*request.client.encode(), request.server_round, request.attempt]
    return 0.01 * np.random.default_rng(seed).standard_normal(request.size)


def reply_to(request: ChangeRequest, change: F64 | None = None, **changes: Any) -> ChangeReply:
    """An honest answer of a gradient client, or one with some fields changed."""
    answer = ChangeReply(
        **request.head(),
        num_examples=5,
        loss=2.0,
        kind=CHANGE,
        steps=request.steps,
        numbers=encode(numbers_of(request) if change is None else change, request.wire),
    )
    return replace(answer, **changes)


def honest(requests: Iterable[ChangeRequest]) -> list[tuple[str, bytes]]:
    return [(request.client, reply_to(request).encode()) for request in requests]


def server(clients: Sequence[str] = ("a", "b", "c"), **changes: Any) -> ChangeServer:
    return ChangeServer(config(**changes), BASE, clients)


def play(a_server: ChangeServer, rounds: int = 1) -> None:
    for _ in range(rounds):
        outcome = a_server.absorb(honest(a_server.plan()))
        assert outcome.status == "closed"
        assert outcome.refusals == outcome.missing == ()


# --- Models whose loss is a quadratic ---


def quadratic_model(kind: torch.dtype = torch.float32, seed: int = 1) -> torch.nn.Module:
    draw = torch.Generator().manual_seed(seed)
    return laws.module_of(
        {n: torch.nn.Parameter((0.5 * torch.randn(s, generator=draw)).to(kind)) for n, s in SHAPES.items()}, backend="cpu"
    )


class Quadratic:
    """Records t and the mean of `sum_i h_i (w_i - t_i)^2 / 2` over some, in float64.

    Args:
        model: its weights in the order of their names are w.
        num_examples: how many records.
        seed: of their targets, which spread about a common one.
        spread: how far.
    """

    def __init__(self, model: torch.nn.Module, num_examples: int = 12, seed: int = 0, spread: float = 0.3) -> None:
        self.parameters = [x for _, x in sorted(model.named_parameters())]
        d = sum(x.numel() for x in self.parameters)
        self.h = torch.linspace(0.2, 2.0, d, dtype=torch.float64)
        common = torch.randn(d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
        draw = torch.Generator().manual_seed(seed)
        self.targets = common + spread * torch.randn(num_examples, d, generator=draw, dtype=torch.float64)
        self.asked: list[list[int]] = []

    @property
    def num_examples(self) -> int:
        return len(self.targets)

    def differentiable_loss(self, records: NDArray[np.int64]) -> torch.Tensor:
        self.asked.append(records.tolist())
        w = torch.cat([x.reshape(-1).double() for x in self.parameters])
        return (self.h * (w - self.targets[records]) ** 2).sum() / (2 * len(records))

    def loss(self, records: NDArray[np.int64]) -> float:
        with torch.no_grad():
            return self.differentiable_loss(records).item()

    def gradient(self, w: F64, records: Sequence[int]) -> F64:
        """By hand."""
        gradient: F64 = self.h.numpy() * (w - self.targets[list(records)].numpy().mean(0))
        return gradient


def directions(pool: fk.SeedPool, basis: str = "coefficients") -> F64:
    """The d x K matrix that K numbers are multiplied with: the perturbations, or the table's hashing; of `SHAPES`."""
    rows = []
    for name, shape in sorted(SHAPES.items()):
        n = int(np.prod(shape))
        if basis == "table":
            sign, bucket = laws.signs_and_buckets(pool.key, pool.size, name, n)
            rows.append((1.0 - 2 * sign)[:, None] * (bucket[:, None] == np.arange(pool.size)))
        else:
            rows.append(
                np.stack([laws.seed_noise(pool.family, pool.key, pool.size, name, n, k) for k in range(pool.size)], axis=1)
            )
    return np.concatenate(rows)


def flat(model: torch.nn.Module) -> F64:
    """All weights in the order of their names."""
    return np.concatenate([laws.widen(x).astype(np.float64) for _, x in sorted(model.named_parameters())])


def federation(
    settings: FederationConfig, tasks: Mapping[str, Any] | int = 1, kind: torch.dtype = torch.float32
) -> tuple[ChangeServer, dict[str, ChangeClient], fk.Binding]:
    """A server and its clients over one quadratic model; `tasks` by client, or of so many clients."""
    model = quadratic_model(kind)
    bound = fk.bind(model, new_page(settings, 0).pool)
    if isinstance(tasks, int):
        tasks = {f"client-{i}": Quadratic(model, 6 + 3 * i, i) for i in range(tasks)}
    else:
        tasks = {name: make(model) for name, make in tasks.items()}
    base = bound.identity()
    clients = {name: ChangeClient(name, bound, base, task) for name, task in tasks.items()}
    return ChangeServer(settings, base, list(clients)), clients, bound


def close(a_server: ChangeServer, clients: Mapping[str, ChangeClient]) -> Outcome:
    """One round."""
    outcome = a_server.absorb([(r.client, clients[r.client].answer(r.encode())) for r in a_server.plan()])
    assert (outcome.status, outcome.refusals) == ("closed", ())
    return outcome
