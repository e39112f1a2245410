"""Edges: whatever clients stand behind which, the ledger and all that is told are those of a server that hears each reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kseed import test_server as scalars
from tests.support import changes

from fedkseed.errors import ProtocolError
from fedkseed.federation import Outcome
from fedkseed.federation import edge as module_of_edge
from fedkseed.federation.edge import Edge
from fedkseed.federation.edge_messages import LengthsReply, Report, SumsReply
from fedkseed.federation.edge_round import EdgeRound
from fedkseed.federation.exact_sum import ExactSum
from fedkseed.kseed.change_server import ChangeServer
from fedkseed.kseed.server import Server

NAMES = tuple(f"client-{i}" for i in range(9))
SIZES = {name: 3 + 7 * i for i, name in enumerate(NAMES)}
AnyServer = Server | ChangeServer
EXACT = {"summation": "exact", "fraction_train": 0.8}
ROWS: dict[str, dict[str, Any]] = {
    "scalars, mean": {"aggregator": "mean"},
    "scalars, clipped": {"aggregator": "clipped"},
    "scalars, clipped, losses too": {"aggregator": "clipped", "loss_clip": 20.0, "directions": 2},
    "pro, clipped, float32": {"algorithm": "fedkseed-pro", "aggregator": "clipped", "wire": "float32"},
    "pro, mean, equal": {"algorithm": "fedkseed-pro", "aggregator": "mean", "weighting": "equal"},
    "shared seeds": {"aggregator": "clipped", "shared_seeds": "on"},
    "changes, mean, pages": {"algorithm": "fedkseed-grad", "aggregator": "mean", "rounds_per_page": 1},
    "changes, clipped, Adam": {
        "algorithm": "fedkseed-grad",
        "aggregator": "clipped",
        "server_optimizer": "adam",
        "server_lr": 1.0,
        "wire": "int4",
    },
}
rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def server_of(row: Mapping[str, Any], clients: Sequence[str] | None = NAMES) -> AnyServer:
    """A server; without clients one that an edge can have."""
    chosen: Any = changes if row.get("algorithm") == "fedkseed-grad" else scalars
    config = chosen.config(**EXACT | dict(row))
    known = None if clients is None else {name: SIZES[name] for name in clients}
    return (ChangeServer if chosen is changes else Server)(config, chosen.BASE, clients, None, known)


def reply_to(request: Any) -> bytes:
    if hasattr(request, "indices"):
        answer = scalars.reply_to(request, num_examples=SIZES[request.client])
        if request.loss_clip:
            grads = np.clip(scalars.grads_of(request), -9, 9)
            grads[: request.directions] = 0
            answer = scalars.reply_to(request, grads, num_examples=SIZES[request.client], dropped=(0,))
        return answer.encode()
    return changes.reply_to(request, num_examples=SIZES[request.client]).encode()


def behind_of(groups: Sequence[int]) -> dict[str, list[str]]:
    """Edges by the number of the group that each client is of."""
    return {f"edge-{group}": [n for n, g in zip(NAMES, groups, strict=True) if g == group] for group in sorted(set(groups))}


class Edges:
    """A federation with edges in one process."""

    def __init__(self, row: Mapping[str, Any], groups: Sequence[int]) -> None:
        self.server, self.behind = server_of(row), behind_of(groups)
        self.edges = {
            name: Edge(name, server_of(row, None), clients, {n: SIZES[n] for n in clients})
            for name, clients in self.behind.items()
        }

    def play(
        self,
        replies: Callable[[Any], bytes | None] = reply_to,
        altered: Callable[[str, int, bytes], bytes | None] = lambda edge, phase, data: data,
        shuffled: int = 0,
    ) -> Outcome:
        """An attempt at a round; `altered` may change, or lose, an edge's message of a phase."""
        attempt, phase = EdgeRound(self.server, self.behind), 0
        order = np.random.default_rng(shuffled)
        while not attempt.over:
            answers: list[tuple[str, bytes]] = []
            for name, data in attempt.ask().items():
                if phase:
                    answer: bytes | None = self.edges[name].answer(data)
                else:
                    asked = list(self.edges[name].open(data))
                    came = [(r.client, one) for r in asked if (one := replies(r)) is not None]
                    answer = self.edges[name].close([came[i] for i in order.permutation(len(came))])
                answer = altered(name, phase, answer)  # type: ignore[arg-type]
                answers += [] if answer is None else [(name, answer)]
            attempt.hear([answers[i] for i in order.permutation(len(answers))])
            phase += 1
        assert attempt.outcome is not None
        return attempt.outcome


