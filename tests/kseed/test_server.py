"""The server as a state machine: what it plans, what it makes of replies in any order and of bad ones, and when it stops."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from tests.support.generators import global_states, seed_globally

import fedkseed as fk
from fedkseed.errors import ConfigError, InvalidValueError, LedgerError, ProtocolError, RunError
from fedkseed.federation import FederationConfig, Outcome
from fedkseed.kseed.ledger_format import History
from fedkseed.kseed.messages import TrainReply, TrainRequest, coefficients_digest
from fedkseed.kseed.rounding import PRECISIONS, Precision, pack, rounded
from fedkseed.kseed.server import Server, seed_pool, start
from fedkseed.kseed.steps import GRAD_EXPONENT, StepSettings, local_steps
from fedkseed.models.identity import BaseIdentity
from fedkseed.runs.events import round_event

ALGORITHMS = ("fedkseed", "fedkseed-pro")  # the contract table: every law of the server runs over every row
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
precisions = pytest.mark.parametrize("wire", PRECISIONS)
BASE = BaseIdentity.of({"a": bytes(range(32)), "b": bytes(32)})
CLIENTS = tuple(f"client-{i}" for i in range(10))
K, TAU, LR = 8, 6, 0.5


def config(**changes: Any) -> FederationConfig:
    settings = {"lr": LR, "num_rounds": 5, "fraction_train": 0.5, "local_steps": TAU, "num_seeds": K, "seed": 7}
    settings["aggregator"] = "mean"
    return FederationConfig(**(settings | changes))


def server(clients: Sequence[str] = CLIENTS, **changes: Any) -> Server:
    settings = config(**changes)
    return Server(settings, start(settings, BASE), clients)


def grads_of(request: TrainRequest, count: int | None = None) -> NDArray[np.float32]:
    """Scalars that depend on client, round and attempt, rounded as a client would."""
    seed = [*request.client.encode(), request.server_round, request.attempt]
    values = 10 * np.random.default_rng(seed).standard_normal(len(request.indices) if count is None else count)
    return rounded(values, request.coefficients.precision, GRAD_EXPONENT)


def reply_to(request: TrainRequest, grads: Sequence[float] | None = None, num_examples: int = 5, **changes: Any) -> TrainReply:
    """An honest answer, or one with some fields changed."""
    values = grads_of(request) if grads is None else np.array(grads)
    answer = TrainReply(
        **request.head(),
        num_examples=num_examples,
        projected_grads=pack(values, request.coefficients.precision, GRAD_EXPONENT),
        loss=2.0,
    )
    return replace(answer, **changes)


def sizes(requests: Sequence[TrainRequest]) -> dict[str, int]:
    return {request.client: 3 + 7 * i for i, request in enumerate(requests)}


def honest(requests: Sequence[TrainRequest]) -> list[tuple[str, bytes]]:
    return [(r.client, reply_to(r, num_examples=sizes(requests)[r.client]).encode()) for r in requests]


def play(a_server: Server, rounds: int = 1) -> Outcome:
    for _ in range(rounds):
        outcome = a_server.absorb(honest(a_server.plan()))
        assert outcome.status == "closed"
        assert outcome.refusals == outcome.missing == ()
    return outcome


def encoded(requests: Sequence[TrainRequest]) -> list[bytes]:
    return [request.encode() for request in requests]


def history(ledger: fk.Ledger) -> History:
    assert ledger.history is not None
    return ledger.history


# --- plan ---


@algorithms
@precisions
def test_plan_is_a_function_of_config_and_ledger(algorithm: str, wire: Precision) -> None:
    one, other = (server(algorithm=algorithm, wire=wire) for _ in range(2))
    for _ in range(3):
        planned = encoded(one.plan())
        assert encoded(one.plan()) == planned  # asking twice changes nothing
        resumed = Server(config(algorithm=algorithm, wire=wire), fk.Ledger.decode(one.ledger.encode()), CLIENTS)
        assert encoded(resumed.plan()) == planned
        shuffled = Server(config(algorithm=algorithm, wire=wire), one.ledger, random.Random(1).sample(CLIENTS, 10))
        assert encoded(shuffled.plan()) == planned
        assert encoded(other.plan()) == planned
        play(one), play(other)
    assert one.ledger.digest() == other.ledger.digest()
    assert one.ledger.round == 3


@algorithms
def test_different_rounds_attempts_seeds_and_clients_differ(algorithm: str) -> None:
    plans: dict[str, tuple[TrainRequest, ...]] = {}
    a_server = server(algorithm=algorithm, local_steps=40)
    for attempt in range(3):
        plans[f"attempt {attempt}"] = a_server.plan()
        assert {request.attempt for request in a_server.plan()} == {attempt}
        a_server.absorb([])
    plans["another seed"] = server(algorithm=algorithm, local_steps=40, seed=8).plan()
    later = server(algorithm=algorithm, local_steps=40)
    play(later)
    plans["round 2"] = later.plan()
    drawn = [request.indices for plan in plans.values() for request in plan]
    assert len(drawn) == 25
    assert len(set(drawn)) == 25  # 40 draws of 8: no two alike by chance
    cohorts = [tuple(request.client for request in plan) for plan in plans.values()]
    assert len(set(cohorts)) == 5  # a chance of 252 to 1 each, fixed by the seed
    assert len({plan[0].run_id for plan in plans.values()}) == 2  # one run, but for the other seed


@pytest.mark.parametrize(
    ("count", "fraction", "size"),
    [(1, 0.05, 1), (10, 0.05, 1), (10, 0.15, 1), (10, 0.2, 2), (10, 0.55, 5), (10, 0.99, 9), (10, 1.0, 10), (738, 0.05, 36)],
)
def test_a_cohort_is_the_fraction_of_the_clients_and_at_least_one(count: int, fraction: float, size: int) -> None:
    """max(1, int(m N))"""
    names = [f"c{i}" for i in range(count)]
    requests = server(names, fraction_train=fraction).plan()
    asked = [request.client for request in requests]
    assert len(asked) == size
    assert asked == sorted(set(asked))
    assert set(asked) <= set(names)


def test_every_client_is_drawn_equally_often() -> None:
    settings = config(num_rounds=2000, fraction_train=0.3, local_steps=1, num_seeds=1)
    begin = start(settings, BASE)
    counts = dict.fromkeys(CLIENTS, 0)
    for done in range(600):
        for request in Server(settings, replace(begin, round=done), CLIENTS).plan():
            counts[request.client] += 1
    assert sum(counts.values()) == 1800
    # Without replacement the counts vary less than the chi-square law says: the bound is on the safe side.
    assert chisquare(list(counts.values())).pvalue > 1e-4


@precisions
def test_a_request_says_what_was_decided(wire: Precision) -> None:
    a_server = server(max_grad=123.0, wire=wire, eps=1e-3, batch_size=4, loss_clip=0.5)
    play(a_server)
    for request in a_server.plan():
        assert request.server_round == 2
        assert request.attempt == 0
        assert request.pool == seed_pool(config()) == a_server.ledger.pool
        assert request.base.hex() == BASE.fingerprint
        assert request.coefficients.precision == wire
        assert request.coefficients.unpack().tobytes() == a_server.ledger.coefficients.tobytes()
        assert request.digest == coefficients_digest(a_server.ledger.coefficients)
        assert len(request.indices) == TAU
        assert all(0 <= k < K for k in request.indices)
        assert (request.lr, request.eps, request.batch_size, request.max_grad, request.loss_clip) == (LR, 1e-3, 4, 123, 0.5)


@algorithms
def test_global_generators_are_neither_read_nor_changed(algorithm: str) -> None:
    ledgers = []
    for seed in (1, 2):
        seed_globally(seed)
        before = global_states()
        a_server = server(algorithm=algorithm)
        play(a_server, 2)
        assert global_states() == before
        ledgers.append(a_server.ledger.digest())
    assert ledgers[0] == ledgers[1]


# --- absorb: the sum ---


@dataclass
class Answer:
    """What one client sends in a round, in plain numbers."""

    grads: list[float]
    num_examples: int
    dropped: tuple[int, ...] = ()


def by_formula(
    requests: Sequence[TrainRequest], answers: dict[str, Answer], weighting: str, lr: float
) -> tuple[list[Fraction], list[Fraction], list[int]]:
    """sum_i p_i (sum of g at k), Pro's sums and counts; exact, without the package's code."""
    change, sums, counts = [Fraction(0)] * K, [Fraction(0)] * K, [0] * K
    total = sum(a.num_examples if weighting == "examples" else 1 for a in answers.values())
    for request in requests:
        if request.client not in answers:
            continue
        answer = answers[request.client]
        share = Fraction(answer.num_examples if weighting == "examples" else 1, total)
        for t, grad in enumerate(answer.grads):
            k = request.indices[t]
            if t not in answer.dropped:
                change[k] -= Fraction(lr) * share * Fraction(grad)
                sums[k] += min(abs(Fraction(grad)), 1000)
                counts[k] += 1
    return change, sums, counts


# Sums of shares are powers of two and scalars have few bits, so that float64 holds every intermediate result exactly.
ROUNDS: list[dict[str, Answer]] = [
    {
        "a": Answer([1, -2, 0.5, 4, 1024, -0.25, 8, 3], 3),
        "b": Answer([2, 2, -1, 0, 0.125, 7, -7, 1], 1),
        "c": Answer([-4, 0, 16, 0, 1.5, -2000, 0, 5], 4, dropped=(1, 6)),  # two steps dropped, a zero that is not, one clipped
    },
    {"a": Answer([0.5, -0.5, 1], 2), "c": Answer([4, 4, -1, 2, 2, 2, 2, 2], 2)},  # fewer scalars than steps; b is missing
    {"b": Answer([0.0] * 8, 16, dropped=tuple(range(8)))},  # nothing but dropped steps
]


@algorithms
@precisions
@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_aggregation_by_hand(algorithm: str, wire: Precision, weighting: str) -> None:
    names = ("a", "b", "c")
    rounds = [ROUNDS[0] | {"d": Answer([1.0] * 8, 8)}, *ROUNDS[1:]]  # four clients in round 1, so that 1/4 is exact
    a_server = server((*names, "d"), fraction_train=1.0, weighting=weighting, algorithm=algorithm, wire=wire, local_steps=8)
    expected = [Fraction(0)] * K
    sums, counts = [Fraction(0)] * K, [0] * K
    for answers in rounds:
        requests = a_server.plan()
        assert any(len(set(r.indices)) < len(r.indices) for r in requests)  # repeated indices
        replies = []
        for r in requests:
            if r.client in answers:
                answer = answers[r.client]
                loss = None if len(answer.dropped) == 8 else 2.0
                sent = reply_to(r, answer.grads, answer.num_examples, dropped=answer.dropped, loss=loss)
                replies.append((r.client, sent.encode()))
        outcome = a_server.absorb(replies)
        change, new_sums, new_counts = by_formula(requests, answers, weighting, LR)
        expected = [a + b for a, b in zip(expected, change, strict=True)]
        sums = [a + b for a, b in zip(sums, new_sums, strict=True)]
        counts = [a + b for a, b in zip(counts, new_counts, strict=True)]
        found = history(a_server.ledger)
        assert [Fraction(x) for x in found.accumulators] == expected
        assert [Fraction(x) for x in found.grad_sums] == sums
        assert found.grad_counts.tolist() == counts
        assert outcome.dropped_steps == sum(len(answer.dropped) for answer in answers.values())
        assert outcome.missing == tuple(name for name in (*names, "d") if name not in answers)
        total = sum(a.num_examples if weighting == "examples" else 1 for a in answers.values())
        for c in outcome.contributions:
            size = answers[c.client].num_examples
            assert c.weight == (size if weighting == "examples" else 1) / total
            assert (c.num_examples, c.dropped_steps) == (size, len(answers[c.client].dropped))
    assert any(x != 0 for x in expected)
    assert a_server.ledger.round == 3
    assert a_server.ledger.coefficients.tobytes() == rounded(np.array([float(x) for x in expected]), wire).tobytes()


@algorithms
def test_aggregation_of_any_numbers(algorithm: str) -> None:
    a_server = server(algorithm=algorithm, wire="float32", local_steps=30)
    for _ in range(3):
        before = history(a_server.ledger)
        requests = a_server.plan()
        answers = {r.client: Answer(grads_of(r).tolist(), sizes(requests)[r.client]) for r in requests}
        a_server.absorb(honest(requests))
        change, sums, counts = by_formula(requests, answers, "examples", LR)
        after = history(a_server.ledger)
        assert after.accumulators == pytest.approx(before.accumulators + [float(x) for x in change], rel=1e-12, abs=1e-13)
        assert after.grad_sums == pytest.approx(before.grad_sums + [float(x) for x in sums], rel=1e-12)
        assert (after.grad_counts - before.grad_counts).tolist() == counts


def test_the_first_round_by_paper_and_pencil() -> None:
    """a_k = -0.5 (3/4 of a's scalars at k + 1/4 of b's), with two clients and K = 1."""
    a_server = server(("a", "b"), fraction_train=1.0, num_seeds=1, local_steps=2, wire="float32")
    a, b = a_server.plan()
    a_server.absorb([("b", reply_to(b, [8, -4], 1).encode()), ("a", reply_to(a, [1, 3], 3).encode())])
    assert a_server.ledger.coefficients.tolist() == [-0.5 * (0.75 * 4 + 0.25 * 4)]
    assert history(a_server.ledger).grad_sums.tolist() == [16]
    assert history(a_server.ledger).grad_counts.tolist() == [4]


@algorithms
@precisions
def test_order_of_arrival_does_not_change_a_bit(algorithm: str, wire: Precision) -> None:
    names = [f"client-{i:02}" for i in range(7)]
    begin = server(names, algorithm=algorithm, wire=wire, fraction_train=1.0, local_steps=20)
    play(begin)
    requests = begin.plan()
    replies = honest(requests)
    bad = [("client-03", b"junk"), ("stranger", replies[0][1]), replies[5]]
    rng = random.Random(3)
    digests, outcomes, controls = set(), set(), set()
    for _ in range(200):
        rng.shuffle(replies)
        a_server = Server(begin.config, begin.ledger, names)
        a_server.plan()
        arrived = [*replies, *bad]
        rng.shuffle(arrived)
        outcome = a_server.absorb(iter(arrived))
        outcomes.add(repr(outcome))
        digests.add(a_server.ledger.digest())
        controls.add(in_order_of_arrival(requests, replies))
    assert len(digests) == 1
    assert len(outcomes) == 1
    assert len(controls) > 1  # the negative control: float32, as the replies come


def in_order_of_arrival(requests: Sequence[TrainRequest], replies: Sequence[tuple[str, bytes]]) -> bytes:
    indices = {r.client: list(r.indices) for r in requests}
    a = np.zeros(K, np.float32)
    for name, data in replies:
        np.add.at(a, indices[name], TrainReply.decode(data).projected_grads.unpack() / np.float32(7))
    return a.tobytes()


# --- Schedules ---


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25]),
        ("cosine", [1, 0.8535533905932737, 0.5, 0.1464466094067262]),
    ],
)
def test_requests_carry_the_rate_of_the_schedule_and_it_is_the_one_used(schedule: str, rates: list[float]) -> None:
    a_server = server(schedule=schedule, num_rounds=4, lr=0.01)
    for rate in rates:
        before = history(a_server.ledger).accumulators
        requests = a_server.plan()
        assert {r.lr for r in requests} == {requests[0].lr}
        assert requests[0].lr == pytest.approx(0.01 * rate, rel=1e-12)
        a_server.absorb(honest(requests))
        answers = {r.client: Answer(grads_of(r).tolist(), sizes(requests)[r.client]) for r in requests}
        change, _, _ = by_formula(requests, answers, "examples", requests[0].lr)  # the rate that was sent is the one used
        moved = before + [float(x) for x in change]
        assert history(a_server.ledger).accumulators == pytest.approx(moved, rel=1e-12, abs=1e-15)
    assert a_server.finished


# --- Pro ---


def with_history(settings: FederationConfig, grads: Sequence[Sequence[float]]) -> fk.Ledger:
    """A ledger as after rounds in which seed k had these projected gradients."""
    clipped = [[min(abs(g), 1000.0) for g in column] for column in grads]
    sums, counts = np.array([sum(column) for column in clipped], float), np.array([len(c) for c in clipped])
    return start(settings, BASE).advance(History(np.zeros(len(grads)), sums, counts))


def test_pro_by_hand_through_the_server() -> None:
    """One client, K = 4: its scalars become phi, phi becomes the next round's probabilities."""
    a_server = server(("a",), algorithm="fedkseed-pro", num_seeds=4, local_steps=12, wire="float32", seed=5)
    assert a_server.probabilities().tolist() == [0.25] * 4
    (request,) = a_server.plan()
    script = iter([2.0, -4.0, 5000.0, 1.0, 0.0, -0.5, 3.0, -3000.0, 10.0, 20.0, 1.0, 7.0])
    sent = [next(script) for _ in request.indices]
    a_server.absorb([("a", reply_to(request, sent, dropped=(4,)).encode())])
    phi = []
    for k in range(4):
        entries = [0.0]  # the history starts with one zero
        entries += [min(abs(g), 1000) for t, g in enumerate(sent) if request.indices[t] == k and t != 4]
        phi.append(sum(entries) / len(entries))
    weights = [math.exp((x - min(phi)) / (max(phi) - min(phi))) for x in phi]
    assert a_server.probabilities() == pytest.approx([w / sum(weights) for w in weights], rel=1e-13)
    assert max(phi) > 100  # a clipped one is among them
    assert a_server.probabilities().max() / a_server.probabilities().min() == pytest.approx(math.e, rel=1e-12)


