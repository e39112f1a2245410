"""Clients with a real (small) model: what a request makes them do, against central SGD and against replay."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support import laws
from tests.support.generators import global_states, seed_globally

import fedkseed as fk
from fedkseed.errors import InvalidValueError, ProtocolError
from fedkseed.federation import FederationConfig
from fedkseed.kseed.client import Client
from fedkseed.kseed.messages import TrainReply, TrainRequest, coefficients_digest
from fedkseed.kseed.rounding import pack
from fedkseed.kseed.server import Server, start
from fedkseed.kseed.steps import update

F32, F64 = NDArray[np.float32], NDArray[np.float64]
ROUNDOFF = 2.0**-24  # half a unit in the last place of a float32, relative
MAX_GAUSSIAN = 5.8  # the largest |z| that 23 bits can give: sqrt(-2 ln 2^-24) = 5.77


def network(kind: torch.dtype = torch.float32) -> torch.nn.Sequential:
    """A small classifier with tensors of several sizes, its weights fixed."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 40), torch.nn.Tanh(), torch.nn.Linear(40, 5))
    draw = torch.Generator().manual_seed(4)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw).mul(0.3).to(kind)
    return model


class Classification:
    """Records of a client and their loss; notes which records it was asked for."""

    def __init__(self, model: torch.nn.Module, num_examples: int = 24, seed: int = 0) -> None:
        draw = torch.Generator().manual_seed(100 + seed)
        self.model = model
        self.x = torch.randn(num_examples, 6, generator=draw)
        self.y = (self.x[:, :3].argmax(1) + (self.x[:, 4] > 0.5)).long()
        self.asked: list[list[int]] = []

    @property
    def num_examples(self) -> int:
        return len(self.x)

    def loss(self, records: NDArray[np.int64]) -> float:
        self.asked.append(records.tolist())
        kind = next(self.model.parameters()).dtype
        with torch.inference_mode():
            logits = self.model(self.x[records].to(kind)).double()
            return torch.nn.functional.cross_entropy(logits, self.y[records]).item()


def client(model: torch.nn.Module, pool: fk.SeedPool, name: str = "a", task: Any = None) -> tuple[Client, fk.Binding, Any]:
    bound = fk.bind(model, pool)
    task = task or Classification(model)
    return Client(name, bound, bound.identity(), task), bound, task


def request(bound: fk.Binding, coefficients: F64, precision: Any = "float32", **changes: Any) -> TrainRequest:
    packed = pack(coefficients, precision)
    fields: dict[str, Any] = {
        "run_id": bytes(range(8)),
        "server_round": 1,
        "attempt": 0,
        "client": "a",
        "pool": bound.pool,
        "base": bytes.fromhex(bound.identity().fingerprint),
        "coefficients": packed,
        "digest": coefficients_digest(packed.unpack()),
        "indices": (3, 77, 3, 200, 0, 255),
        "lr": 1e-2,
        "eps": 1e-2,
        "batch_size": 4,
        "max_grad": 1e4,
    }
    return TrainRequest(**fields | changes)


def values(model: torch.nn.Module) -> dict[str, F32]:
    """Every parameter, flat and widened, by name."""
    return {name: laws.widen(parameter) for name, parameter in model.named_parameters()}


# --- One client, one step a round, is central two-point SGD ---


def z_of(pool: fk.SeedPool, name: str, n: int, k: int) -> F32:
    if pool.family == "hadamard":
        return laws.hadamard_z(pool.key, pool.size, name, n, k).astype(np.float32)
    return laws.gaussian_z(pool.key, name, n, k)


def losses_at(model: torch.nn.Module, task: Classification) -> Callable[[dict[str, F32], list[int]], float]:
    """The loss as a function of weights: what central SGD differentiates."""

    def loss(weights: dict[str, F32], records: list[int]) -> float:
        for name, parameter in model.named_parameters():
            parameter.data = torch.from_numpy(weights[name].astype(np.float32).copy()).reshape(parameter.shape)
        return task.loss(np.array(records))

    return loss