def flat(a_server: AnyServer, replies: Callable[[Any], bytes | None] = reply_to) -> Outcome:
    return a_server.absorb([(r.client, one) for r in a_server.plan() if (one := replies(r)) is not None])


def told(outcome: Outcome) -> tuple[Any, ...]:
    return outcome.server_round, outcome.status, outcome.contributions, outcome.refusals, outcome.missing


@rows
@given(groups=st.lists(st.integers(0, 4), min_size=9, max_size=9), shuffled=st.integers(0, 99))
@settings(max_examples=4, deadline=None)
def test_no_grouping_and_no_order_changes_a_bit_of_the_ledger_or_of_what_is_told(
    row: dict[str, Any], groups: list[int], shuffled: int
) -> None:
    alone, edges = server_of(row), Edges(row, groups)
    for _ in range(3):
        assert told(edges.play(shuffled=shuffled)) == told(flat(alone))
        assert edges.server.checkpoint.digest() == alone.checkpoint.digest()
    assert alone.checkpoint.round == 3


@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_edges_that_sum_in_floating_point_are_found_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: sums that are rounded at the edges give another ledger."""
    row = ROWS["scalars, mean"]
    alone, edges = server_of(row), Edges(row, [0, 1, 0, 1, 0, 1, 0, 1, 0])
    add = ExactSum.add

    def rounded(self: ExactSum, values: np.ndarray[Any, Any]) -> None:
        total = (self.value.astype(kind) + values.astype(kind)).astype(np.float64)
        self.limbs[:] = 0
        add(self, total)

    flat(alone)
    monkeypatch.setattr(ExactSum, "add", rounded)
    assert edges.play().status == "closed"
    assert edges.server.checkpoint.digest() != alone.checkpoint.digest()


@rows
def test_bad_missing_and_second_replies_are_told_as_without_edges(row: dict[str, Any]) -> None:
    def some(request: Any) -> bytes | None:
        if request.client == "client-1":
            return None
        return b"junk" if request.client in ("client-2", "client-5") else reply_to(request)

    alone, edges = server_of(row | {"fraction_train": 1.0}), Edges(row | {"fraction_train": 1.0}, [0, 0, 0, 1, 1, 1, 1, 1, 2])
    for _ in range(2):
        outcome = flat(alone, some)
        assert told(edges.play(some)) == told(outcome)
        assert (outcome.missing, [r.client for r in outcome.refusals]) == (("client-1",), ["client-2", "client-5"])
        assert edges.server.checkpoint.digest() == alone.checkpoint.digest()


@rows
def test_too_few_replies_repeat_the_round_without_those_that_failed(row: dict[str, Any]) -> None:
    row = row | {"fraction_train": 0.5, "min_replies": 3}

    def some(request: Any) -> bytes | None:
        return reply_to(request) if request.attempt or request.client < "client-3" else None

    alone, edges = server_of(row), Edges(row, [0, 1, 2, 0, 1, 2, 0, 1, 2])
    statuses = []
    for _ in range(3):
        outcome = flat(alone, some)
        assert told(edges.play(some)) == told(outcome)
        statuses.append(outcome.status)
        assert edges.server.checkpoint.digest() == alone.checkpoint.digest()
    assert statuses[0] == "repeat"
    assert "closed" in statuses


def test_one_who_goes_on_from_a_ledger_with_other_edges_ends_in_the_same_bits() -> None:
    row = ROWS["pro, clipped, float32"]
    once, again = Edges(row, [0, 1, 2] * 3), Edges(row, [1, 1, 0] * 3)
    once.play()
    again.server.ledger = once.server.ledger  # type: ignore[assignment]
    once.play()
    again.play()
    assert again.server.checkpoint.digest() == once.server.checkpoint.digest()


@pytest.mark.parametrize("wire", ["int4", "float32"])
def test_an_edge_whose_server_begins_again_sends_its_clients_all(wire: str) -> None:
    """Else they would build on pages that the server no longer has."""
    row = ROWS["changes, mean, pages"] | {"fraction_train": 1.0, "wire": wire, "rounds_per_page": 2}
    edges, other = Edges(row, [0] * 9), Edges(row, [0] * 9)
    for _ in range(3):
        edges.play()
    other.play(lambda request: reply_to(request) if request.client > "client-3" else None)
    for server, have in ((edges.server, 1), (other.server, 0), (other.server, 0)):
        opening = EdgeRound(server, edges.behind).ask()["edge-0"]
        assert {request.have for request in edges.edges["edge-0"].open(opening)} == {have}  # type: ignore[attr-defined]
    assert all(len(request.patches[0].parts) == 1 for request in edges.edges["edge-0"].open(opening))  # type: ignore[attr-defined]


# --- What an edge may send ---

LOST: dict[str, Callable[[bytes, Edges], bytes | None]] = {
    "nothing": lambda data, edges: None,
    "junk": lambda data, edges: b"junk",
    "half": lambda data, edges: data[: len(data) // 2],
    "another kind": lambda data, edges: edges.edges["edge-0"]._opening.encode(),  # type: ignore[union-attr]
}


@pytest.mark.parametrize("phase", [0, 1, 2])
@pytest.mark.parametrize("how", LOST.values(), ids=LOST)
def test_an_edge_that_fails_is_left_out_with_its_clients(how: Callable[[bytes, Edges], bytes | None], phase: int) -> None:
    """The ledger is that of the others alone."""
    row = ROWS["scalars, clipped"] | {"fraction_train": 1.0}
    lost = set(NAMES[0::3])
    alone, edges = server_of(row), Edges(row, [0, 1, 2] * 3)
    outcome = edges.play(altered=lambda edge, at, data: how(data, edges) if (edge, at) == ("edge-0", phase) else data)
    flat(alone, lambda request: None if request.client in lost else reply_to(request))
    assert (outcome.status, outcome.missing) == ("closed", tuple(sorted(lost)))
    assert {r.client for r in outcome.refusals} <= {"edge-0"}
    assert edges.server.checkpoint.digest() == alone.checkpoint.digest()


def report(change: Callable[[Report], dict[str, Any]]) -> Callable[[bytes, int], bytes]:
    def altered(data: bytes, asked: int) -> bytes:
        found = Report.decode(data, asked)
        return replace(found, **change(found)).encode()

    return altered


def at_first(array: np.ndarray[Any, Any], value: float) -> np.ndarray[Any, Any]:
    return np.concatenate([[value], array[1:]]).astype(array.dtype)


LIES: dict[str, tuple[int, Callable[[bytes, int], bytes], str]] = {
    "more clients than it has": (0, report(lambda r: {"num_examples": np.append(r.num_examples, 5)}), "num_examples came"),
    "a client with other records": (
        0,
        report(lambda r: {"num_examples": at_first(r.num_examples, 99)}),
        "this client came with",
    ),
    "fewer than no records": (0, report(lambda r: {"num_examples": at_first(r.num_examples, -1)}), "fewer than no records"),
    "more dropped steps than steps": (0, report(lambda r: {"dropped_steps": at_first(r.dropped_steps, 7)}), "dropped 7 of 6"),
    "a size below 0": (0, report(lambda r: {"sizes": at_first(r.sizes, -1.0)}), "the size of what 'client-0' sent is -1.0"),
    "an infinite size": (0, report(lambda r: {"sizes": at_first(r.sizes, np.inf)}), "expected a number from 0 on"),
    "a word that is none": (0, report(lambda r: {"words": at_first(r.words, np.nan)}), "scale of scalars is negative or not"),
    "no words": (0, report(lambda r: {"words": np.zeros(0)}), "0 words about the scale of scalars came"),
    "an infinite loss": (0, report(lambda r: {"losses": at_first(r.losses, np.inf)}), "the loss of 'client-0' is inf"),
    "a refusal of a stranger": (0, report(lambda r: {"refused": (9,), "reasons": ("x",)}), "who was refused was not asked"),
    "a refusal without a reason": (0, report(lambda r: {"refused": (0,)}), "has not one reason each"),
    "another round": (0, report(lambda r: {"server_round": 2}), "answer to another question: server_round differs"),
    "another attempt": (0, report(lambda r: {"attempt": 1}), "attempt differs"),
    "another edge's": (0, report(lambda r: {"client": "edge-1"}), "client differs"),
    "another checkpoint": (0, report(lambda r: {"digest": bytes(32)}), "digest differs"),
    "a length that is none": (
        1,
        lambda data, n: replace(f := LengthsReply.decode(data, n), lengths=at_first(f.lengths, np.nan)).encode(),
        "length is nan; expected a finite float",
    ),
    "a length below 0": (
        1,
        lambda data, n: replace(f := LengthsReply.decode(data, n), lengths=at_first(f.lengths, -1.0)).encode(),
        "is negative",
    ),
    "a length that no reply has": (
        1,
        lambda data, n: replace(f := LengthsReply.decode(data, n), lengths=at_first(f.lengths, 1e300)).encode(),
        "a reply's numbers are of length 1e+300",
    ),
    "fewer lengths": (
        1,
        lambda data, n: replace(f := LengthsReply.decode(data, n), lengths=f.lengths[1:]).encode(),
        "2 lengths came; expected 3",
    ),
}


def sums(change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> Callable[[bytes, int], bytes]:
    def altered(data: bytes, n: int) -> bytes:
        found = SumsReply.decode(data, (7, scalars.K))
        return replace(found, rows=change(found.rows.copy())).encode()

    return altered


def put(row: int, value: int) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    def change(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        rows[row, 0] = value
        return rows

    return change


LIES |= {
    "sums of another K": (2, sums(lambda r: r[:, 1:]), "49 sums came; expected 56"),
    "a sum beyond what its clients' lengths allow": (2, sums(put(0, 10**4)), "its 3 replies cannot add up to more than"),
    "a sum that would run over": (2, sums(put(1, 2**62)), "a sum's digit is beyond"),
    "more scalars than its clients have": (2, sums(put(6, 19)), "more than 18 scalars are counted"),
    "scalars whose number runs over": (2, sums(lambda r: np.vstack([r[:6], np.full((1, 8), 2**61)])), "scalars are counted"),
    "fewer than no scalars": (2, sums(put(6, -1)), "or fewer than none"),
    "magnitudes below 0": (2, sums(put(3, -2)), "magnitudes are summed to less than 0"),
    "magnitudes of more scalars": (2, sums(put(3, 10**6)), "or to more than so many have"),
}


@pytest.mark.parametrize(("phase", "lie", "reason"), LIES.values(), ids=LIES)
def test_a_lie_that_can_be_seen_is_refused_with_a_reason(phase: int, lie: Callable[[bytes, int], bytes], reason: str) -> None:
    row = ROWS["scalars, clipped"] | {"fraction_train": 1.0}
    lost = set(NAMES[0::3])
    alone, edges = server_of(row), Edges(row, [0, 1, 2] * 3)
    outcome = edges.play(altered=lambda edge, at, data: lie(data, 3) if (edge, at) == ("edge-0", phase) else data)
    flat(alone, lambda request: None if request.client in lost else reply_to(request))
    (refusal,) = outcome.refusals
    assert refusal.client == "edge-0"
    assert reason in refusal.reason
    assert "\n" not in refusal.reason
    assert edges.server.checkpoint.digest() == alone.checkpoint.digest()


def test_a_lying_edge_brings_in_no_more_than_its_clients_could() -> None:
    """A lie within the bound goes in, as those of three lying clients would: an edge is trusted that far, and no further."""
    row = ROWS["scalars, clipped"] | {"fraction_train": 1.0}
    edges, honest = Edges(row, [0, 1, 2] * 3), Edges(row, [0, 1, 2] * 3)
    outcome = edges.play(
        altered=lambda edge, at, data: (
            sums(lambda r: np.concatenate([-r[:3], r[3:]]))(data, 3) if (edge, at) == ("edge-0", 2) else data
        )
    )
    honest.play()
    assert outcome.refusals == ()
    assert edges.server.checkpoint.digest() != honest.server.checkpoint.digest()


@pytest.mark.parametrize("kind", ["scalars, mean", "changes, mean, pages"])
def test_a_number_beyond_all_bounds_is_refused_where_no_lengths_are_asked_for(kind: str) -> None:
    edges = Edges(ROWS[kind], [0, 1, 2] * 3)
    shape = edges.server.rows_shape

    def lie(data: bytes) -> bytes:
        found = SumsReply.decode(data, shape)
        changed = found.rows.copy()
        changed[0, 0] = 10**6
        return replace(found, rows=changed).encode()

    outcome = edges.play(altered=lambda edge, at, data: lie(data) if (edge, at) == ("edge-0", 1) else data)
    (refusal,) = outcome.refusals
    assert "a sum has a number of 1e+06" in refusal.reason


@given(phase=st.integers(0, 2), data=st.data())
@settings(max_examples=25, deadline=None)
def test_no_bytes_of_an_edge_do_anything_but_count_or_be_refused(phase: int, data: st.DataObject) -> None:
    edges = Edges(ROWS["scalars, clipped"], [0, 1, 2] * 3)

    def mutated(message: bytes) -> bytes:
        place = data.draw(st.integers(0, len(message) - 1))
        there = data.draw(st.binary(max_size=9))
        return message[:place] + there + message[place + data.draw(st.integers(0, 9)) :]

    outcome = edges.play(altered=lambda edge, at, sent: mutated(sent) if (edge, at) == ("edge-0", phase) else sent)
    assert outcome.status == "closed"
    assert {r.client for r in outcome.refusals} <= {"edge-0", *NAMES}
    assert all(len(r.reason) < 400 and r.reason.isprintable() for r in outcome.refusals)
    assert np.isfinite(edges.server.checkpoint.coefficients).all()


# --- What a server may send to an edge ---


def test_an_edge_refuses_what_is_not_for_it() -> None:
    row = ROWS["scalars, mean"]
    edges = Edges(row, [0, 1, 2] * 3)
    opening = EdgeRound(edges.server, edges.behind).ask()["edge-0"]
    edge, other = edges.edges["edge-0"], edges.edges["edge-1"]
    found = module_of_edge.Opening.decode(opening)
    others = Edges(row | {"eps": 0.25}, [0, 1, 2] * 3).edges["edge-0"]
    published = replace(edges.server.ledger, history=None).encode()
    cases: dict[str, tuple[Edge, bytes]] = {
        "message is not msgpack": (edge, opening[:-1]),
        "request is for edge 'edge-0'; this is 'edge-1'": (other, opening),
        "the server's settings are others than this edge's": (others, opening),
        "the checkpoint does not have the digest": (edge, replace(found, state=b"x").encode()),
        "'client-1' is not behind edge 'edge-0'": (edge, replace(found, clients=("client-1",)).encode()),
        "not in the order of their names": (
            edge,
            opening.replace(*("\n".join(names).encode() for names in (found.clients, reversed(found.clients)))),
        ),
        "server_round is not the one": (edge, replace(found, server_round=2).encode()),
        "run_id is not the one": (edge, replace(found, run_id=bytes(8)).encode()),
        "the checkpoint cannot be used: the checkpoint is a published ledger": (edge, with_state(found, published)),
        "the checkpoint cannot be used: not a ledger, or damaged": (edge, with_state(found, b"x")),
    }
    for reason, (asked, data) in cases.items():
        with pytest.raises(ProtocolError, match=reason):
            asked.open(data)
    with pytest.raises(ProtocolError, match=r"no round is open at this edge; call open\(\) before close\(\)"):
        edge.close([])
    with pytest.raises(ProtocolError, match=r"no round is closed at this edge; call open\(\) and close\(\) before answer\(\)"):
        edge.answer(b"")


def with_state(opening: Any, state: bytes) -> bytes:
    return replace(opening, state=state, digest=module_of_edge.hashlib.sha256(state).digest()).encode()


def test_an_edge_refuses_a_question_about_other_replies() -> None:
    edges = Edges(ROWS["scalars, mean"], [0] * 9)
    attempt = EdgeRound(edges.server, edges.behind)
    edge = edges.edges["edge-0"]
    asked = edge.open(attempt.ask()["edge-0"])
    attempt.hear([("edge-0", edge.close([(r.client, reply_to(r)) for r in asked]))])
    question = module_of_edge.Asking.decode(attempt.ask()["edge-0"], len(asked))
    for changed, reason in (
        ({"server_round": 3}, "question about another round"),
        ({"weights": np.ones(3)}, "3 weights came; expected 7"),
        ({"weights": np.full(7, np.nan)}, "a weight is negative or not finite"),
        ({"limit": -1.0}, "limit is -1.0"),
    ):
        with pytest.raises(ProtocolError, match=reason):
            edge.answer(replace(question, **changed).encode())


def test_a_stranger_is_told_off_and_does_nothing() -> None:
    edges = Edges(ROWS["scalars, mean"], [0] * 9)
    attempt = EdgeRound(edges.server, edges.behind)
    data = attempt.ask()["edge-0"]
    answer = edges.edges["edge-0"].close([(r.client, reply_to(r)) for r in edges.edges["edge-0"].open(data)])
    attempt.hear([("edge-7", b""), ("edge-0", answer), ("edge-0", b"junk")])
    while not attempt.over:
        attempt.hear([(name, edges.edges[name].answer(data)) for name, data in attempt.ask().items()])
    assert attempt.outcome is not None
    assert [(r.client, r.reason) for r in attempt.outcome.refusals] == [("edge-7", "'edge-7' was not asked in this phase")]
