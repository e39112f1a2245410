"""Clients that hide their records, or themselves: what moves by how much, what is told, what a run without noise does."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.support.changes import Quadratic, config, federation
from tests.support.entropy import Bytes
from tests.support.private import chosen

import fedkseed as fk
from fedkseed.federation import FederationConfig
from fedkseed.kseed.change_client import ChangeClient
from fedkseed.kseed.change_messages import CHANGE, SCALARS, ChangeReply, ChangeRequest
from fedkseed.kseed.client import Client
from fedkseed.kseed.messages import TrainReply, TrainRequest
from fedkseed.kseed.private_steps import private_steps
from fedkseed.kseed.server import Server, start
from fedkseed.kseed.steps import StepSettings
from fedkseed.privacy import Mechanism, Privacy

F64 = NDArray[np.float64]
Unit = Any


def scalar_client(task: Any = None, privacy: Any = None, **changes: Any) -> tuple[Client, TrainRequest, Any]:
    """A client of FedKSeed over quadratics, and a request for it."""
    from tests.support.changes import quadratic_model

    chosen_config = FederationConfig(
        **{"lr": 1e-3, "eps": 1e-2, "num_seeds": 64, "local_steps": 3, "batch_size": 4, "fraction_train": 1, "wire": "float32"}
        | changes
    )
    model = quadratic_model()
    bound = fk.bind(model, fk.SeedPool(0, 1))
    base = bound.identity()
    bound = fk.bind(model, start(chosen_config, base).pool)
    task = task(model) if task else Quadratic(model)
    (request,) = Server(chosen_config, base, ["a"]).plan()
    return Client("a", bound, base, task, privacy), request, task


def scalars(client: Client, request: TrainRequest) -> F64:
    return TrainReply.decode(client.answer(request.encode())).projected_grads.unpack().astype(np.float64)


def change_client(privacy: Any = None, **changes: Any) -> tuple[ChangeClient, ChangeRequest]:
    """A client of FedKSeed-grad over quadratics, and a request for it."""
    server, clients, _ = federation(config(**{"lr": 1e-3, "batch_size": 4} | changes))
    (client,) = clients.values()
    client.privacy = privacy
    (request,) = server.plan()
    return client, request


def numbers(client: ChangeClient, request: ChangeRequest) -> F64:
    client.pages = ()
    reply = ChangeReply.decode(client.answer(request.encode()))
    return reply.numbers.decode(request.size if reply.kind == CHANGE else reply.steps)


# --- Without noise, with all records and room for all of them, it is the ordinary step ---


@pytest.mark.parametrize("directions", [1, 3])
def test_two_point_steps_are_the_ordinary_ones_with_all_records(directions: int) -> None:
    """The mean over records of each one's slope; weights within a few float32 roundings of the ordinary moves."""
    private, request, task = scalar_client(privacy=chosen("record", 300.0), batch_size=12, directions=directions)
    ordinary, _, _ = scalar_client(batch_size=12, directions=directions)
    found, wanted = scalars(private, request), scalars(ordinary, request)
    assert len(found) == 3 * directions
    assert np.abs(found - wanted).max() < 5e-3 * np.abs(wanted).max()
    assert task.asked[0] == [0]
    assert not np.abs(scalars(scalar_client(privacy=chosen("record", 1e-3), batch_size=12)[0], request) - wanted).max() < 0.1


def test_gradient_steps_are_the_ordinary_ones_with_all_records() -> None:
    changes: dict[str, Any] = {"batch_size": 6, "local_steps": 3, "local_optimizer": "adam"}
    wanted = numbers(*change_client(**changes))
    found = numbers(*change_client(chosen("record", 300.0), **changes))
    assert np.abs(found - wanted).max() < 1e-2 * np.abs(wanted).max()
    assert np.abs(wanted).max() > 1e-3


# --- One record moves what leaves by at most the bound ---