SKEWED = [[1000.0] * 9, [], [500.0] * 4, [1.0], [900.0], [2.0, 2.0], [0.0], [100000.0]]


def test_pro_probabilities_of_a_skewed_history() -> None:
    settings = config(algorithm="fedkseed-pro")
    share = Server(settings, with_history(settings, SKEWED), CLIENTS).probabilities()
    phi = [900, 0, 400, 0.5, 450, 4 / 3, 0, 500]
    weights = [math.exp(x / 900) for x in phi]
    assert share == pytest.approx([w / sum(weights) for w in weights], rel=1e-13)


@pytest.mark.parametrize(("algorithm", "follows"), [("fedkseed-pro", True), ("fedkseed", False)])
def test_draws_follow_the_probabilities(algorithm: str, follows: bool) -> None:
    """With uniform draws as the control. Seeds are fixed: this is no lottery."""
    settings = config(algorithm=algorithm, local_steps=4000, fraction_train=1.0)
    ledger = with_history(settings, SKEWED)
    drawn = np.concatenate([r.indices for r in Server(settings, ledger, CLIENTS).plan()])
    counts = np.bincount(drawn, minlength=K)
    assert counts.sum() == 40_000
    weights = np.exp(np.array([900, 0, 400, 0.5, 450, 4 / 3, 0, 500]) / 900)
    as_pro = chisquare(counts, 40_000 * weights / weights.sum()).pvalue
    as_uniform = chisquare(counts).pvalue
    right, wrong = (as_pro, as_uniform) if follows else (as_uniform, as_pro)
    assert right > 1e-3
    assert wrong < 1e-30