def federated(config: FederationConfig) -> tuple[F64, list[int], list[list[int]]]:
    """Coefficients after all rounds, and the seed and the records of every step."""
    model = network()
    participant, bound, task = client(model, start(config, fk.bind(model, fk.SeedPool(0, 1)).identity()).pool)
    server = Server(config, start(config, bound.identity()), ["a"])
    seeds = []
    while not server.finished:
        (asked,) = server.plan()
        seeds.append(asked.indices[0])
        assert server.absorb([("a", participant.answer(asked.encode()))]).status == "closed"
    assert server.ledger.history is not None
    assert task.asked[::2] == task.asked[1::2]  # both probes of a step see the same records
    return server.ledger.history.accumulators, seeds, task.asked[::2]


CENTRAL = FederationConfig(
    num_rounds=25, fraction_train=1, local_steps=1, batch_size=4, lr=2e-2, eps=1e-2, num_seeds=256, wire="float32", seed=9
)


def test_one_client_with_one_step_a_round_is_central_sgd_bit_for_bit() -> None:
    """On the precision that everybody holds, float32 weights rebuilt from float32 coefficients: every bit of every step.

    The oracle has its own noise (tests/support/laws.py), float32 arithmetic in NumPy, and none of the package's.
    """
    found, seeds, records = federated(CENTRAL)
    model = network()
    loss, base = losses_at(model, Classification(model)), values(model)
    pool = start(CENTRAL, fk.bind(network(), fk.SeedPool(0, 1)).identity()).pool
    eps = np.float32(CENTRAL.eps)

    def central(scale: float = 1.0, forget: int | None = None) -> F64:
        c = np.zeros(pool.size)
        for t, (k, batch) in enumerate(zip(seeds, records, strict=True)):
            w = {n: x + laws.hadamard_sum(pool.key, pool.size, n, len(x), c.astype(np.float32)) for n, x in base.items()}
            plus = {n: x + eps * z_of(pool, n, len(x), k) for n, x in w.items()}
            minus = {n: x - 2 * eps * z_of(pool, n, len(x), k) for n, x in plus.items()}
            g = np.float32((loss(plus, batch) - loss(minus, batch)) / (2 * float(eps)))
            if t != forget:
                c[k] -= CENTRAL.lr * scale * float(g)
        return c

    assert len(set(seeds)) > 20  # many directions were taken
    assert np.array_equal(found, central())
    assert not np.array_equal(found, central(forget=3))
    assert not np.array_equal(found, central(scale=1 + 1e-6))


def test_one_client_with_one_step_a_round_follows_textbook_sgd() -> None:
    """w <- w - lr g z in float64, no coefficients, no rounding: only the float32 of the losses' inputs lies between.

    A probe's weights and activations are rounded to 2^-24 of their size (about 1): an error of the loss below 1e-6, of g
    below 1e-6 / eps = 1e-4, of a coefficient below lr * 1e-4 a step; 25 steps of a small lr hardly amplify it.
    """
    found, seeds, records = federated(CENTRAL)
    pool = start(CENTRAL, fk.bind(network(), fk.SeedPool(0, 1)).identity()).pool
    model = network().double()
    task = Classification(model)
    w = {n: p.detach().reshape(-1).numpy().copy() for n, p in model.named_parameters()}

    def loss(weights: dict[str, F64], batch: list[int]) -> float:
        for name, parameter in model.named_parameters():
            parameter.data = torch.from_numpy(weights[name].copy()).reshape(parameter.shape)
        return task.loss(np.array(batch))

    c = np.zeros(pool.size)
    for k, batch in zip(seeds, records, strict=True):
        z = {n: z_of(pool, n, len(x), k).astype(np.float64) for n, x in w.items()}
        plus = loss({n: x + CENTRAL.eps * z[n] for n, x in w.items()}, batch)
        minus = loss({n: x - CENTRAL.eps * z[n] for n, x in w.items()}, batch)
        g = (plus - minus) / (2 * CENTRAL.eps)
        c[k] -= CENTRAL.lr * g
        w = {n: x - CENTRAL.lr * g * z[n] for n, x in w.items()}
    tolerance = 25 * CENTRAL.lr * 1e-4
    assert np.abs(found - c).max() < tolerance
    assert np.abs(found).max() > 100 * tolerance  # the run went much farther than that