class Toy:
    """A single weight for each seed; records are rows of slopes, so that each is known."""

    def __init__(self, size: int) -> None:
        self.w = np.zeros(size)

    def move(self, indices: Any, amounts: Any) -> None:
        np.add.at(self.w, list(indices), list(amounts))


ROWS = st.lists(st.lists(st.floats(-1e3, 1e3) | st.sampled_from([np.inf, np.nan, 1e300]), min_size=4, max_size=4), max_size=6)
CLIP, BATCH = 2.0, 4


def released(rows: list[list[float]], directions: int, batch: list[int], clip_norm: float = CLIP) -> F64:
    """One step of the records at these places, without noise."""
    toy = Toy(4)

    def loss(step: int, record: int) -> float:
        with np.errstate(all="ignore"):
            return float(np.dot(np.array(rows[record]), toy.w))

    batches: Iterator[NDArray[np.int64]] = iter([np.array(batch, np.int64)])
    step_settings = StepSettings(lr=0.1, eps=0.25, max_grad=1e30, directions=directions)
    steps = private_steps(toy, list(range(directions)), batches, loss, step_settings, Mechanism(clip_norm, 0.0, Bytes()), BATCH)
    assert steps.dropped == ()
    assert np.isnan(steps.losses).all()
    return steps.projected_grads.astype(np.float64)


@given(ROWS, st.lists(st.floats(-1e3, 1e3), min_size=4, max_size=4), st.sampled_from([1, 4]))
@settings(max_examples=60)
def test_any_record_moves_a_steps_scalars_by_at_most_the_bound(
    rows: list[list[float]], one: list[float], directions: int
) -> None:
    """As a whole, whatever it is and however many directions there are; rounding to float32 comes after."""
    here, there = list(range(len(rows))), list(range(len(rows) + 1))
    moved = released([*rows, one], directions, there) - released([*rows, one], directions, here)
    assert np.linalg.norm(moved) <= CLIP / BATCH * (1 + 1e-6) + 1e-6
    for i in range(len(rows)):
        moved = released([*rows[:i], one, *rows[i + 1 :]], directions, here) - released(rows, directions, here)
        assert np.linalg.norm(moved) <= 2 * CLIP / BATCH * (1 + 1e-6) + 1e-6


def test_clipping_each_direction_by_itself_would_not_keep_the_bound() -> None:
    """The negative control: four slopes, each within the bound, are twice as long as it together."""
    row = [[100.0, 100.0, 100.0, 100.0]]
    each = np.array([released([[x, 0.0, 0.0, 0.0]], 1, [0], CLIP)[0] for x in row[0]])
    assert np.linalg.norm(each) > 1.9 * CLIP / BATCH
    assert np.linalg.norm(released(row, 4, [0])) == pytest.approx(CLIP / BATCH, rel=1e-5)


class Extended(Quadratic):
    """With its last record far away, or something that is no number."""

    far = 1e6

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self.targets[-1] += self.far


class Broken(Extended):
    far = float("nan")


@pytest.mark.parametrize("task", [Extended, Broken])
def test_a_records_gradient_moves_a_clients_change_by_at_most_the_bound(task: type[Quadratic]) -> None:
    """Plain steps at rate 1, all records in the batch: the change is minus the sum over the expected size."""
    found = {}
    for kind in (Quadratic, task):
        server, clients, _ = federation(config(lr=1.0, batch_size=12, wire="float32"), {"a": kind})
        (client,) = clients.values()
        client.privacy = chosen("record", CLIP)
        found[kind] = numbers(client, server.plan()[0])
    apart = np.linalg.norm(found[task] - found[Quadratic])
    assert 0 < apart <= 2 * CLIP / 12 * (1 + 1e-5)
    assert np.linalg.norm(found[Quadratic]) <= CLIP


# --- The unit: what is expected, not what is there ---