def test_draws_are_independent() -> None:
    settings = config(local_steps=5000, fraction_train=0.1)
    (request,) = Server(settings, start(settings, BASE), CLIENTS).plan()
    pairs = np.bincount(np.array(request.indices[:-1]) * K + np.array(request.indices[1:]), minlength=K * K)
    assert chisquare(pairs).pvalue > 1e-3


def test_uniform_ignores_the_history() -> None:
    settings = config()
    assert Server(settings, with_history(settings, SKEWED), CLIENTS).probabilities().tolist() == [1 / K] * K


# --- Several directions a step ---


@algorithms
def test_several_directions_are_so_many_seeds_a_step_and_each_scalar_counts_at_its_own(algorithm: str) -> None:
    several = server(algorithm=algorithm, directions=3)
    requests = several.plan()
    for request in requests:
        assert (len(request.indices), request.num_steps, request.directions) == (3 * TAU, TAU, 3)
        assert TrainRequest.decode(request.encode()) == request
    grads, dropped = np.arange(1.0, 3 * TAU + 1), (1, 4)
    grads.reshape(TAU, 3)[list(dropped)] = 0
    outcome = several.absorb([(r.client, reply_to(r, grads, dropped=dropped).encode()) for r in requests])
    assert [(c.num_steps, c.dropped_steps) for c in outcome.contributions] == [(TAU, 2)] * len(requests)
    expected, counts = np.zeros(K), np.zeros(K, np.int64)
    kept = np.repeat([t not in dropped for t in range(TAU)], 3)
    for request in requests:
        np.add.at(expected, np.array(request.indices), grads / len(requests))
        np.add.at(counts, np.array(request.indices)[kept], 1)
    assert np.abs(history(several.ledger).accumulators + LR * expected).max() < 1e-12
    assert history(several.ledger).grad_counts.tolist() == counts.tolist()
    rms = np.sqrt(np.mean(grads[kept] ** 2))
    assert [c.sizes["projected_grad_rms"] for c in outcome.contributions] == pytest.approx([rms] * len(requests))