# --- Replay: the records of a client give its final weights ---


HALF_HADAMARD = [(kind, "hadamard") for kind in laws.HALF_TYPES]
BOUNDED = [(torch.float32, "hadamard"), (torch.float32, "gaussian"), *[(kind, "gaussian") for kind in laws.HALF_TYPES]]


def replayed(asked: TrainRequest, reply: TrainReply, forget: int | None = None) -> F32:
    """The request's coefficients and the client's own records, added in float64 and rounded once."""
    c = asked.coefficients.unpack().astype(np.float64)
    for t, (k, g) in enumerate(zip(asked.indices, reply.projected_grads.unpack(), strict=True)):
        if t != forget:
            c[k] -= float(update(asked.lr, g))
    return c.astype(np.float32)


def answered(
    kind: torch.dtype, family: Any, precision: Any, **changes: Any
) -> tuple[fk.Binding, TrainRequest, TrainReply, dict[str, F32], str]:
    """A client's answer from coefficients that are not zero, and the weights that it ended with."""
    model = network(kind)
    participant, bound, _ = client(model, fk.SeedPool(31, 256, family))
    before = np.random.default_rng(8).standard_normal(256) * 2e-3
    asked = request(bound, before, precision, **changes)
    reply = TrainReply.decode(participant.answer(asked.encode()))
    return bound, asked, reply, values(model), bound.digest()


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(("kind", "family"), HALF_HADAMARD)
def test_replay_in_half_precision_is_exact(kind: torch.dtype, family: str, precision: str) -> None:
    bound, asked, reply, _, digest = answered(kind, family, precision)
    assert reply.dropped == ()
    bound.rebuild(replayed(asked, reply))
    assert bound.digest() == digest
    for forgotten in range(len(asked.indices)):
        bound.rebuild(replayed(asked, reply, forgotten))
        assert bound.digest() != digest


def test_replay_is_exact_where_steps_were_dropped() -> None:
    bound, asked, reply, _, digest = answered(torch.bfloat16, "hadamard", "float16", loss_clip=4e-3)
    assert 0 < len(reply.dropped) < len(asked.indices)  # else the test says nothing
    assert np.all(reply.projected_grads.unpack()[list(reply.dropped)] == 0)
    bound.rebuild(replayed(asked, reply))
    assert bound.digest() == digest


def spacing(x: F32, kind: torch.dtype) -> F64:
    """The distance of neighbouring numbers of a type at these values (at the larger power of two, so never too small)."""
    if kind == torch.float32:
        return np.zeros(len(x))
    bits = laws.FRACTION_BITS[kind]
    _, exponent = np.frexp(np.abs(x.astype(np.float64)))
    least = {torch.float16: -14, torch.bfloat16: -126}[kind]
    return np.ldexp(1.0, np.maximum(exponent, least) - bits)


