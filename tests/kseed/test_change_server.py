"""The server of changes: what it sends to whom, what it makes of replies and of bad ones, and that it loses nothing."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.support.changes import BASE, config, honest, numbers_of, play, reply_to, server

import fedkseed as fk
from fedkseed.errors import LedgerError, ProtocolError
from fedkseed.federation.aggregators import AGGREGATORS
from fedkseed.federation.optimizer import OPTIMIZERS
from fedkseed.kseed.change_client import patched
from fedkseed.kseed.change_messages import SCALARS, ChangeReply, ChangeRequest
from fedkseed.kseed.change_server import ChangeServer, new_page
from fedkseed.kseed.changes import combined
from fedkseed.kseed.coding import BITS, Coded, encode
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.pages import Page, is_replaced, pages_digest
from fedkseed.kseed.server import Server
from fedkseed.kseed.server import start as start_of_scalars
from fedkseed.runs.events import round_event

F64 = NDArray[np.float64]
wires = pytest.mark.parametrize("wire", BITS)
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)
K = 128


def scalars_to(request: ChangeRequest, grads: Any = None, **changes: Any) -> ChangeReply:
    """A two-point client's answer."""
    values = np.arange(1.0, request.steps + 1) if grads is None else np.array(grads, float)
    packed = np.asarray(values, "<f2").tobytes()
    return reply_to(request, **{"kind": SCALARS, "numbers": Coded("float16", 1.0, packed)} | changes)


# --- plan ---


@wires
@pytest.mark.parametrize("every", [0, 1, 2])
def test_plan_is_a_function_of_config_and_ledger(wire: str, every: int) -> None:
    """Once nobody is known to have anything: asking twice, or another server from the same ledger's bytes."""
    settings = {"wire": wire, "rounds_per_page": every, "server_optimizer": "adam", "server_lr": 0.01}
    one = server(**settings)
    for _ in range(5):
        fresh = [ChangeServer(config(**settings), Ledger.decode(one.ledger.encode()), names) for names in ("abc", "cab")]
        plans = [[r.encode() for r in each.plan()] for each in (*fresh, fresh[0])]
        assert plans[0] == plans[1] == plans[2]
        assert [r.encode() for r in one.plan()] == [r.encode() for r in one.plan()]
        play(one)


def test_what_a_request_says() -> None:
    a_server = server(
        max_grad=123.0, wire="int4", basis="coefficients", movement="proportional", num_seeds=100,
        noise="gaussian", eps=1e-3, batch_size=4, loss_clip=0.5, local_optimizer="adam", rounds_per_page=2, local_steps=5,
        schedule="linear",
    )  # fmt: skip
    play(a_server, 3)
    for request in a_server.plan():
        assert (request.server_round, request.attempt, request.base.hex()) == (4, 0, BASE.fingerprint)
        assert (request.size, request.family, request.wire) == (100, "gaussian", "int4")
        assert (request.basis, request.movement, request.optimizer) == ("coefficients", "proportional", "adam")
        assert (request.eps, request.batch_size, request.max_grad, request.loss_clip) == (1e-3, 4, 123, 0.5)
        assert (request.steps, request.measure, request.lr) == (5, "gradient", 0.5 * 3 / 6)
        assert request.digest == pages_digest(a_server.ledger.pages)
    assert {request.client for request in a_server.plan()} == set("abc")


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.01, 1), (0.1, 1), (0.5, 4), (0.99, 8), (1.0, 8)])
def test_a_share_of_the_clients_is_asked_for_scalars(share: float, count: int) -> None:
    """Always the same ones, drawn by the run's seed."""
    names = [f"client-{i}" for i in range(8)]
    drawn = set()
    for seed in (1, 2, 3, 4):
        a_server = server(names, two_point_clients=share, fraction_train=0.5, seed=seed)
        chosen = a_server.two_point_clients()
        assert len(chosen) == count
        assert server(names[::-1], two_point_clients=share, seed=seed).two_point_clients() == chosen
        for _ in range(3):
            for request in a_server.plan():
                assert (request.measure == "two-point") == (request.client in chosen)
            a_server.absorb([])
        drawn.add(chosen)
    assert (len(drawn) > 1) == (0 < count < 8)


# --- pages and what travels of them ---


def client_side(requests: tuple[ChangeRequest, ...], known: dict[str, tuple[Page, ...]]) -> None:
    """What each client has after a request; as `ChangeClient` does."""
    for request in requests:
        arrived = ChangeRequest.decode(request.encode())
        known[request.client] = patched(known.get(request.client, ()), arrived)