def test_one_direction_is_not_written_out() -> None:
    """So that whoever knows of one only understands it; two are a field more."""
    (one, *_), (two, *_) = server().plan(), server(directions=2).plan()
    assert replace(two, indices=one.indices, directions=1).encode() == one.encode()
    assert len(replace(one, directions=2).encode()) == len(one.encode()) + 1


# --- Refusals ---

COHORT = ("a", "b", "c")


@dataclass(frozen=True)
class Bad:
    """A reply of client c that must be refused, what the reason must say, and under which settings."""

    make: Callable[[TrainRequest], TrainReply | bytes]
    text: str
    sender: str = "c"
    settings: dict[str, Any] = field(default_factory=dict)


def changed_bit(request: TrainRequest) -> bytes:
    data = bytearray(reply_to(request).encode())
    data[0] ^= 1
    return bytes(data)


BAD: dict[str, Bad] = {
    "empty": Bad(lambda r: b"", "not msgpack"),
    "junk": Bad(lambda r: b"\xff\x00 hello", "message is not"),
    "truncated": Bad(lambda r: reply_to(r).encode()[:-1], "not msgpack"),
    "a flipped bit": Bad(changed_bit, "expected"),
    "the request itself": Bad(lambda r: r.encode(), "not a reply"),
    "another version": Bad(lambda r: reply_to(r).encode().replace(b"k!\x01", b"k!\x02"), "version is 2"),
    "huge": Bad(lambda r: bytes(2**20 + 1), "at most 1048576"),
    "another run": Bad(lambda r: reply_to(r, run_id=b"otherrun"), "run_id"),
    "a past round": Bad(lambda r: reply_to(r, server_round=1), "server_round is 1, expected 2"),
    "a future round": Bad(lambda r: reply_to(r, server_round=3), "server_round is 3, expected 2"),
    "another attempt": Bad(lambda r: reply_to(r, attempt=1), "attempt is 1, expected 0"),
    "another client": Bad(lambda r: reply_to(r, client="b"), "client is 'b', expected 'c'"),
    "another base": Bad(lambda r: reply_to(r, base=bytes(32)), "base is '0000000000000000'"),
    "another digest": Bad(lambda r: reply_to(r, digest=bytes(32)), "digest is '0000000000000000'"),
    "too many examples": Bad(
        lambda r: reply_to(r, num_examples=101), "num_examples is 101; at most 100", settings={"max_examples": 100}
    ),
    "more scalars than steps": Bad(lambda r: reply_to(r, [0.5] * (TAU + 1)), f"{TAU + 1} scalars came for {TAU} seeds"),
    "half a step of several directions": Bad(
        lambda r: reply_to(r, [0.5] * 5), "expected whole steps of 2 scalars", settings={"directions": 2}
    ),
    "a dropped step that is none": Bad(
        lambda r: reply_to(r, [0.0] * 2 * TAU, dropped=(TAU,)), f"dropped step is ({TAU},)", settings={"directions": 2}
    ),
    "a dropped step of several directions with a scalar": Bad(
        lambda r: reply_to(r, [0.0] * 5 + [1.0] + [0.0] * 6, dropped=(2,)),
        "dropped step has a projected",
        settings={"directions": 2},
    ),
    "a scalar too large": Bad(lambda r: reply_to(r, [0, -101]), "gradient is 101; at most 100", settings={"max_grad": 100}),
    "another precision": Bad(lambda r: reply_to(r, projected_grads=pack(np.ones(TAU), "float32")), "float32; expected float16"),
    "the other precision": Bad(
        lambda r: reply_to(r, projected_grads=pack(np.ones(TAU), "float16", 0)),
        "float16; expected float32",
        settings={"wire": "float32"},
    ),
    "a dropped step with a scalar": Bad(lambda r: reply_to(r, [1.0] * TAU, dropped=(2,)), "dropped step has a projected"),
    "a scalar beyond what loss_clip allows": Bad(
        lambda r: reply_to(r, [0, -101]), "gradient is 101; at most 100.098", settings={"loss_clip": 2.0, "eps": 0.01}
    ),
    "an exponent": Bad(
        lambda r: reply_to(r, projected_grads=replace(pack(np.ones(TAU), "float16", 0), exponent=3)),
        "exponent is 3; expected 0",
    ),
    "a longer form of a number": Bad(
        lambda r: reply_to(r).encode().replace(b"k!\x01", b"k!\xcc\x01"), "not packed in the shortest form"
    ),
    "a stranger": Bad(lambda r: reply_to(r, client="stranger"), "'stranger' was not asked", sender="stranger"),
    "a stranger with c's reply": Bad(lambda r: reply_to(r), "'x' was not asked", sender="x"),
    "a stranger with junk": Bad(lambda r: b"junk", "message is not", sender="x"),
}