def replay_bound(asked: TrainRequest, reply: TrainReply, w: F32, kind: torch.dtype, family: str) -> F64:
    """How far in-place moves may be from the rebuilt weights, element by element.

    A move rounds its amounts to float32, (gaussian) each product and sum, and the new weight: with |amount| <= 2 eps +
    |lr g| and |z| <= Z, that is at most u (|w| + 5 A Z) for A = all amounts of the move together. There are 2 tau + 1.
    A rebuild rounds its coefficients, its products and (hadamard: the table once; gaussian: K times) its sum, all at
    most Z sum |a|, and the new weight. For half precision both are then cast: one spacing between them.
    """
    u, z = ROUNDOFF, MAX_GAUSSIAN if family == "gaussian" else 1.0
    grads = np.abs(reply.projected_grads.unpack().astype(np.float64))
    largest, eps = float(asked.lr * grads.max()), asked.eps
    a = np.abs(asked.coefficients.unpack().astype(np.float64)).sum() + asked.lr * grads.sum()
    passes = 2 * len(asked.indices) + 1
    size = np.abs(w) + z * (2 * eps + asked.lr * grads.sum())
    moves = passes * u * (size + 5 * z * (3 * eps + largest))
    terms = asked.pool.size if family == "gaussian" else 1
    rebuilds = 2 * u * (size + z * a * (2 + terms))  # where the client started, and the replay
    return moves + rebuilds + spacing(w, kind)


@pytest.mark.parametrize("precision", ["float32", "float16"])
@pytest.mark.parametrize(("kind", "family"), BOUNDED)
def test_replay_is_within_the_bound_elsewhere(kind: torch.dtype, family: str, precision: str) -> None:
    bound, asked, reply, after, _ = answered(kind, family, precision, lr=5e-2)
    limits = {name: replay_bound(asked, reply, w, kind, family) for name, w in after.items()}

    def within(coefficients: F32) -> bool:
        bound.rebuild(coefficients)
        return all(np.all(np.abs(after[n] - w) <= limits[n]) for n, w in values(bound.model).items())

    assert within(replayed(asked, reply))
    for forgotten in range(len(asked.indices)):
        assert not within(replayed(asked, reply, forgotten))


# --- The client's manners ---


@pytest.fixture
def pair() -> tuple[Client, fk.Binding, Classification]:
    return client(network(), fk.SeedPool(31, 256))


def test_the_answer_is_a_function_of_the_request(pair: tuple[Client, fk.Binding, Classification]) -> None:
    """Whatever was answered before, wherever the weights are: the same bytes."""
    participant, bound, _ = pair
    first = request(bound, np.zeros(256)).encode()
    other = request(bound, np.full(256, 1e-3), server_round=2).encode()
    reply = participant.answer(first)
    assert participant.answer(other) != reply
    bound.move([1], [0.5])
    assert participant.answer(first) == reply
    assert client(network(), fk.SeedPool(31, 256))[0].answer(first) == reply


def test_global_generators_are_neither_read_nor_moved(pair: tuple[Client, fk.Binding, Classification]) -> None:
    participant, bound, _ = pair
    data = request(bound, np.zeros(256)).encode()
    reply = participant.answer(data)

    seed_globally(99)
    before = global_states()
    assert participant.answer(data) == reply
    assert global_states() == before


@pytest.mark.parametrize("change", [{"run_id": bytes(8)}, {"server_round": 2}, {"attempt": 1}], ids=["run", "round", "attempt"])
def test_another_round_draws_other_batches(pair: tuple[Client, fk.Binding, Classification], change: dict[str, Any]) -> None:
    participant, bound, task = pair
    participant.answer(request(bound, np.zeros(256)).encode())
    first, task.asked = task.asked, []
    participant.answer(request(bound, np.zeros(256), **change).encode())
    assert len(first) == len(task.asked)
    assert first != task.asked


def test_another_client_draws_other_batches() -> None:
    asked = []
    for name in "ab":
        participant, bound, task = client(network(), fk.SeedPool(31, 256), name)
        participant.answer(request(bound, np.zeros(256), client=name).encode())
        asked.append(task.asked)
    assert asked[0] != asked[1]


