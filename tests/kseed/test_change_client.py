"""Gradient clients on quadratics: central SGD in the subspace, the union of clients, and what they do when a step fails."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.support import laws
from tests.support.changes import (
    Quadratic,
    close,
    config,
    directions,
    federation,
    flat,
    quadratic_model,
)

import fedkseed as fk
from fedkseed.errors import ModelError, ProtocolError
from fedkseed.federation import FederationConfig
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.kseed.change_client import ChangeClient
from fedkseed.kseed.change_messages import CHANGE, SCALARS, ChangeReply, seeds_of
from fedkseed.kseed.change_server import ChangeServer, new_page
from fedkseed.kseed.coding import LARGEST
from fedkseed.kseed.gradient_steps import folded_gradient, gradient_steps

F64 = NDArray[np.float64]
bases = pytest.mark.parametrize("basis", ["table", "coefficients"])
LR = {"table": 0.02, "coefficients": 0.02 / 128}  # the same steps of the weights: T = H u / K
K = 128


def settings_of(basis: str, **changes: Any) -> FederationConfig:
    return config(**{"basis": basis, "lr": LR[basis]} | changes)


# --- Central SGD in the subspace ---


def central(settings: FederationConfig, tasks: list[Quadratic], batches: list[list[list[int]]], scale: float = 1.0) -> F64:
    """w = w0 + Z x, x <- x - lr Z'g, in float64 with matrices of the oracle; every round of all batches with their weights."""
    z = directions(new_page(settings, 0).pool, settings.basis)
    w0, x = flat(quadratic_model()), np.zeros(K)
    for round_batches in batches:
        total = sum(task.num_examples for task in tasks)
        gradient = sum(
            (
                task.num_examples / total * task.gradient(w0 + z @ x, batch)
                for task, batch in zip(tasks, round_batches, strict=True)
            ),
            np.zeros(len(w0)),
        )
        x = x - scale * settings.lr * (z.T @ gradient)
    return x


@bases
def test_one_client_with_one_step_a_round_is_central_sgd_in_the_subspace(basis: str) -> None:
    """Weights, gradients and the wire are binary32 (2^-24 of 1, of gradients below 10); 25 rounds of contracting steps."""
    settings = settings_of(basis, num_rounds=25, batch_size=4)
    a_server, clients, _ = federation(settings)
    (one,) = clients.values()
    while not a_server.finished:
        close(a_server, clients)
    found = a_server.ledger.state["numbers"]  # type: ignore[index]
    asked = [[batch] for batch in one.task.asked]  # type: ignore[attr-defined]
    assert len(asked) == 25
    assert len({tuple(batch) for [batch] in asked}) > 10
    expected = central(settings, [one.task], asked)  # type: ignore[list-item]
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < 1e-5 * scale
    for wrong in (
        central(settings, [one.task], asked, scale=1.001),  # type: ignore[list-item]
        central(settings, [one.task], [*asked[1:], asked[0]]),  # type: ignore[list-item]
        central(
            settings.model_copy(update={"basis": {"table": "coefficients", "coefficients": "table"}[basis]}), [one.task], asked
        ),  # type: ignore[list-item]
    ):
        assert not np.abs(found - wrong).max() < 1e-4 * scale


def test_both_bases_walk_the_same_way() -> None:
    """They are one up to an orthogonal transform and a scale: the same weights at rates whose ratio is K."""
    places = []
    for basis in ("table", "coefficients"):
        a_server, clients, bound = federation(settings_of(basis, num_rounds=10, batch_size=4, local_steps=3))
        for _ in range(10):
            close(a_server, clients)
        bound.rebuild(a_server.ledger.coefficients)
        places.append(flat(bound.model))
    start = flat(quadratic_model())
    assert np.abs(places[0] - places[1]).max() < 1e-5
    assert np.abs(places[0] - start).max() > 0.01