@algorithms
@pytest.mark.parametrize("name", BAD)
def test_a_refused_reply_costs_nothing_else(algorithm: str, name: str) -> None:
    bad = BAD[name]
    settings = config(algorithm=algorithm, fraction_train=1.0, **bad.settings)
    before = server(COHORT, algorithm=algorithm, fraction_train=1.0, **bad.settings)
    play_equal(before)
    with_it, without, honest_server = (Server(settings, before.ledger, COHORT) for _ in range(3))
    a, b, c = with_it.plan()
    good = [("a", reply_to(a).encode()), ("b", reply_to(b).encode())]
    made = bad.make(c)
    data = made if isinstance(made, bytes) else made.encode()
    outcome = with_it.absorb([*good, (bad.sender, data)])
    assert len(outcome.refusals) == 1
    assert outcome.refusals[0].client == bad.sender
    assert bad.text in outcome.refusals[0].reason
    assert "\n" not in outcome.refusals[0].reason
    without.plan()
    expected = without.absorb(good)
    assert with_it.ledger.digest() == without.ledger.digest()
    assert outcome.contributions == expected.contributions
    assert outcome.status == expected.status == "closed"
    assert outcome.missing == (() if bad.sender == "c" else ("c",))
    assert encoded(with_it.plan()) == encoded(without.plan())
    # The control: c's honest reply is accepted, and counts.
    honest_server.plan()
    assert honest_server.absorb([*good, ("c", reply_to(c).encode())]).refusals == ()
    assert honest_server.ledger.digest() != without.ledger.digest()


def play_equal(a_server: Server) -> None:
    assert a_server.absorb([(r.client, reply_to(r).encode()) for r in a_server.plan()]).refusals == ()


@pytest.mark.parametrize("same", [True, False], ids=["the same again", "another"])
def test_a_second_reply_is_refused_and_the_first_counts(same: bool) -> None:
    ledgers = []
    for order in (1, -1):
        a_server = server(COHORT, fraction_train=1.0)
        a, b, c = a_server.plan()
        twice = [("c", reply_to(c).encode()), ("c", (reply_to(c) if same else reply_to(c, [9.0] * TAU)).encode())]
        outcome = a_server.absorb([("b", reply_to(b).encode()), *twice[::order], ("a", reply_to(a).encode())])
        assert [(r.client, r.reason) for r in outcome.refusals] == [("c", "a second reply to one request")]
        assert [x.client for x in outcome.contributions] == ["a", "b", "c"]
        ledgers.append(a_server.ledger.digest())
    assert (ledgers[0] == ledgers[1]) is same
    once = server(COHORT, fraction_train=1.0)
    play_equal(once)
    assert once.ledger.digest() == ledgers[0]


def test_junk_in_front_does_not_shut_a_client_out() -> None:
    for junk in (b"", b"\0", b"\xff" * 9):
        a_server = server(COHORT, fraction_train=1.0)
        requests = a_server.plan()
        outcome = a_server.absorb([("c", junk), *[(r.client, reply_to(r).encode()) for r in requests]])
        assert [r.client for r in outcome.refusals] == ["c"]
        assert [x.client for x in outcome.contributions] == ["a", "b", "c"]