def test_the_reply_answers_its_request(pair: tuple[Client, fk.Binding, Classification]) -> None:
    participant, bound, task = pair
    asked = request(bound, np.zeros(256), "float16", attempt=2, server_round=7)
    heard: list[tuple[int, float]] = []
    reply = TrainReply.decode(participant.answer(asked.encode(), lambda step, loss: heard.append((step, loss))))
    for field in ("run_id", "server_round", "attempt", "client", "base", "digest"):
        assert getattr(reply, field) == getattr(asked, field)
    assert reply.num_examples == 24
    assert reply.projected_grads.precision == "float16"
    assert [step for step, _ in heard] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert reply.loss == pytest.approx(np.mean([loss for _, loss in heard]), rel=1e-12)
    assert [len(records) for records in task.asked] == [4] * 12
    # the scalars are what the losses say, rounded to the wire
    pairs = np.array([loss for _, loss in heard]).reshape(-1, 2)
    exact = (pairs[:, 0] - pairs[:, 1]) / (2 * float(np.float32(asked.eps)))
    assert reply.projected_grads.unpack().tolist() == exact.astype(np.float16).astype(float).tolist()


def test_no_loss_is_reported_where_all_steps_were_dropped() -> None:
    model = network()
    task = Classification(model)
    task.loss = lambda records: float("nan")  # type: ignore[method-assign]
    participant, bound, _ = client(model, fk.SeedPool(31, 256), task=task)
    before = bound.digest()
    reply = TrainReply.decode(participant.answer(request(bound, np.zeros(256)).encode()))
    assert reply.loss is None
    assert reply.dropped == tuple(range(6))
    bound.rebuild(np.zeros(256, np.float32))
    assert bound.digest() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"client": "b"}, r"request is for client 'b'; this is 'a'"),
        ({"base": bytes(32)}, r"request is for base model 0000000000000000\.\.\..*load the same base weights as the server"),
        ({"pool": fk.SeedPool(32, 256)}, r"request is for SeedPool\(key=32,.*bound to SeedPool\(key=31,"),
        ({"pool": fk.SeedPool(31, 256, "gaussian")}, r"family='gaussian'.*bound to .*family='hadamard'"),
    ],
    ids=["client", "base", "pool", "family"],
)
def test_what_is_not_for_this_client_is_refused_by_name(
    pair: tuple[Client, fk.Binding, Classification], change: dict[str, Any], message: str
) -> None:
    participant, bound, task = pair
    before = bound.digest()
    with pytest.raises(ProtocolError, match=message):
        participant.answer(replace(request(bound, np.zeros(256)), **change).encode())
    assert bound.digest() == before
    assert task.asked == []


def test_bytes_that_are_no_request_are_refused(pair: tuple[Client, fk.Binding, Classification]) -> None:
    participant, bound, _ = pair
    reply = participant.answer(request(bound, np.zeros(256)).encode())
    for data in (b"", b"\x00" * 100, reply):
        with pytest.raises(ProtocolError):
            participant.answer(data)


@pytest.mark.parametrize("number", [np.int64(24), torch.tensor(24), np.uint8(24)], ids=["int64", "tensor", "uint8"])
def test_a_number_of_records_of_any_integer_type_is_sent(number: Any) -> None:
    class Counted(Classification):
        num_examples = number

    plain = network()
    expected, bound, _ = client(plain, fk.SeedPool(31, 256))
    model = network()
    one, _, _ = client(model, fk.SeedPool(31, 256), task=Counted(model))
    data = request(bound, np.zeros(256)).encode()
    assert one.answer(data) == expected.answer(data)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (20.0, "^num_examples of a task is 20.0; expected how many records it has, an integer$"),
        (None, "^num_examples of a task is None; expected how many"),
        (True, "^num_examples of a task is True; expected how many"),
        (0, "^a client has 0 records; expected at least one, so leave it out$"),
    ],
)
def test_what_is_no_number_of_records_is_refused_before_any_work(number: Any, text: str) -> None:
    class Counted(Classification):
        num_examples = number

    model = network()
    task = Counted(model)
    one, bound, _ = client(model, fk.SeedPool(31, 256), task=task)
    bound.perturb(3, 0.5)
    before = bound.digest()
    with pytest.raises(InvalidValueError, match=text):
        one.answer(request(bound, np.zeros(256)).encode())
    assert task.asked == []
    assert bound.digest() == before