@bases
@pytest.mark.parametrize("count", [2, 4])
def test_clients_with_one_step_are_one_client_with_their_union(basis: str, count: int) -> None:
    """Steps on all records of each, weighted by the numbers of examples; weighting them alike is the wrong variant."""
    settings = settings_of(basis, num_rounds=8, batch_size=1000)
    found = {}
    for weighting in ("examples", "equal"):
        a_server, clients, _ = federation(settings.model_copy(update={"weighting": weighting}), count)
        for _ in range(8):
            close(a_server, clients)
        found[weighting] = a_server.ledger.state["numbers"]  # type: ignore[index]
    tasks = [client.task for client in clients.values()]

    class Union(Quadratic):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__(model)
            self.targets = torch.cat([task.targets for task in tasks])  # type: ignore[attr-defined]

    a_server, clients, _ = federation(settings, {"all": Union})
    for _ in range(8):
        close(a_server, clients)
    union = a_server.ledger.state["numbers"]  # type: ignore[index]
    scale = np.abs(union).max()
    assert np.abs(found["examples"] - union).max() < 1e-5 * scale
    assert np.abs(found["equal"] - union).max() > 1e-3 * scale


@bases
@pytest.mark.parametrize("movement", ["absolute", "proportional"])
@pytest.mark.parametrize("kind", laws.FLOAT_TYPES, ids=str)
def test_local_steps_go_down_in_every_precision(basis: str, movement: str, kind: torch.dtype) -> None:
    """Through pages, with momentum at the server: the loss at the ledger falls by half."""
    settings = settings_of(
        basis, num_rounds=12, local_steps=4, batch_size=4, movement=movement, rounds_per_page=4, wire="int8",
        server_optimizer="momentum", server_lr=0.2,
    )  # fmt: skip
    if movement == "proportional":
        settings = settings.model_copy(update={"lr": settings.lr * 3})
    a_server, clients, bound = federation(settings, 2, kind)
    task = next(iter(clients.values())).task
    records = np.arange(task.num_examples)
    before = task.loss(records)
    for _ in range(12):
        close(a_server, clients)
    *closed, page = a_server.ledger.pages
    bound.open_page(page.pool, [each.closed() for each in closed], page.movement)
    bound.rebuild(page.coefficients())
    assert len(a_server.ledger.pages) == 3
    assert task.loss(records) < 0.8 * before


# --- A client as a function of its request ---


@pytest.mark.parametrize("measure", ["gradient", "two-point"])
def test_an_answer_is_a_function_of_the_request(measure: str) -> None:
    """Whatever the weights are when it comes, whether the pages were there before, and however often it is asked."""
    settings = settings_of("table", local_steps=5, batch_size=2, wire="sign", rounds_per_page=2, local_optimizer="sgd")
    a_server, clients, bound = federation(settings)
    ((name, one),) = clients.items()
    for _ in range(3):
        close(a_server, clients)
    (request,) = ChangeServer(settings, a_server.ledger, [name]).plan()  # all pages
    data = replace(request, measure=measure).encode()
    first = one.answer(data)
    for x in bound.model.parameters():
        x.data.add_(1)
    assert one.answer(data) == first
    fresh = ChangeClient(name, bound, a_server.ledger.base, one.task)
    assert fresh.answer(data) == first
    reply = ChangeReply.decode(first)
    assert (reply.kind, reply.steps, reply.dropped) == (CHANGE if measure == "gradient" else SCALARS, 5, ())
    assert all(getattr(reply, key) == value for key, value in request.head().items())