def test_limits_are_inclusive() -> None:
    a_server = server(("a", "b"), max_grad=100, max_examples=50, max_share=0.5, fraction_train=1.0)
    requests = a_server.plan()
    replies = [(r.client, reply_to(r, [100.0, -100.0] * (TAU // 2), 50).encode()) for r in requests]
    outcome = a_server.absorb(replies)
    assert outcome.refusals == ()
    assert [x.weight for x in outcome.contributions] == [0.5, 0.5]


def test_a_client_has_the_records_that_it_came_with() -> None:
    """It says 18 records at first and 1,800 in its reply: it would weigh nearly all of a mean."""
    sizes = {"a": 20, "b": 25, "c": 18}
    said, unsaid = (Server(config(fraction_train=1.0), start(config(), BASE), COHORT, num_examples=n) for n in (sizes, None))
    for a_server, taken in ((said, False), (unsaid, True)):
        replies = [(r.client, reply_to(r, num_examples=sizes[r.client]).encode()) for r in a_server.plan()]
        lie = reply_to(a_server.plan()[2], num_examples=1800).encode()
        outcome = a_server.absorb([*replies[:2], ("c", lie)])
        assert [x.client for x in outcome.contributions] == (["a", "b", "c"] if taken else ["a", "b"])
        reasons = [r.reason for r in outcome.refusals]
        assert reasons == ([] if taken else ["num_examples is 1800; this client came with 18"])


@pytest.mark.parametrize(
    ("loss", "taken"), [(0.0, True), (24.9, True), (None, True), (-0.1, False), (25.1, False), (1e300, False)]
)
def test_a_mean_loss_that_no_model_has_is_refused(loss: float | None, taken: bool) -> None:
    a_server = Server(config(fraction_train=1.0), start(config(), BASE), COHORT, guess_loss=0.0025)
    replies = [(r.client, reply_to(r, loss=loss if r.client == "c" else 2.0).encode()) for r in a_server.plan()]
    outcome = a_server.absorb(replies)
    assert len(outcome.contributions) == (3 if taken else 2)
    assert all("0 to 25 are accepted" in refusal.reason for refusal in outcome.refusals)


def test_nobody_weighs_more_than_the_largest_share() -> None:
    for max_share, expected in ((None, 0.5), (0.3, 0.3), (1.0, 10 / 13)):
        a_server = server("abcd", max_share=max_share, fraction_train=1.0)
        sent = {"a": 10, "b": 1, "c": 1, "d": 1}
        outcome = a_server.absorb([(r.client, reply_to(r, num_examples=sent[r.client]).encode()) for r in a_server.plan()])
        assert outcome.refusals == ()
        assert outcome.contributions[0].weight == expected
        assert sum(x.weight for x in outcome.contributions) == pytest.approx(1)


def test_honest_scalars_within_loss_clip_are_never_refused() -> None:
    """As large as a kept step's can be, and rounded up on the way."""
    for eps in (5e-4, 1e-3, 1 / 3):
        a_server = server(("a",), local_steps=1, eps=eps, loss_clip=0.3)
        (request,) = a_server.plan()
        values = iter([0.3, 0.0])
        settings = StepSettings(1.0, request.eps, request.max_grad, request.loss_clip, "float16")
        steps = local_steps(Still(), request.indices, lambda t, values=values: next(values), settings)
        assert steps.dropped == ()
        assert a_server.absorb([("a", reply_to(request, steps.projected_grads.tolist()).encode())]).refusals == ()


class Still:
    def move(self, indices: Sequence[int], amounts: Sequence[float]) -> None:
        pass


@precisions
@pytest.mark.parametrize("max_grad", [1e4, 10005.0, 0.1, 60000.0, 1 / 3])
def test_no_honest_reply_is_refused_for_its_rounding(wire: Precision, max_grad: float) -> None:
    """A client measures |g| just within max_grad; what it sends is rounded, possibly up."""
    a_server = server(("a",), max_grad=max_grad, local_steps=2, wire=wire)
    (request,) = a_server.plan()
    for grad in (max_grad, np.nextafter(max_grad, 0), max_grad * (1 - 1e-5)):
        values = iter([grad, -grad, -grad, grad])  # with eps = 1 the estimates are grad and -grad
        settings = StepSettings(1.0, 1.0, request.max_grad, None, wire)
        steps = local_steps(Still(), request.indices, lambda t, values=values: next(values), settings)
        sent = reply_to(request, steps.projected_grads.tolist(), dropped=steps.dropped)
        again = Server(a_server.config, a_server.ledger, ("a",))
        again.plan()
        assert again.absorb([("a", sent.encode())]).refusals == ()


# --- Attempts ---


@algorithms
def test_too_few_replies_repeat_with_a_fresh_cohort_and_then_fail(algorithm: str) -> None:
    a_server = server(algorithm=algorithm, min_replies=4)
    play(a_server)
    before, first = a_server.ledger.digest(), a_server.plan()
    cohorts = []
    for attempt, status in enumerate(("repeat", "repeat", "failed")):
        requests = a_server.plan()
        assert {(r.server_round, r.attempt) for r in requests} == {(2, attempt)}
        cohorts.append(tuple(r.client for r in requests))
        replies = honest(requests)
        outcome = a_server.absorb([*replies[:3], (replies[3][0], b"junk")])
        assert (outcome.status, outcome.server_round) == (status, 2)
        assert [x.client for x in outcome.contributions] == [name for name, _ in replies[:3]]
        assert [r.client for r in outcome.refusals] == [replies[3][0]]
        assert outcome.missing == (replies[4][0],)
        assert a_server.ledger.digest() == before
        with pytest.raises(RunError, match="no round is planned"):
            a_server.absorb(replies)
    assert len(set(cohorts)) == 3
    with pytest.raises(RunError, match="round 2 failed 3 times"):
        a_server.plan()
    assert a_server.ledger.digest() == before
    assert not a_server.finished
    # The ledger is everything: another server goes on from it, with the same first attempt.
    resumed = Server(a_server.config, fk.Ledger.decode(a_server.ledger.encode()), CLIENTS)
    assert encoded(resumed.plan()) == encoded(first)


def test_another_attempt_asks_none_that_failed_the_one_before() -> None:
    """One that is silent and one that sends junk do not end a run of four that wants two replies and asks two."""
    for seed in range(40):
        a_server = server("abcd", seed=seed, fraction_train=0.5, min_replies=2)
        before: set[str] = set()
        for _ in range(3):
            requests = a_server.plan()
            asked = {r.client for r in requests}
            assert not asked & before
            outcome = a_server.absorb(
                [(r.client, b"junk" if r.client == "b" else reply_to(r).encode()) for r in requests if r.client != "a"]
            )
            if outcome.status == "closed":
                break
            before |= asked & {"a", "b"}
        assert outcome.status == "closed"
        assert len(a_server.plan()) == 2
    again = server("abcd", fraction_train=1.0, min_replies=4)  # where all are needed, all are asked again
    again.plan()
    again.absorb([])
    assert len(again.plan()) == 4


def test_exactly_min_replies_close_a_round() -> None:
    a_server = server(min_replies=3)
    outcome = a_server.absorb(honest(a_server.plan())[:3])
    assert outcome.status == "closed"
    assert len(outcome.missing) == 2


def test_a_later_attempt_closes_the_round() -> None:
    a_server = server()
    first = a_server.plan()
    assert a_server.absorb([]).status == "repeat"
    second = a_server.plan()
    late = [(r.client, reply_to(r).encode()) for r in first]
    outcome = a_server.absorb(late)  # answers to the attempt before
    assert outcome.status == "repeat"
    asked = {r.client for r in second}
    for refused in outcome.refusals:
        assert ("attempt is 0, expected 1" if refused.client in asked else "was not asked") in refused.reason
    assert len(outcome.refusals) == len(first)
    play(a_server)
    assert a_server.ledger.round == 1
    assert {r.attempt for r in a_server.plan()} == {0}
    assert {r.server_round for r in a_server.plan()} == {2}


def test_absorb_needs_a_plan() -> None:
    a_server = server()
    with pytest.raises(RunError, match=r"call plan\(\)"):
        a_server.absorb([])
    requests = a_server.plan()
    a_server.absorb(honest(requests))
    before = a_server.ledger.digest()
    with pytest.raises(RunError, match=r"call plan\(\)"):
        a_server.absorb(honest(requests))
    assert a_server.ledger.digest() == before


def test_a_finished_run_plans_no_more_and_a_longer_one_goes_on() -> None:
    a_server = server(num_rounds=2)
    play(a_server)
    assert not a_server.finished
    play(a_server)
    assert a_server.finished
    with pytest.raises(RunError, match="all 2 rounds are done; raise --num-rounds"):
        a_server.plan()
    longer = Server(config(num_rounds=3), a_server.ledger, CLIENTS)
    straight = server(num_rounds=3)
    play(longer), play(straight, 3)
    assert longer.ledger.digest() == straight.ledger.digest()


# --- Refused from the start ---


@pytest.mark.parametrize("ledger", ["ledger.safetensors", None, fk.bind(torch.nn.Linear(2, 2), fk.SeedPool(0, 8))])
def test_what_is_no_ledger_is_not_gone_on_from(ledger: Any) -> None:
    says = r"^ledger is a (str|NoneType|Binding); expected a Ledger \(Ledger.load\(file\)\), or the base's identity"
    with pytest.raises(InvalidValueError, match=says):
        Server(config(), ledger, CLIENTS)


@pytest.mark.parametrize("guess", [0, -1.0, float("nan"), float("inf"), "2.0", True])
def test_a_loss_of_a_guess_that_is_none_is_refused(guess: Any) -> None:
    with pytest.raises(InvalidValueError, match=r"^guess_loss is .*; expected a finite number above 0, or None$"):
        Server(config(), start(config(), BASE), CLIENTS, guess_loss=guess)


def test_a_published_ledger_cannot_go_on() -> None:
    with pytest.raises(LedgerError, match="published ledger"):
        Server(config(), start(config(), BASE).published(), CLIENTS)


@pytest.mark.parametrize("changes", [{"seed": 8}, {"num_seeds": 16}, {"noise": "gaussian"}, {"wire": "float32"}], ids=str)
def test_a_ledger_of_other_settings_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(LedgerError, match="settings"):
        Server(config(**changes), start(config(), BASE), CLIENTS)


@pytest.mark.parametrize(
    ("names", "settings", "text"),
    [
        (("a", "b", "a"), {}, "same name"),
        ((), {}, "0 clients"),
        (CLIENTS, {"min_replies": 6}, "asks 5 of 10 clients, too few for min_replies = 6"),
        (CLIENTS, {"secure_sums": "on", "fraction_train": 0.2}, "asks 2 of 10 clients, and a secure sum hides nobody among"),
        (("a",), {"min_replies": 2, "fraction_train": 1.0}, "asks 1 of 1 clients"),
    ],
)
def test_clients_too_few_or_twice_are_refused(names: Sequence[str], settings: dict[str, Any], text: str) -> None:
    with pytest.raises(RunError, match=text):
        server(names, **settings)


@pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "\0"])
def test_names_that_do_not_travel_are_refused(name: str) -> None:
    with pytest.raises(ProtocolError, match="client name"):
        server(("a", name))


def pro_history(a_server: Server, rounds: int, clip: float) -> tuple[list[float], list[int]]:
    """What each seed's sum of clipped |g| and count should be, from the requests and the replies one by one."""
    sums, counts = [0.0] * K, [0] * K
    for _ in range(rounds):
        requests = a_server.plan()
        for request in requests:
            for index, grad in zip(request.indices, grads_of(request).tolist(), strict=True):
                sums[index] += min(abs(grad), clip)
                counts[index] += 1
        assert a_server.absorb(honest(requests)).status == "closed"
    return sums, counts


@pytest.mark.parametrize("clip", [3.0, 1000.0])
@pytest.mark.parametrize("begin", [0.0, 2.0])
def test_importances_clip_and_start_as_set(clip: float, begin: float) -> None:
    settings = {"algorithm": "fedkseed-pro", "importance_clip": clip, "importance_start": begin}
    a_server = server(**settings)
    sums, counts = pro_history(a_server, 3, clip)
    phi = [(begin + total) / (1 + count) for total, count in zip(sums, counts, strict=True)]
    weights = [math.exp((x - min(phi)) / (max(phi) - min(phi))) for x in phi]
    assert a_server.probabilities() == pytest.approx([w / sum(weights) for w in weights], rel=1e-9)
    assert history(a_server.ledger).grad_sums.tolist() == pytest.approx(sums)
    unclipped, _ = pro_history(server(**settings), 1, 1e9)
    assert (clip == 3.0) == (pro_history(server(**settings), 1, clip)[0] != unclipped)  # it bites


def test_clipping_an_importance_clips_no_step() -> None:
    free, clipped = (server(algorithm="fedkseed", importance_clip=clip) for clip in (1e9, 0.5))
    play(free), play(clipped)
    assert history(free.ledger).accumulators.tolist() == history(clipped.ledger).accumulators.tolist()
    assert history(free.ledger).grad_sums.tolist() != history(clipped.ledger).grad_sums.tolist()


# --- Epochs ---


def by_epochs(sizes: dict[str, int], **changes: Any) -> Server:
    settings = config(local_unit="epochs", fraction_train=1.0, **changes)
    return Server(settings, start(settings, BASE), list(sizes), num_examples=sizes)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("epochs", [1, 3])
def test_epochs_are_steps_through_a_clients_own_records(batch_size: int, epochs: int) -> None:
    sizes = {"a": 1, "b": 6, "c": 7, "d": 8}
    asked = {r.client: len(r.indices) for r in by_epochs(sizes, local_steps=epochs, batch_size=batch_size).plan()}
    assert asked == {name: epochs * len(range(0, n, batch_size)) for name, n in sizes.items()}


def test_steps_are_steps_whatever_a_client_holds() -> None:
    settings = config(fraction_train=1.0)
    planned = Server(settings, start(settings, BASE), CLIENTS, num_examples=dict.fromkeys(CLIENTS, 3)).plan()
    assert {len(request.indices) for request in planned} == {TAU}


def test_epochs_of_unlike_clients_close_a_round() -> None:
    sizes = {"a": 1, "b": 30}
    a_server = by_epochs(sizes, batch_size=4)
    for _ in range(2):
        requests = a_server.plan()
        outcome = a_server.absorb([(r.client, reply_to(r, num_examples=sizes[r.client]).encode()) for r in requests])
        assert outcome.refusals == ()
    assert [c.client for c in outcome.contributions] == ["a", "b"]


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        (
            {"a": 1, "b": 0},
            {},
            r"6 epochs of client 'b' are 0 steps; expected 1 to 65535, so lower --local-steps or raise --ba",
        ),
        ({"a": 65536}, {"local_steps": 1}, r"1 epochs of client 'a' are 65536 steps; expected 1 to 65535"),
        ({"a": 40_000}, {"local_steps": 2}, r"2 epochs of client 'a' are 80000 steps"),
    ],
)
def test_epochs_of_no_or_too_many_steps_are_refused(sizes: dict[str, int], changes: dict[str, int], message: str) -> None:
    with pytest.raises(RunError, match=message):
        by_epochs(sizes, **changes)
    assert len(by_epochs({"a": 65_535}, local_steps=1).plan()[0].indices) == 65_535