def test_batches_of_every_size_count_alike_on_average() -> None:
    """Divided by the expected size, the mean over many batches is the mean over the records; by the actual one it is not."""
    rows = [[float(i), 0.0, 0.0, 0.0] for i in range(1, 9)]
    draw, found, wrong = Bytes("many"), [], []
    from fedkseed.kseed.private_steps import poisson_batches

    batches = poisson_batches(8, 2, draw)
    for _ in range(3000):
        batch = next(batches).tolist()
        total = released(rows, 1, batch, 1e3)[0] * BATCH
        found.append(total / 2)
        wrong.append(total / len(batch) if batch else 0.0)
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - 4.5) < 4 * error
    assert abs(np.mean(wrong) - 4.5) > 4 * error
    assert not released(rows, 1, []).any()  # an empty batch


# --- What is told, and what is not ---


@pytest.mark.parametrize("unit", ["record", "client"])
def test_a_private_reply_tells_nothing_in_clear(unit: Unit) -> None:
    client, request, _ = scalar_client(privacy=chosen(unit, 1.0, 1.0), max_grad=0.5)
    reply = TrainReply.decode(client.answer(request.encode()))
    assert (reply.loss, reply.num_examples, reply.dropped) == (None, 1, ())
    assert np.abs(reply.projected_grads.unpack()).max() <= 0.5  # the server would refuse more
    for changes in ({}, {"two_point_clients": 1.0}):
        change, asked = change_client(chosen(unit, 1.0, 1.0), **changes)
        changed = ChangeReply.decode(change.answer(asked.encode()))
        assert changed.kind == (SCALARS if changes else CHANGE)
        assert (changed.loss, changed.num_examples, changed.dropped) == (None, 1, ())


def test_a_client_that_hides_itself_sends_a_vector_of_bounded_length() -> None:
    client, request, _ = scalar_client(privacy=chosen("client", 0.25))
    assert np.linalg.norm(scalars(client, request)) == pytest.approx(0.25, rel=1e-5)
    change, asked = change_client(chosen("client", 1e-3), lr=0.1)
    assert np.linalg.norm(numbers(change, asked)) == pytest.approx(1e-3, rel=1e-3)
    ordinary, _, _ = scalar_client()
    roomy, _, _ = scalar_client(privacy=chosen("client", 1e4))
    assert np.abs(scalars(roomy, request) - scalars(ordinary, request)).max() < 0.05


@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_the_noise_of_a_reply_is_what_was_chosen(noise: float) -> None:
    """Scalars of one client, less those without noise: the deviation is z C / b."""
    quiet = scalars(*scalar_client(privacy=chosen("client", 2.0))[:2])
    client, request, _ = scalar_client(privacy=chosen("client", 2.0, noise))
    draws = np.concatenate([scalars(client, request) - quiet for _ in range(80)])
    assert np.std(draws) == pytest.approx(2.0 * noise, rel=0.15)
    assert np.std(draws) != pytest.approx(2.0 * noise * 1.5, rel=0.15)


def test_two_answers_to_one_request_have_neither_batches_nor_noise_in_common() -> None:
    """The operating system's bytes: a server that asks twice, or knows the run's seed, can subtract nothing."""
    quiet = Privacy(unit="record", clip_norm=1.0, noise_multiplier=0.0)
    client, request, task = scalar_client(privacy=quiet)
    asked: list[Any] = []
    for _ in range(2):
        scalars(client, request)
        asked.append(task.asked)
        task.asked = []
    assert asked[0] != asked[1]
    noisy, _, _ = scalar_client(privacy=Privacy(unit="client", clip_norm=1.0, noise_multiplier=1.0))
    assert not np.any(scalars(noisy, request) == scalars(noisy, request))
    ordinary, _, _ = scalar_client()
    assert np.array_equal(scalars(ordinary, request), scalars(ordinary, request))