def test_scalars_are_slopes_where_the_round_begins() -> None:
    """Each is z_k'g at the page's numbers, on its step's batch: no step moves the weights for the next one."""
    settings = settings_of("coefficients", local_steps=6, batch_size=2, two_point_clients=1.0, eps=1e-2, wire="float32")
    a_server, clients, _ = federation(settings)
    for _ in range(2):
        close(a_server, clients)
    ((_name, one),) = clients.items()
    (request,) = a_server.plan()
    one.task.asked.clear()  # type: ignore[attr-defined]
    reply = ChangeReply.decode(one.answer(request.encode()))
    asked = one.task.asked  # type: ignore[attr-defined]
    assert asked[::2] == asked[1::2]
    z = directions(new_page(settings, 0).pool)
    w = flat(quadratic_model()) + z @ a_server.ledger.pages[0].coefficients()
    expected = [z[:, k] @ one.task.gradient(w, batch) for k, batch in zip(seeds_of(request), asked[::2], strict=True)]  # type: ignore[attr-defined]
    found = reply.numbers.decode(6)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-2)  # float16, and binary32 weights under eps = 0.01
    assert np.abs(expected).max() > 1
    assert not np.allclose(found, np.roll(expected, 1), rtol=2e-3, atol=2e-2)


def test_both_sides_draw_a_two_point_clients_seeds() -> None:
    """From the head alone; other ones for every client, round and attempt."""
    settings = settings_of("table", local_steps=40, two_point_clients=1.0)
    a_server, clients, _ = federation(settings, 3)
    drawn = [tuple(seeds_of(request)) for request in a_server.plan()]
    a_server.absorb([])
    drawn += [tuple(seeds_of(request)) for request in a_server.plan()]
    close(a_server, clients)
    drawn += [tuple(seeds_of(request)) for request in a_server.plan()]
    assert len(set(drawn)) == len(drawn) == 9
    assert all(len(each) == 40 and min(each) >= 0 and max(each) < K for each in drawn)


def test_each_step_is_heard() -> None:
    settings = settings_of("table", local_steps=3)
    a_server, clients, _ = federation(settings)
    heard: list[tuple[int, float]] = []
    (request,) = a_server.plan()
    reply = ChangeReply.decode(clients["client-0"].answer(request.encode(), lambda step, loss: heard.append((step, loss))))
    assert [step for step, _ in heard] == [0, 1, 2]
    assert reply.loss == pytest.approx(np.mean([loss for _, loss in heard]))


def test_requests_for_others_are_refused_before_anything_moves() -> None:
    a_server, clients, bound = federation(settings_of("table"))
    (request,) = a_server.plan()
    before = bound.digest()
    for bad, reason in (
        (replace(request, client="bob").encode(), "request is for client 'bob'; this is 'client-0'"),
        (replace(request, base=bytes(32)).encode(), "request is for base model 0000000000000000"),
        (replace(request, have=1).encode(), "has 0 pages, the request builds on 1"),
        (replace(request, digest=bytes(32)).encode(), "has other pages than the request builds on"),
        (b"junk", "expected"),
    ):
        with pytest.raises(ProtocolError, match=reason):
            clients["client-0"].answer(bad)
    assert bound.digest() == before
    assert clients["client-0"].pages == ()


# --- Steps that fail ---


class Failing(Quadratic):
    """A quadratic whose loss or backward pass fails in some steps."""

    def __init__(self, model: torch.nn.Module, how: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        super().__init__(model)
        self.how = how

    def differentiable_loss(self, records: NDArray[np.int64]) -> torch.Tensor:
        return self.how(len(self.asked), super().differentiable_loss(records))


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("no kernel for\nthis backward pass")


def stepped(how: Callable[[int, torch.Tensor], torch.Tensor], **changes: Any) -> tuple[ChangeReply, fk.Binding]:
    settings = settings_of("table", local_steps=4, batch_size=2, **changes)
    a_server, clients, bound = federation(settings, {"a": lambda model: Failing(model, how)})
    (request,) = a_server.plan()
    return ChangeReply.decode(clients["a"].answer(request.encode())), bound


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_whose_loss_is_not_finite_is_dropped(bad: float, optimizer: str) -> None:
    """The reply is that of the other steps: neither the numbers nor the optimiser have seen it."""
    reply, _ = stepped(lambda count, loss: loss + bad if count == 1 else loss, local_optimizer=optimizer)
    whole, _ = stepped(lambda count, loss: loss, local_optimizer=optimizer)
    assert (reply.dropped, whole.dropped) == ((1,), ())
    assert np.isfinite(reply.numbers.decode(K)).all()
    assert reply.numbers.decode(K).any()
    assert reply.numbers != whole.numbers
    assert reply.loss is not None
    all_dropped, _ = stepped(lambda count, loss: loss * bad)
    assert all_dropped.dropped == (0, 1, 2, 3)
    assert all_dropped.loss is None
    assert not all_dropped.numbers.decode(K).any()


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bad: float) -> torch.Tensor:
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] * ctx.bad, None


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_whose_gradient_is_not_finite_is_dropped(bad: float, optimizer: str) -> None:
    """Also where the optimiser would make a finite step of it, as `sign` does of infinity."""

    def how(count: int, loss: torch.Tensor) -> torch.Tensor:
        return BadGradient.apply(loss, bad) if count in (0, 3) else loss  # type: ignore[no-any-return, no-untyped-call]

    reply, _ = stepped(how, local_optimizer=optimizer)
    assert reply.dropped == (0, 3)
    assert np.isfinite(reply.numbers.decode(K)).all()