@wires
@pytest.mark.parametrize("every", [0, 1, 3])
def test_clients_that_were_there_and_late_joiners_have_the_servers_pages(wire: str, every: int) -> None:
    """Whoever is asked, now and then, has all of them; bytes follow what is new to it."""
    names = [f"client-{i}" for i in range(6)]
    a_server = server(names, wire=wire, rounds_per_page=every, fraction_train=0.5, num_rounds=12, num_seeds=256)
    known: dict[str, tuple[Page, ...]] = {}
    for _ in range(12):
        requests = a_server.plan()
        client_side(requests, known)
        for request in requests:
            assert pages_digest(known[request.client]) == pages_digest(a_server.ledger.pages)
        assert a_server.absorb(honest(requests)).status == "closed"
    assert len(a_server.ledger.pages) == (1 if not every else 12 // every)
    assert len(known) == 6


@wires
def test_bytes_shrink_for_those_who_were_there(wire: str) -> None:
    """A page of six rounds, then the next: one part a round to those who have the others, all pages to a new one."""
    a_server = server(("a", "b"), wire=wire, rounds_per_page=6, num_rounds=12)
    part = -(-K * BITS[wire] // 8)
    bare = len(a_server.plan()[0].encode())
    sizes = []
    for _ in range(9):
        play(a_server)
        sizes.append(len(a_server.plan()[0].encode()) - bare)
    each = 12  # a part's step and how long its bytes' lengths are
    assert all(abs(size - part) <= each for size in sizes[:5])
    assert abs(sizes[5] - part) <= each + 12  # the last part of the old page, and the empty new one
    assert all(abs(size - part) <= each for size in sizes[6:])
    a_server.admit(["a", "b", "late"])
    asked = {request.client: request for request in a_server.plan()}
    parts = [1, 1] if is_replaced(wire) else [6, 3]
    assert [len(patch.parts) for patch in asked["late"].patches] == parts
    assert asked["late"].have == 0
    assert [len(patch.parts) for patch in asked["a"].patches] == [1]
    assert (asked["a"].have, asked["a"].patches[0].first) == (1, 0 if is_replaced(wire) else 2)
    assert len(asked["late"].encode()) - len(asked["a"].encode()) >= (sum(parts) - 1) * part


@pytest.mark.parametrize("wire", ["float16", "sign"])
def test_a_client_that_lost_its_pages_gets_them_again(wire: str) -> None:
    """It refuses, in one line; no reply came of it, so that it is sent all in the next round, and goes on as ever."""
    a_server = server(("a", "b"), wire=wire, rounds_per_page=3, num_rounds=9)
    known: dict[str, tuple[Page, ...]] = {}
    for _ in range(5):
        client_side(a_server.plan(), known)
        play(a_server)
    requests = a_server.plan()
    first, second = known["a"]
    lost: list[tuple[tuple[Page, ...], str]] = [
        ((), "has 0 pages, the request builds on 1"),
        ((replace(first, parts=first.parts[1:]), second), "has other pages than the request builds on"),
    ]
    if wire == "sign":
        lost.append(((first,), "has 0 parts of page 2, the request builds on 1"))
    for pages, reason in lost:
        with pytest.raises(ProtocolError, match=f"^'a' {reason}; send all of them$"):
            patched(pages, requests[0])
    known |= {"a": (), "b": patched(known["b"], requests[1])}
    outcome = a_server.absorb(honest(requests)[1:])
    assert (outcome.status, outcome.missing) == ("closed", ("a",))
    again = {request.client: request for request in a_server.plan()}
    assert (again["a"].have, again["a"].patches[0].first, len(again["a"].patches)) == (0, 0, 3)
    assert (again["b"].have, len(again["b"].patches)) == (1, 2)
    client_side(a_server.plan(), known)
    assert pages_digest(known["a"]) == pages_digest(known["b"]) == pages_digest(a_server.ledger.pages)


def test_a_client_that_has_other_pages_refuses() -> None:
    """What follows from other pages has another digest; nothing is kept of it."""
    a_server, other = server(wire="sign"), server(wire="sign", seed=8)
    for each in (a_server, other):
        play(each, 2)
    (request, *_), pages = a_server.plan(), a_server.ledger.pages
    assert request.patches[0].first == 1
    page = pages[0]
    (whole,) = patched((replace(page, parts=page.parts[:1]),), request)  # the control
    assert pages_digest([whole]) == pages_digest(pages)
    for wrong, reason in (
        ((), "has 0 parts of page 1, the request builds on 1"),
        (other.ledger.pages, "has 0 parts of page 1, the request builds on 1"),  # another key
        ((replace(page, parts=page.parts[1:]),), "has other pages than the request builds on"),
        ((replace(page, parts=(encode(np.ones(K), "sign"),)),), "has other pages"),
    ):
        with pytest.raises(ProtocolError, match=f"^'a' {reason}.*; send all of them$"):
            patched(wrong, request)


@pytest.mark.parametrize(("every", "turned"), [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (3, [3]), (4, [4]), (6, []), (0, [])])
def test_pages_are_turned_after_their_rounds_and_not_after_the_last(every: int, turned: list[int]) -> None:
    a_server = server(rounds_per_page=every)
    for done in range(1, 7):
        play(a_server)
        assert len(a_server.ledger.pages) == 1 + sum(at <= done for at in turned)
        open_page = a_server.ledger.pages[-1]
        assert (len(open_page.parts) == 0) == (done in turned)
        assert not (done in turned and open_page.numbers().any())
    keys = [page.pool.key for page in a_server.ledger.pages]
    assert len(set(keys)) == len(keys)
    assert keys == [new_page(config(), i).pool.key for i in range(len(keys))]


@pytest.mark.parametrize(("before", "after", "turned"), [(1, 3, [6, 9]), (3, 1, [6, 7, 8, 9]), (2, 5, []), (0, 4, [8])])
def test_a_run_that_goes_on_turns_pages_by_its_new_settings(before: int, after: int, turned: list[int]) -> None:
    """However many it had turned until then."""
    begun = server(rounds_per_page=before, num_rounds=5)
    play(begun, 5)
    went_on = ChangeServer(config(rounds_per_page=after, num_rounds=10), begun.ledger, "abc")
    number, found = len(went_on.ledger.pages), []
    for done in range(6, 11):
        play(went_on)
        found += [done] * (len(went_on.ledger.pages) - number)
        number = len(went_on.ledger.pages)
    assert found == turned


# --- absorb ---


@wires
@optimizers
def test_numbers_by_hand(wire: str, optimizer: str) -> None:
    """The mean of the changes, the optimiser's step, page by page; what is sent lies within one message's error of it."""
    a_server = server(wire=wire, server_optimizer=optimizer, server_lr=0.25, rounds_per_page=4, num_rounds=8)
    state, numbers = OPTIMIZERS[optimizer].start(K), np.zeros(K)
    for done in range(6):
        if done == 4:
            state, numbers = OPTIMIZERS[optimizer].start(K), np.zeros(K)
        requests = a_server.plan()
        mean = np.mean([encode(numbers_of(r), wire).decode(K) for r in requests], axis=0)
        play(a_server)
        moved, state = OPTIMIZERS[optimizer].step(-mean, 0.25, state)
        numbers = numbers + moved
        if done == 3:
            continue  # turned: what is left is the next page's
        assert a_server.ledger.state is not None
        np.testing.assert_allclose(a_server.ledger.state["numbers"], numbers, rtol=1e-9, atol=1e-15)
        for column, values in state.items():
            np.testing.assert_allclose(a_server.ledger.state[column], values, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize(("optimizer", "scaled"), [("sgd", False), ("momentum", False), ("adam", True), ("sign", True)])
def test_the_schedule_lowers_each_step_once(optimizer: str, scaled: bool) -> None:
    """Bounded steps by the server's rate; others only by the clients' changes, which their rate has made smaller."""
    a_server = server(server_optimizer=optimizer, schedule="linear", server_lr=0.5, num_rounds=4)
    change = np.ones(K)
    lengths = []
    for _ in range(4):
        before = a_server.ledger.coefficients if a_server.ledger.round == 0 else a_server.ledger.state["numbers"]  # type: ignore[index]
        a_server.absorb([(r.client, reply_to(r, change).encode()) for r in a_server.plan()])
        lengths.append(float(np.abs(a_server.ledger.state["numbers"] - before).max()))  # type: ignore[index]
    expected = [0.5, 0.375, 0.25, 0.125] if scaled else ([0.5] * 4 if optimizer == "sgd" else [0.5, 0.95, 1.355, 1.7195])
    np.testing.assert_allclose(lengths, expected, rtol=1e-6)


@wires
def test_error_feedback_loses_nothing_over_rounds(wire: str) -> None:
    """After any number of rounds on one page the sum of its parts is within one message's coding error of the exact numbers.

    Each message codes what the page still lacks: e_t = lacking_t - sent_t, and lacking_(t + 1) = e_t + change_(t + 1). The
    negative control codes each round's change by itself, so that its errors add up: with these changes of a constant sign
    one bit makes all numbers alike.
    """
    rounds, drift = 60, 0.001 * (1 + np.arange(K))
    a_server = server(wire=wire, num_rounds=rounds)
    exact, alone, errors, controls = np.zeros(K), np.zeros(K), [], []
    for _ in range(rounds):
        replies = {r.client: reply_to(r, drift + numbers_of(r)) for r in a_server.plan()}
        change = np.mean([reply.numbers.decode(K) for reply in replies.values()], axis=0)
        before = a_server.ledger.pages[-1].numbers()
        assert a_server.absorb([(name, reply.encode()) for name, reply in replies.items()]).status == "closed"
        page = a_server.ledger.pages[-1]
        exact += change
        lacking = exact - (0 if is_replaced(wire) else before)
        error = exact - page.numbers()
        np.testing.assert_allclose(error, lacking - page.parts[-1].decode(K), rtol=1e-6, atol=1e-12)
        errors.append(float(np.linalg.norm(error) / np.linalg.norm(lacking)))
        alone += encode(change, wire).decode(K)
        controls.append(float(np.linalg.norm(exact - alone)))
    assert len(page.parts) == (1 if is_replaced(wire) else rounds)
    # what one message loses, as a part of what it carries: a sign of normal numbers sqrt(1 - 2 / pi) = 0.6
    assert max(errors) < {"float32": 1e-7, "float16": 1e-3, "int8": 0.02, "int4": 0.15, "int2": 0.5, "sign": 0.8}[wire]
    if not is_replaced(wire):
        last = float(np.linalg.norm(exact - page.numbers()))
        assert last < 0.05 * np.linalg.norm(exact)
        assert controls[-1] > 5 * last
        assert controls[-1] > 4 * controls[rounds // 10]


def test_pages_of_float_numbers_are_rounded_once() -> None:
    a_server = server(("a",), wire="float32")
    play(a_server, 5)
    exact = a_server.ledger.state["numbers"]  # type: ignore[index]
    np.testing.assert_array_equal(a_server.ledger.pages[0].numbers(), exact.astype(np.float32))


def test_weights_are_shares_of_the_examples() -> None:
    a_server = server(("a", "b"), wire="float32")
    requests = a_server.plan()
    changes = {"a": np.full(K, 1.0), "b": np.arange(K) / 8}
    a_server.absorb(
        [(r.client, reply_to(r, changes[r.client], num_examples={"a": 6, "b": 2}[r.client]).encode()) for r in requests]
    )
    np.testing.assert_array_equal(a_server.ledger.pages[0].numbers(), 0.75 * changes["a"] + 0.25 * changes["b"])


def test_order_of_arrival_does_not_change_a_bit() -> None:
    names = [f"client-{i}" for i in range(7)]
    begin = server(names, wire="sign", two_point_clients=0.4, local_steps=3, server_optimizer="adam", server_lr=1.0)
    requests = begin.plan()
    chosen = begin.two_point_clients()
    replies = [(r.client, (scalars_to(r) if r.client in chosen else reply_to(r)).encode()) for r in requests]
    digests = set()
    rng = random.Random(3)
    for _ in range(20):
        rng.shuffle(replies)
        a_server = ChangeServer(begin.config, begin.ledger, names)
        a_server.plan()
        assert a_server.absorb(iter(replies)).status == "closed"
        digests.add(a_server.ledger.digest())
    assert len(digests) == 1


# --- Hostile replies ---

Answer = Callable[[ChangeRequest], bytes]
NAN = np.full(K, np.nan, "<f4").tobytes()


def changed(**changes: Any) -> Answer:
    return lambda request: reply_to(request, **changes).encode()


def on_wire(wire: str, **changes: Any) -> Answer:
    return lambda request: reply_to(request, numbers=encode(numbers_of(request), wire), **changes).encode()


HOSTILE: list[tuple[Answer, str]] = [
    (lambda request: b"junk", "not a reply|not msgpack"),
    (lambda request: b"", "not msgpack"),
    (lambda request: request.encode(), "not a reply"),
    (on_wire("sign"), "the change is on wire sign; expected float32"),
    (on_wire("float16"), "the change is on wire float16; expected float32"),
    (changed(numbers=Coded("float32", 1.0, bytes(4 * K - 4))), f"the change: {4 * K - 4} bytes came; expected {4 * K}"),
    (changed(numbers=Coded("float32", 1.0, bytes(8 * K))), f"the change: {8 * K} bytes came"),
    (changed(numbers=Coded("float32", 1.0, b"")), "the change: 0 bytes came"),
    (changed(numbers=Coded("float32", 1.0, NAN)), "the change: a number is not finite"),
    (changed(numbers=Coded("float32", 1.0, np.full(K, np.inf, "<f4").tobytes())), "the change: a number is not finite"),
    (changed(numbers=Coded("float32", 1.0, np.full(K, 1.1e4, "<f4").tobytes())), "it holds 11000; at most 10000 is accepted"),
    (changed(numbers=Coded("float32", 1e5, np.full(K, -1.0, "<f4").tobytes())), "it holds 100000; at most 10000"),
    (changed(numbers=Coded("float32", -1.0, bytes(4 * K))), "the change: step is -1.0"),
    (changed(numbers=Coded("float32", 1e300, bytes(4 * K))), r"the change: step is 1e\+300"),
    (changed(steps=4), "it is of 4 steps; 3 were asked for"),
    (changed(steps=2), "it is of 2 steps; 3 were asked for"),
    (changed(num_examples=10_000_001), "num_examples is 10000001; at most 10000000"),
    (changed(server_round=9), "reply to another request: server_round is 9, expected 2"),
    (changed(attempt=1), "reply to another request: attempt is 1, expected 0"),
    (changed(client="b"), "reply to another request: client is 'b', expected 'a'"),
    (changed(run_id=b"12345678"), "reply to another request: run_id"),
    (changed(base=bytes(32)), "reply to another request: base"),
    (changed(digest=bytes(32)), "reply to another request: digest"),
    (lambda request: scalars_to(request, [1, 2], steps=2).encode(), "it is of 2 steps; 3 were asked for"),
    (lambda request: scalars_to(request, [1, 2, 3], dropped=(1,)).encode(), "a dropped step has a projected gradient"),
    (lambda request: scalars_to(request, [1, 20000, 3]).encode(), "it holds 20000; at most 10000 is accepted"),
    (
        lambda request: scalars_to(request, numbers=encode(np.ones(3), "float32")).encode(),
        "the scalars are on wire float32; expected float16",
    ),
    (lambda request: scalars_to(request, numbers=encode(np.ones(3), "sign")).encode(), "the scalars are on wire sign"),
]


def raw(**fields: Any) -> Answer:
    """Replies that no dataclass can be made of: fields of the bytes replaced."""
    import msgpack

    places = {"kind": 10, "steps": 11, "wire": 12, "step": 13, "numbers": 14, "dropped": 15, "loss": 9}

    def answer(request: ChangeRequest) -> bytes:
        values = msgpack.unpackb(reply_to(request).encode())
        for name, value in fields.items():
            values[places[name]] = value
        packed: bytes = msgpack.packb(values)
        return packed

    return answer


HOSTILE += [
    (raw(kind=2), "kind is 2"),
    (raw(step=float("nan")), "step of the numbers is nan; expected a finite float"),
    (raw(wire=6), "wire is 6; expected an integer from 0 to 5"),
    (raw(loss=float("nan")), "loss is nan"),
    (raw(dropped=b"\3\0"), "dropped step is 3"),
    (raw(numbers="x" * 512), "numbers are 'xxx"),
    (raw(kind=1), "projected gradients: 512 bytes came; expected 12"),
    (raw(kind=1, numbers=np.array([1, np.nan, 1], "<f2").tobytes(), wire=1), "projected gradients: a number is not finite"),
]


@pytest.mark.parametrize(("answer", "reason"), HOSTILE, ids=[f"{i}-{reason[:40]}" for i, (_, reason) in enumerate(HOSTILE)])
def test_a_hostile_reply_is_refused_and_leaves_the_round_as_without_it(answer: Answer, reason: str) -> None:
    import re

    ledgers = []
    for hostile in (True, False):
        a_server = server(local_steps=3)
        play(a_server)
        requests = a_server.plan()
        replies = honest(requests[1:]) + ([("a", answer(requests[0]))] if hostile else [])
        outcome = a_server.absorb(replies)
        assert outcome.status == "closed"
        ledgers.append(a_server.ledger.digest())
        if hostile:
            (refusal,) = outcome.refusals
            assert refusal.client == "a"
            assert re.search(reason, refusal.reason), refusal.reason
            assert "\n" not in refusal.reason
            assert len(refusal.reason) < 400
            assert {r.client: r for r in a_server.plan()}["a"].have == 0  # it is sent all
    assert ledgers[0] == ledgers[1]


def test_a_second_reply_a_stranger_and_a_change_in_place_of_scalars_are_refused() -> None:
    a_server, alone = server(two_point_clients=0.34), server(two_point_clients=0.34)
    (asked_for_scalars,) = a_server.two_point_clients()
    requests = a_server.plan()
    alone.plan()
    good = {r.client: (scalars_to(r) if r.client == asked_for_scalars else reply_to(r)).encode() for r in requests}
    honest_client = next(name for name in good if name != asked_for_scalars)
    (mine,) = (r for r in requests if r.client == asked_for_scalars)
    others = [(name, data) for name, data in good.items() if name != asked_for_scalars]
    outcome = a_server.absorb(
        [
            *others,
            (honest_client, good[honest_client]),
            ("stranger", good[honest_client]),
            (asked_for_scalars, reply_to(mine).encode()),
        ]
    )
    assert {(refusal.client, refusal.reason) for refusal in outcome.refusals} == {
        (honest_client, "a second reply to one request"),
        ("stranger", "'stranger' was not asked in this round"),
        (asked_for_scalars, "a change came of a client that was asked for scalars"),
    }
    alone.absorb(others)
    assert a_server.ledger.digest() == alone.ledger.digest()


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "sign"])
def test_scalars_are_refused_where_the_local_optimiser_cannot_weigh_them(optimizer: str) -> None:
    a_server = server(local_optimizer=optimizer)
    requests = a_server.plan()
    outcome = a_server.absorb([("a", scalars_to(requests[0]).encode()), *honest(requests[1:])])
    (refusal,) = outcome.refusals
    assert f"--local-optimizer {optimizer} cannot weigh" in refusal.reason
    assert outcome.status == "closed"


def test_a_round_without_enough_replies_is_asked_again_and_changes_nothing() -> None:
    a_server = server(wire="sign", min_replies=2)
    play(a_server, 2)
    before = a_server.ledger.digest()
    requests = a_server.plan()
    outcome = a_server.absorb([*honest(requests[:1]), ("b", b"junk")])
    assert outcome.status == "repeat"
    assert a_server.ledger.digest() == before
    again = {r.client: r for r in a_server.plan()}
    assert {r.attempt for r in again.values()} == {1}
    assert again["b"].patches[0].first == again["c"].patches[0].first == 0
    play(a_server)


def test_a_client_whose_every_step_was_dropped_is_refused_and_halves_nobody(caplog: pytest.LogCaptureFixture) -> None:
    """A change that says nothing would count as one that says to stay."""
    a_server = server(["a", "b"], local_steps=2)
    requests = {r.client: r for r in a_server.plan()}
    change = np.full(K, 0.25)
    nothing = reply_to(requests["b"], np.zeros(K), dropped=(0, 1), loss=None)
    some = reply_to(requests["a"], change, dropped=(1,))
    outcome = a_server.absorb([("a", some.encode()), ("b", nothing.encode())])
    assert [refusal.client for refusal in outcome.refusals] == ["b"]
    assert "all of its steps were dropped" in outcome.refusals[0].reason
    np.testing.assert_array_equal(a_server.ledger.pages[0].numbers(), change)


def test_numbers_that_no_message_can_carry_end_the_run_with_the_ledger_as_it_was() -> None:
    from fedkseed.errors import InvalidValueError

    a_server = server(server_lr=1e30)
    before = a_server.ledger.digest()
    requests = a_server.plan()
    with pytest.raises(InvalidValueError, match=r"a number to be sent is .*: lower the rate"):
        a_server.absorb([(r.client, reply_to(r, np.full(K, 9000.0)).encode()) for r in requests])
    assert a_server.ledger.digest() == before


# --- resume ---


@optimizers
@pytest.mark.parametrize(
    ("wire", "every"), [("sign", 2), ("float16", 3), ("int4", 0), ("int2", 4), ("float32", 1), ("int8", 2)]
)
def test_a_resumed_run_is_the_uninterrupted_one(optimizer: str, wire: str, every: int) -> None:
    """From the ledger's bytes after every round, and where a shorter run has ended."""
    changes = {"server_optimizer": optimizer, "wire": wire, "rounds_per_page": every, "server_lr": 0.1}
    whole = server(**changes)
    play(whole, 6)
    for stop in range(7):
        begin = server(**changes, num_rounds=max(1, stop))
        play(begin, stop)
        resumed = ChangeServer(config(**changes), Ledger.decode(begin.ledger.encode()), ("a", "b", "c"))
        play(resumed, 6 - stop)
        assert resumed.ledger.digest() == whole.ledger.digest()
        assert resumed.ledger.encode() == whole.ledger.encode()


def test_the_comparison_would_see_a_lost_state() -> None:
    """The negative control: the same without the momentum, or without the remainder of the coding."""
    changes = {"server_optimizer": "momentum", "wire": "sign"}
    whole = server(**changes)
    play(whole, 3)
    state = dict(whole.ledger.state or {})
    for lost in ({"mean": np.zeros(K)}, {"numbers": whole.ledger.pages[-1].numbers()}):
        resumed = ChangeServer(config(**changes), replace(whole.ledger, state=state | lost), ("a", "b", "c"))
        play(resumed)
        straight = ChangeServer(config(**changes), whole.ledger, ("a", "b", "c"))
        play(straight)
        assert resumed.ledger.digest() != straight.ledger.digest()


def test_ledgers_of_other_settings_are_refused() -> None:
    begin = server(wire="sign", server_optimizer="momentum", rounds_per_page=1)
    play(begin, 2)
    same = {"wire": "sign", "server_optimizer": "momentum", "rounds_per_page": 1}
    scalars = start_of_scalars(fk_config(), BASE)
    without = {name: values for name, values in (begin.ledger.state or {}).items() if name != "numbers"}
    cases: list[tuple[Ledger, dict[str, Any], str]] = [
        (begin.ledger, {"wire": "int2"}, "the ledger's wire is sign, the settings' int2"),
        (
            begin.ledger,
            {"server_optimizer": "adam", "server_lr": 1.0},
            "the ledger's state has mean, numbers; --server-optimizer adam has",
        ),
        (begin.ledger, {"server_optimizer": "sgd"}, "the ledger's state has mean, numbers; --server-optimizer sgd has numbers"),
        (
            begin.ledger,
            {"movement": "proportional"},
            "page 1 of the ledger is of .* absolute; the settings give .* proportional",
        ),
        (begin.ledger, {"basis": "coefficients"}, "page 1 of the ledger is of"),
        (begin.ledger, {"seed": 8}, "page 1 of the ledger is of"),
        (begin.ledger, {"num_seeds": 256}, "page 1 of the ledger is of"),
        (begin.ledger.published(), {}, "a published ledger, or one of scalars, has no optimiser's state"),
        (scalars, {}, "a published ledger, or one of scalars, has no optimiser's state"),
        (
            replace(begin.ledger, state=without),
            {},
            "the ledger's state has mean; --server-optimizer momentum has mean, numbers",
        ),
        (replace(begin.ledger, state={**without, "numbers": np.zeros(1)}), {}, "the ledger's state has"),
    ]
    for ledger, changes, reason in cases:
        with pytest.raises(LedgerError, match=reason) as caught:
            ChangeServer(config(**same | changes), ledger, ("a",))
        assert "\n" not in str(caught.value)
    with pytest.raises(LedgerError):
        Server(fk_config(), begin.ledger, ("a",))
    ChangeServer(config(**same), begin.ledger, ("a",))  # the control


def fk_config() -> Any:
    from fedkseed.federation import FederationConfig

    return FederationConfig(lr=0.5, num_seeds=K, seed=7)


# --- combined ---


def asked(name: str, measure: str, steps: int = 4) -> ChangeRequest:
    (request,) = server((name,), local_steps=steps).plan()
    return replace(request, measure=measure)


def test_scalars_of_dropped_steps_take_nothing_off_the_changes() -> None:
    """A client whose every step was dropped says nothing: the mean is that of the others, not half of it."""
    requests = {"a": asked("a", "gradient"), "b": asked("b", "two-point")}
    change = numbers_of(requests["a"])
    silent = scalars_to(requests["b"], [0, 0, 0, 0], dropped=(0, 1, 2, 3))
    replies = {"a": reply_to(requests["a"], change), "b": silent}
    found = combined(requests, replies, {"a": 0.5, "b": 0.5}, "table")[0]
    np.testing.assert_allclose(found, replies["a"].numbers.decode(K), rtol=1e-12)
    nearly = scalars_to(requests["b"], [0, 0, 0, 1e-6], dropped=(0, 1, 2))
    np.testing.assert_allclose(
        combined(requests, replies | {"b": nearly}, {"a": 0.5, "b": 0.5}, "table")[0], found, rtol=1 / K, atol=1e-7
    )


def test_a_round_of_dropped_scalars_is_no_change() -> None:
    requests = {"b": asked("b", "two-point")}
    silent = scalars_to(requests["b"], [0, 0, 0, 0], dropped=(0, 1, 2, 3))
    np.testing.assert_array_equal(combined(requests, {"b": silent}, {"b": 1.0}, "coefficients")[0], 0)


@pytest.mark.parametrize("rule", [name for name in AGGREGATORS if name != "mean"])
def test_one_hostile_change_of_ten_leads_nowhere(rule: str) -> None:
    """Ten times the others' against them; the mean is the control. Who counts how much is told."""
    names = [f"client-{i}" for i in range(10)]
    truth = 0.1 * np.sin(np.arange(K))
    found = {}
    for name in (rule, "mean"):
        a_server = server(names, aggregator=name)
        changes = {r.client: truth + 0.1 * numbers_of(r) for r in a_server.plan()} | {"client-4": -10 * truth}
        outcome = a_server.absorb([(r.client, reply_to(r, changes[r.client]).encode()) for r in a_server.plan()])
        assert a_server.ledger.state is not None
        found[name] = float(a_server.ledger.state["numbers"] @ truth / (truth @ truth))
        counted = {c.client: c.sizes.get("counted") for c in outcome.contributions}
        if name == "mean":
            assert set(counted.values()) == {None}
        else:
            assert counted["client-4"] == min(counted.values())  # type: ignore[type-var]
            assert "counted" in round_event(outcome, 0.1)["clients"]["client-4"]
    assert found["mean"] < 0
    assert found[rule] > 0.7


@pytest.mark.parametrize("basis", ["table", "coefficients"])
def test_hostile_scalars_among_changes_bring_in_no_more_than_the_median_reply(basis: Any) -> None:
    """One two-point client among four that send changes; honest scalars are untouched, and the mean is the control."""
    names = "abcde"
    requests = {name: asked(name, "two-point" if name == "e" else "gradient") for name in names}
    replies = {name: reply_to(requests[name]) for name in "abcd"}
    weights = dict.fromkeys(names, 0.2)
    without = combined(requests, replies, weights, basis)[0]
    for grads, expected in (([1e-3] * 4, 1.0), ([9000.0, -9000.0, 9000.0, 9000.0], 0.0)):
        both = replies | {"e": scalars_to(requests["e"], grads)}
        found, counted = combined(requests, both, weights, basis, AGGREGATORS["clipped"])
        assert counted["e"] == pytest.approx(expected, abs=1e-3)
        assert np.linalg.norm(found) < 1.1 * np.linalg.norm(without) / 0.8
        control, _ = combined(requests, both, weights, basis)
        assert (np.linalg.norm(control) > 10 * np.linalg.norm(without)) == (expected == 0)


@pytest.mark.parametrize("basis", ["table", "coefficients"])
@pytest.mark.parametrize("rule", ["mean", "clipped"])
def test_exact_sums_of_changes_and_scalars_are_the_ordered_ones_but_for_rounding(basis: Any, rule: str) -> None:
    names = "abcde"
    requests = {name: asked(name, "two-point" if name in "be" else "gradient") for name in names}
    replies = {
        name: scalars_to(requests[name], [0.3, -0.2, 0.1, 0.7]) if name in "be" else reply_to(requests[name]) for name in names
    }
    weights, chosen = dict(zip(names, (0.1, 0.2, 0.3, 0.15, 0.25), strict=True)), AGGREGATORS[rule]
    ordered, counted = combined(requests, replies, weights, basis, chosen)
    exact, shares = combined(requests, replies, weights, basis, chosen, "exact")
    np.testing.assert_allclose(exact, ordered, rtol=1e-12, atol=1e-15)
    assert shares == counted


def test_pool_of_a_published_ledger_is_its_open_pages() -> None:
    a_server = server(rounds_per_page=2)
    play(a_server, 5)
    assert a_server.ledger.pool == a_server.ledger.pages[-1].pool == fk.SeedPool(new_page(config(), 2).pool.key, K)


# --- how large what came is ---


@pytest.mark.parametrize("basis", ["coefficients", "table"])
def test_the_size_of_a_change_is_the_length_of_its_coefficients_whatever_the_basis(basis: str) -> None:
    """And beside a client that sends scalars, whose own size is told."""
    a_server = server("ab", basis=basis, two_point_clients=0.5, local_steps=2)
    numbers = np.zeros(K)
    numbers[3] = 0.5
    replies = {
        r.client: scalars_to(r, [3.0, -3.0]) if r.measure == "two-point" else reply_to(r, numbers) for r in a_server.plan()
    }
    outcome = a_server.absorb([(client, reply.encode()) for client, reply in replies.items()])
    event = round_event(outcome, 0.5)
    length = 0.5 if basis == "coefficients" else 0.5 / np.sqrt(K)
    assert event["change_norm"] == pytest.approx(length, rel=1e-6)
    assert event["projected_grad_rms"] == 3.0
    assert sorted(len(client) for client in event["clients"].values()) == [3, 3]