@pytest.mark.parametrize("known", [None, {"a": 3}])
def test_epochs_need_to_know_how_many_records_a_client_has(known: dict[str, int] | None) -> None:
    settings = config(local_unit="epochs")
    with pytest.raises(RunError, match=r"local_unit is epochs and client 'b' has not said how many records it has; use steps"):
        Server(settings, start(settings, BASE), ["b"], num_examples=known)


# --- how large what came is ---


def test_the_size_of_the_scalars_is_told_of_each_client_without_dropped_steps() -> None:
    a_server = server(clients=CLIENTS[:3], fraction_train=1.0, local_steps=4)
    first, second, third = a_server.plan()
    outcome = a_server.absorb(
        [
            (first.client, reply_to(first, [3.0, -4.0, 0.0, 0.0], dropped=(2,)).encode()),
            (second.client, reply_to(second, [-7.0, 7.0, 7.0, -7.0]).encode()),
            (third.client, reply_to(third, [0.0] * 4, dropped=(0, 1, 2, 3), loss=None).encode()),
        ]
    )
    found = [contribution.sizes for contribution in outcome.contributions]
    assert found == [{"projected_grad_rms": pytest.approx(math.sqrt(25 / 3))}, {"projected_grad_rms": 7.0}, {}]
    event = round_event(outcome, LR)
    assert event["projected_grad_rms"] == pytest.approx(math.sqrt((25 + 4 * 49) / 7))  # over all steps that count
    assert event["clients"][second.client]["projected_grad_rms"] == 7.0
    assert "change_norm" not in event


# --- Hostile scalars within the limits ---


def robust(**changes: Any) -> Server:
    return server(**{"aggregator": "clipped", "fraction_train": 1.0, "local_steps": 8, "num_seeds": 64} | changes)