def test_a_record_is_measured_alone() -> None:
    """No loss is asked for of two records together, whose rounding one of them could move."""
    for build in (
        lambda: scalar_client(privacy=chosen("record", 1.0, 1.0))[::2],
        lambda: (change_client(chosen("record", 1.0))[0],),
    ):
        client, *rest = build()
        request = scalar_client()[1] if rest else change_client()[1]
        client.answer(request.encode())
        assert all(len(records) == 1 for records in client.task.asked)
        assert client.task.asked


# --- The server that hides clients ---


def rounds_of(clip_norm: float, noise: float = 0.0, lr: float = 1.0, names: str = "abc", **changes: Any) -> Server:
    from fedkseed.models.identity import BaseIdentity

    settings_ = FederationConfig(
        lr=lr, num_seeds=64, local_steps=4, fraction_train=1, weighting="equal", dp="client", clip_norm=clip_norm,
        noise_multiplier=noise, wire="float32", num_rounds=3, **changes,
    )  # fmt: skip
    server = Server(settings_, BaseIdentity.of({"w": bytes(32)}), list(names))
    server.mechanism = Mechanism(clip_norm, noise, Bytes("server"))
    return server


def play(server: Server, size: Callable[[str], float], silent: str = "") -> F64:
    """A round in which every client sends scalars of one size; the accumulators afterwards."""
    from fedkseed.kseed.rounding import pack

    replies = []
    for request in server.plan():
        if request.client not in silent:
            grads = np.full(len(request.indices), size(request.client))
            packed = pack(grads, "float32", 0)
            replies.append(
                (request.client, TrainReply(**request.head(), num_examples=5, projected_grads=packed, loss=1.0).encode())
            )
    outcome = server.absorb(replies)
    assert outcome.status == "closed"
    for contribution in outcome.contributions:
        assert (contribution.loss, contribution.num_examples, dict(contribution.sizes)) == (None, 1, {})
    assert server.ledger.history is not None
    assert not server.ledger.history.grad_sums.any()  # what single clients sent is not remembered
    assert not server.ledger.history.grad_counts.any()
    return server.ledger.history.accumulators


def test_a_client_moves_a_rounds_mean_by_at_most_its_share_of_the_bound() -> None:
    whole = play(rounds_of(1.0), lambda name: 3.0)
    without = play(rounds_of(1.0), lambda name: 3.0, silent="b")
    attacked = play(rounds_of(1.0), lambda name: 1e3 if name == "b" else 3.0)
    assert np.linalg.norm(whole - without) == pytest.approx(1 / 3, rel=1e-5)
    assert np.linalg.norm(whole - attacked) <= 2 / 3
    loose = play(rounds_of(1e6), lambda name: 3.0) - play(rounds_of(1e6), lambda name: 3.0, silent="b")
    assert np.linalg.norm(loose) > 1  # unclipped, the wrong variant


def test_the_servers_noise_is_where_somebody_was_asked_to_step_and_of_its_deviation() -> None:
    server = rounds_of(2.0, 1.5, names="abcdefgh")
    used = np.unique([index for request in server.plan() for index in request.indices])
    moved = play(server, lambda name: 0.0)
    assert set(np.flatnonzero(moved)) <= set(used.tolist())
    assert np.std(moved[used]) == pytest.approx(2.0 * 1.5 / 8, rel=0.35)


def test_a_server_of_changes_hides_clients_too() -> None:
    private = {"dp": "client", "clip_norm": 0.01, "noise_multiplier": 0.0, "weighting": "equal"}
    found = []
    for tasks in ({"a": Quadratic, "b": Quadratic}, {"a": Quadratic, "b": Extended}):
        server, clients, _ = federation(config(lr=0.1, batch_size=12, **private), tasks)
        server.absorb([(r.client, clients[r.client].answer(r.encode())) for r in server.plan()])
        found.append(server.ledger.state["numbers"])  # type: ignore[index]
    assert 0 < np.linalg.norm(found[0] - found[1]) <= 2 * 0.01 / 2 * (1 + 1e-6)
    assert np.linalg.norm(found[0]) <= 0.01