@pytest.mark.parametrize("lr", [1e31, 1e37])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_step_beyond_what_can_be_sent_is_dropped(lr: float, optimizer: str) -> None:
    """A rate that is far too high costs the steps, not the run."""
    reply, _ = stepped(lambda count, loss: loss, lr=lr, local_optimizer=optimizer)
    assert np.abs(reply.numbers.decode(K)).max() <= LARGEST
    assert reply.dropped


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gradient_steps_by_hand(optimizer: str) -> None:
    """numbers <- numbers + step(T): the weights are rebuilt for every gradient, and left where the steps have led."""
    model = quadratic_model()
    pool = fk.SeedPool(3, K)
    bound, task = fk.bind(model, pool), Quadratic(model)
    start = 0.01 * np.random.default_rng(0).standard_normal(K)
    chosen, lr = OPTIMIZERS[optimizer], 0.02
    state = chosen.start(K)
    steps = gradient_steps(
        bound, start, "table", 3,
        lambda t: folded_gradient(bound, "table", lambda: task.differentiable_loss(np.array([t]))), chosen, lr,
    )  # fmt: skip
    z, w0, x = directions(pool, "table"), flat(quadratic_model()), start.copy()
    losses = []
    for t in range(3):
        w = w0 + z @ x
        losses.append(float((task.h.numpy() * (w - task.targets[t].numpy()) ** 2).sum() / 2))
        change, state = chosen.step(z.T @ task.gradient(w, [t]), lr, state)
        x = x + change
    np.testing.assert_allclose(steps.change, x - start, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(steps.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(flat(model), w0 + z @ x, atol=1e-5)
    assert steps.dropped == ()
    assert start.tolist() == (0.01 * np.random.default_rng(0).standard_normal(K)).tolist()


@pytest.mark.parametrize("when", [0, 2])
@pytest.mark.parametrize("error", ["kernel", "detached"])
def test_a_model_whose_backward_fails_answers_with_two_points_and_says_so(
    when: int, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    """In its first step or later: the scalars of one that was asked for them, whatever had come of the gradients so far."""

    def how(count: int, loss: torch.Tensor) -> torch.Tensor:
        if count < when or not loss.requires_grad:
            return loss
        return loss.detach() if error == "detached" else NoBackward.apply(loss)  # type: ignore[no-any-return, no-untyped-call]

    with caplog.at_level(logging.WARNING):
        reply, bound = stepped(how, eps=0.01)
    (record,) = caplog.records
    assert "a cannot backpropagate (" in record.getMessage()
    assert "it answers with two-point steps" in record.getMessage()
    asked, _ = stepped(lambda count, loss: loss, eps=0.01, two_point_clients=1.0)
    assert (reply.kind, reply) == (SCALARS, asked)
    assert all(x.grad is None for x in bound.model.parameters())


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_a_caller_without_gradients_gets_gradient_steps(around: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Else every client would answer with two-point steps."""
    a_server, clients, _ = federation(settings_of("table", local_steps=4, batch_size=2), {"a": Quadratic})
    (request,) = a_server.plan()
    asked = clients["a"].answer(request.encode())
    with around():
        assert clients["a"].answer(request.encode()) == asked
    assert ChangeReply.decode(asked).kind == CHANGE
    assert not caplog.records


def test_records_that_were_made_for_inference_are_answered_with_two_points(caplog: pytest.LogCaptureFixture) -> None:
    a_server, clients, _ = federation(
        settings_of("table", local_steps=4, batch_size=2, local_optimizer="sgd"), {"a": Quadratic}
    )
    (request,) = a_server.plan()
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        task: Any = clients["a"].task
        task.h = task.h.clone()
        answered = ChangeReply.decode(clients["a"].answer(request.encode()))
    assert answered.kind == SCALARS
    assert "a cannot backpropagate (its records or weights were made inside torch.inference_mode())" in caplog.text


class Broken(torch.autograd.Function):
    """Raises in its backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, error: Exception) -> torch.Tensor:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise ctx.error


@pytest.mark.parametrize("error", [KeyError("a bug"), RuntimeError("a bug"), NotImplementedError("a bug")], ids=repr)
def test_other_errors_are_not_hidden(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    """Of the loss itself whatever it is, of its backward pass all but that there is none."""

    def how(count: int, loss: torch.Tensor) -> torch.Tensor:
        raise error

    def backward(count: int, loss: torch.Tensor) -> torch.Tensor:
        return Broken.apply(loss, error)  # type: ignore[no-any-return, no-untyped-call]

    with pytest.raises(type(error), match="a bug"):
        stepped(how)
    if not isinstance(error, NotImplementedError):
        with pytest.raises(type(error), match="a bug"):
            stepped(backward)
    assert not caplog.records


ON_A_CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory"), RuntimeError(ON_A_CPU), MemoryError()],
    ids=["GPU", "CPU", "Python"],
)
def test_want_of_memory_is_said_with_what_helps(where: str, error: Exception) -> None:

    def how(count: int, loss: torch.Tensor) -> torch.Tensor:
        if where == "forward":
            raise error
        return Broken.apply(loss, error)  # type: ignore[no-any-return, no-untyped-call]

    with pytest.raises(ModelError, match=r"^a: no memory for a gradient \(.*\); --checkpointing on needs less"):
        stepped(how)


# --- Frozen and tied weights ---


def test_frozen_weights_stay_and_tied_ones_count_once() -> None:
    shared = torch.nn.Parameter(torch.full((30,), 0.5))
    model = laws.module_of(
        {"a": shared, "b.tied": shared, "c": torch.nn.Parameter(torch.ones(10))}, frozen=("c",), backend="cpu"
    )

    class Task:
        num_examples = 4

        def differentiable_loss(self, records: NDArray[np.int64]) -> torch.Tensor:
            named = dict(model.named_parameters(remove_duplicate=False))
            return ((named["a"] + named["b.tied"]).double() ** 2).sum() + (named["c"].double() ** 2).sum()

        def loss(self, records: NDArray[np.int64]) -> float:
            return float(self.differentiable_loss(records).item())

    settings = settings_of("table", lr=1e-3)
    bound = fk.bind(model, new_page(settings, 0).pool)
    one = ChangeClient("a", bound, bound.identity(), Task())
    a_server = ChangeServer(settings, bound.identity(), ["a"])
    close(a_server, {"a": one})
    sign, bucket = laws.signs_and_buckets(bound.pool.key, K, "a", 30)
    z = (1.0 - 2 * sign)[:, None] * (bucket[:, None] == np.arange(K))
    expected = -1e-3 * z.T @ np.full(30, 2 * (0.5 + 0.5) * 2)  # d (2 a)^2 / d a, through both names
    np.testing.assert_allclose(a_server.ledger.pages[0].numbers(), expected, rtol=1e-6, atol=1e-12)
    assert (dict(model.named_parameters())["c"] == 1).all()