def told(a_server: Server, hostile: dict[str, Callable[[NDArray[np.float32]], Any]]) -> Outcome:
    """A round in which some clients change what they would send."""
    replies = []
    for request in a_server.plan():
        grads = hostile.get(request.client, np.asarray)(grads_of(request))
        replies.append((request.client, reply_to(request, grads).encode()))
    return a_server.absorb(replies)


def norm(a_server: Server) -> float:
    return float(np.linalg.norm(history(a_server.ledger).accumulators))


def limit_once(grads: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.array([9999, *grads[1:]], np.float32)


LIES = {"all": lambda g: np.full(len(g), 9999.0), "one": limit_once, "times -10": lambda g: -10 * g}


@algorithms
@pytest.mark.parametrize("lie", LIES)
def test_one_of_ten_does_not_carry_the_numbers_away(algorithm: str, lie: str) -> None:
    """Nor how likely seeds are; the mean is the control."""
    honest, found, control = (robust(algorithm=algorithm, aggregator=rule) for rule in ("clipped", "clipped", "mean"))
    told(honest, {})
    for a_server in (found, control):
        outcome = told(a_server, {"client-3": LIES[lie]})
        assert outcome.refusals == ()
        named = {c.client: c.sizes for c in outcome.contributions}
        if a_server is found:
            assert named["client-3"]["counted"] < min(0.5, *(named[name]["counted"] for name in CLIENTS if name != "client-3"))
            assert named["client-3"]["clipped_scalars"] == {"all": 8, "one": 1}.get(lie, named["client-3"]["clipped_scalars"])
            assert sum(sizes["clipped_scalars"] for name, sizes in named.items() if name != "client-3") == 0
        else:
            assert "counted" not in named["client-3"]
    assert norm(found) < 1.3 * norm(honest)
    assert norm(control) > 1.5 * norm(honest)
    assert history(found.ledger).grad_sums.max() < 6 * history(honest.ledger).grad_sums.max()


def test_scalars_within_a_loss_clip_need_no_scale() -> None:
    a_server = robust(loss_clip=0.1)
    assert [c.sizes["clipped_scalars"] for c in told(a_server, {}).contributions] == [0] * 10
    assert history(a_server.ledger).grad_scales.size == 0


def test_the_scale_is_in_the_ledger_so_that_a_resume_is_exact() -> None:
    straight, resumed = robust(), robust()
    for i in range(4):
        for a_server in (straight, resumed):
            told(a_server, {"client-1": LIES["times -10"], "client-2": limit_once})
        assert len(history(straight.ledger).grad_scales) == 10 * (i + 1)
        resumed = Server(resumed.config, fk.Ledger.decode(resumed.ledger.encode()), CLIENTS)
    assert straight.ledger.encode() == resumed.ledger.encode()
    bare = replace(straight.ledger, history=replace(history(straight.ledger), grad_scales=np.zeros(0)))  # the control
    forgetful = Server(straight.config, bare, CLIENTS)
    for a_server in (straight, forgetful):
        told(a_server, {"client-2": limit_once})
    assert history(straight.ledger).grad_scales.size > history(forgetful.ledger).grad_scales.size


def test_a_run_of_means_keeps_no_scale() -> None:
    a_server = robust(aggregator="mean")
    told(a_server, {})
    assert history(fk.Ledger.decode(a_server.ledger.encode())).grad_scales.size == 0
    assert b"grad_scales" not in a_server.ledger.encode()


@pytest.mark.parametrize("scales", [[-1.0], [0.0], [np.nan], [1.0] * 65537], ids=["negative", "zero", "nan", "many"])
def test_a_ledger_with_impossible_scales_is_damaged(scales: list[float]) -> None:
    ledger = robust().ledger
    bad = replace(ledger, history=replace(history(ledger), grad_scales=np.array(scales)))
    with pytest.raises(LedgerError, match="ledger is damaged"):
        fk.Ledger.decode(bad.encode())


def test_of_a_very_large_cohort_the_ledger_keeps_as_many_words_as_it_can_be_read_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the round itself all of them count."""
    monkeypatch.setattr("fedkseed.kseed.server.MAX_SCALES", 3)
    a_server, whole = robust(), robust()
    told(a_server, {})
    monkeypatch.undo()
    told(whole, {})
    kept = history(a_server.ledger).grad_scales
    assert kept.tolist() == history(whole.ledger).grad_scales.tolist()[-3:]
    np.testing.assert_array_equal(a_server.ledger.coefficients, whole.ledger.coefficients)


# --- Shared seeds ---


@algorithms
def test_with_shared_seeds_all_clients_of_a_round_step_along_the_same(algorithm: str) -> None:
    a_server = robust(algorithm=algorithm, shared_seeds="on", aggregator="median")
    drawn = []
    for _ in range(3):
        requests = a_server.plan()
        assert len({request.indices for request in requests}) == 1
        drawn.append(requests[0].indices)
        play(a_server)
    a_server.plan()
    a_server.absorb([])
    drawn.append(a_server.plan()[0].indices)
    assert len(set(drawn)) == 4  # a round's own, and an attempt's
    assert len({request.indices for request in robust(algorithm=algorithm).plan()}) == 10  # the control


def test_with_shared_seeds_fewer_steps_are_the_first_ones() -> None:
    settings = config(aggregator="median", shared_seeds="on", local_unit="epochs", local_steps=1, fraction_train=1.0)
    sizes = {"a": 3, "b": 9, "c": 5}
    a, b, c = Server(settings, start(settings, BASE), list(sizes), num_examples=sizes).plan()
    assert (len(a.indices), len(b.indices), len(c.indices)) == (3, 9, 5)
    assert a.indices == b.indices[:3]
    assert c.indices == b.indices[:5]


@pytest.mark.parametrize("rule", ["trimmed-mean", "median", "krum"])
def test_rules_on_shared_seeds_by_hand(rule: str) -> None:
    """Nine clients that say 1, 2, ... 8 and one that says -100 times that: all but the mean give what the nine say."""
    truth = np.arange(1.0, 9)
    found = []
    for name in (rule, "mean"):
        a_server = robust(aggregator=name, shared_seeds="on", weighting="equal")
        indices = np.array(a_server.plan()[0].indices)
        told(a_server, {client: lambda g: truth for client in CLIENTS} | {"client-0": lambda g: -100 * truth})
        expected = np.zeros(64)
        np.add.at(expected, indices, -LR * truth)
        found.append(bool(np.allclose(history(a_server.ledger).accumulators, expected)))
    assert found == [True, False]


def test_settings_of_another_algorithm_are_refused() -> None:
    """They would be a federation of scalars without a word."""
    with pytest.raises(ConfigError, match=r"^algorithm is 'fedkseed-grad', whose clients send changes; this server adds up sc"):
        Server(FederationConfig(lr=1, algorithm="fedkseed-grad"), BASE, CLIENTS)
