"""Mutated messages, ledgers and logs by the thousand: each is used as what it says, or refused with the documented error."""

import contextlib
import copy
import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from flwr.proto.node_pb2 import NodeInfo

from fedkseed.baselines import TensorServer, TunedTensors
from fedkseed.baselines.messages import TensorReply, TensorRequest, pack_tensors
from fedkseed.errors import AuditError, LedgerError, ProtocolError, RunError
from fedkseed.federation import FederationConfig, Rounds
from fedkseed.federation import envelope as federation_envelope
from fedkseed.flower.envelope import Evaluation, Hello, Lacking
from fedkseed.flower.roll import Roll
from fedkseed.kseed import server as server_of_scalars
from fedkseed.kseed.change_messages import CHANGE, ChangeReply, ChangeRequest
from fedkseed.kseed.change_messages import SCALARS as CHANGE_SCALARS
from fedkseed.kseed.change_server import ChangeServer
from fedkseed.kseed.coding import Coded, encode
from fedkseed.kseed.ledger import Ledger
from fedkseed.kseed.messages import TrainReply, TrainRequest, coefficients_digest
from fedkseed.kseed.rounding import pack
from fedkseed.kseed.server import Server
from fedkseed.kseed.steps import largest_grad
from fedkseed.models.identity import BaseIdentity
from fedkseed.runs.audit import audit
from fedkseed.runs.audit_log import AuditLog
from fedkseed.secure import messages as secure_messages
from fedkseed.secure.client import SumClient
from fedkseed.secure.server import SecureSum
from tests.support import sums
from tests.support.mutations import Change, bits, fields, mutated, slices, tensors, values, within

MUTATIONS = 1_000_000
"""In the slow suite, over all rows."""
DAILY = 3_000

BASE = BaseIdentity.of({"a": bytes(range(32)), "b": bytes(32)})
CLIENTS = {"ada": 5, "bob": 7}
GUESS = 2.0
WAYS: dict[str, dict[str, Any]] = {
    "float16": {},
    "float32, directions, clip": {"wire": "float32", "directions": 2, "loss_clip": 0.5},
    "pro": {"algorithm": "fedkseed-pro"},
    "table, int4": {"algorithm": "fedkseed-grad", "num_seeds": 128, "wire": "int4"},
    "coefficients, sign, pages": {
        "algorithm": "fedkseed-grad", "num_seeds": 16, "wire": "sign", "basis": "coefficients", "rounds_per_page": 1,
        "server_optimizer": "adam",
        "server_lr": 1.0,
    },
    "float32, a client of scalars": {
        "algorithm": "fedkseed-grad", "num_seeds": 16, "wire": "float32", "basis": "coefficients", "two_point_clients": 0.5,
    },
    "tensors": {"algorithm": "fedavg"},
}  # fmt: skip


def config(**changes: Any) -> FederationConfig:
    settings = {"lr": 0.5, "num_rounds": 9, "fraction_train": 1.0, "local_steps": 3, "num_seeds": 16, "seed": 7}
    settings |= {} if changes.get("algorithm") != "fedavg" else {"num_seeds": 4096}
    return FederationConfig(**(settings | changes))


def some_tensors() -> Any:
    return {"a": torch.ones(2, 3), "b": torch.zeros(5)}


def server(way: str) -> Rounds[Any, Any]:
    """After two rounds, with the third one planned."""
    settings = config(**WAYS[way])
    a_server: Rounds[Any, Any]
    if settings.facts.sends == "tensors":
        start = TunedTensors(settings.algorithm, BASE.fingerprint, 0, some_tensors())
        a_server = TensorServer(settings, start, list(CLIENTS), GUESS, CLIENTS)
    else:
        kind = Server if settings.facts.sends == "scalars" else ChangeServer
        a_server = kind(settings, BASE, list(CLIENTS), GUESS, CLIENTS)
    for _ in range(2):
        outcome = a_server.absorb([(request.client, honest(request)) for request in a_server.plan()])
        assert (outcome.status, outcome.refusals) == ("closed", ())
    return a_server


def honest(request: Any) -> bytes:
    draw = np.random.default_rng([*request.client.encode(), request.server_round])
    about = {**request.head(), "num_examples": CLIENTS[request.client], "loss": 1.5}
    if isinstance(request, TensorRequest):
        return TensorReply(**about, dropped=1, tensors=pack_tensors(some_tensors())).encode()
    if isinstance(request, TrainRequest):
        grads = draw.standard_normal(len(request.indices))
        grads[: request.directions] = 0
        return TrainReply(**about, projected_grads=pack(grads, request.coefficients.precision, 0), dropped=(0,)).encode()
    if request.measure == "two-point":
        grads = draw.standard_normal(request.steps)
        numbers = Coded("float16", 1.0, pack(grads, "float16", 0).numbers)
        return ChangeReply(**about, kind=CHANGE_SCALARS, steps=request.steps, numbers=numbers).encode()
    numbers = encode(0.01 * draw.standard_normal(request.size), request.wire)
    return ChangeReply(**about, kind=CHANGE, steps=request.steps, numbers=numbers).encode()


# --- What any mutation must come to ---


@dataclass(frozen=True)
class Row:
    """One kind of bytes.

    Attributes:
        corpus: good ones.
        changes: how they are mutated.
        judge: uses bytes as the program does, and holds what is accepted to the bounds; whether it was.
        share: of all mutations.
    """

    corpus: Sequence[bytes]
    changes: Sequence[Change]
    judge: Callable[[bytes], bool]
    share: int


def refused(error: Exception, longest: int = 400) -> bool:
    """The reason is one short line."""
    assert 0 < len(str(error)) < longest
    assert "\n" not in str(error)
    return False


def same_bytes(cls: Any, *more: Any) -> Callable[[bytes], bool]:
    """A message that is accepted has no second form, and numbers that a client may compute with."""

    def judge(data: bytes) -> bool:
        try:
            found = cls.decode(data, *more)
        except ProtocolError as error:
            return refused(error)
        assert found.encode() == data
        check_request(found)
        return True

    return judge


def check_request(found: Any) -> None:
    assert 0 < found.lr < math.inf
    assert 1 <= found.batch_size <= 65535
    assert 1 <= found.num_steps <= 65535
    if isinstance(found, TrainRequest):
        assert 0 <= min(found.indices) <= max(found.indices) < found.pool.size <= 65536
        coefficients = found.coefficients.unpack()
        assert len(coefficients) == found.pool.size
        assert np.isfinite(coefficients).all()
        assert coefficients_digest(coefficients) == found.digest
    if isinstance(found, ChangeRequest):
        for patch in found.patches:
            for part in patch.parts:
                assert np.isfinite(part.decode(found.size)).all()
    if not isinstance(found, TensorRequest):
        assert 1e-37 <= found.eps <= 1e37
        assert 0 < found.max_grad < math.inf


def absorbed(way: str) -> tuple[list[bytes], Callable[[bytes], bool]]:
    """What ada sends to a server, beside bob's honest reply."""
    planned = server(way)
    requests = {request.client: request for request in planned.plan()}
    bob = ("bob", honest(requests["bob"]))
    alone = copy.copy(planned)
    alone.absorb([bob])
    without_ada = alone.checkpoint.digest()

    def judge(data: bytes) -> bool:
        now = copy.copy(planned)
        outcome = now.absorb([("ada", data), bob])
        assert outcome.status == "closed"
        assert now.checkpoint.round == 3
        (_, *others) = contributions = outcome.contributions
        if "ada" not in outcome.accepted:
            assert [c.client for c in contributions] == ["bob"]
            (refusal,) = outcome.refusals
            assert refusal.client == "ada"
            assert 0 < len(refusal.reason) < 400
            assert now.checkpoint.digest() == without_ada
            return False
        assert [c.client for c in others] == ["bob"]
        assert outcome.accepted["ada"] == data
        reply = now._decode(data)
        assert reply.encode() == data
        assert reply.head() == requests["ada"].head()
        assert reply.num_examples == CLIENTS["ada"]
        assert contributions[0].weight == CLIENTS["ada"] / 12
        assert reply.loss is None or 0 <= reply.loss <= 10_000 * GUESS
        assert 0 <= reply.num_dropped <= requests["ada"].num_steps
        check_moved(now, reply)
        return True

    return [honest(requests["ada"]), bob[1]], judge


def check_moved(now: Rounds[Any, Any], reply: Any) -> None:
    """What was accepted moves the model by no more than the limits allow, to numbers."""
    limit = now.config.max_value
    if isinstance(reply, TensorReply):
        for tensor in now.checkpoint.tensors.values():  # type: ignore[attr-defined]
            assert bool((tensor.abs() <= limit).all())
        return
    if isinstance(reply, TrainReply) or reply.kind == CHANGE_SCALARS:
        limit = largest_grad(now.config)
    if isinstance(reply, TrainReply):
        numbers = reply.projected_grads.unpack()
    else:
        numbers = reply.numbers.decode(now.config.num_seeds if reply.kind == CHANGE else reply.steps)
    assert np.abs(numbers).max() <= limit
    assert isinstance(now.checkpoint, Ledger)
    assert np.isfinite(now.checkpoint.coefficients).all()
    assert Ledger.decode(now.checkpoint.encode()).digest() == now.checkpoint.digest()


def small(cls: Any) -> Callable[[bytes], bool]:
    def judge(data: bytes) -> bool:
        try:
            found = cls.decode(data)
        except ProtocolError as error:
            return refused(error)
        assert cls.decode(found.encode()) == found
        for name, value in found:
            if type(value) in (int, float):
                assert 0 <= value <= 2**53 or (name == "loss" and math.isfinite(value))
        return True

    return judge


def greeted(data: bytes) -> bool:
    """A hello to a server that has met ada with 5 records, and whose node 2 is bob's by its key."""
    roll = Roll(None, BASE.fingerprint, num_examples={"ada": 5})  # type: ignore[arg-type]
    roll._online = {1: NodeInfo(node_id=1), 2: NodeInfo(node_id=2, name="bob")}
    let_in = False
    for node_id in (1, 2):
        try:
            roll._admit(node_id, data)
        except (ProtocolError, RunError) as error:
            refused(error)
            continue
        let_in = True
        (name,) = roll._members
        hello = roll._members[name].hello
        assert hello.name == name
        assert node_id == 1 or name == "bob"
        assert name.isprintable()
        assert hello.base == BASE.fingerprint
        assert hello.num_examples == 5 or (name != "ada" and hello.num_examples >= 1)
        break
    return let_in


def read(data: bytes) -> bool:
    try:
        found = Ledger.decode(data)
    except LedgerError as error:
        return refused(error)
    assert Ledger.decode(found.encode()).digest() == found.digest()
    assert found.coefficients.shape == (found.pool.size,)
    assert np.isfinite(found.coefficients).all()
    assert found.round >= 0
    return True


SUM_PHASES = ("Keys", "Shares", "Masked", "Unmask")
ONE = sums.names(4)[1]


def sum_answered(client: SumClient, kind: type[secure_messages.Message]) -> Callable[[bytes], bool]:
    """What a client is asked in a phase of a secure sum: whatever it refuses leaves it as it was."""

    def judge(data: bytes) -> bool:
        asked = copy.copy(client)
        try:
            asked.answer(data)
        except ProtocolError as error:
            assert asked.state == client.state
            return refused(error)
        assert asked.state != client.state
        assert kind.decode(data).encode() == data
        return True

    return judge


def sum_heard(server: SecureSum, replies: dict[str, bytes], kind: type[secure_messages.Message]) -> Callable[[bytes], bool]:
    """What one of four clients answers in a phase: the others' are used as before, or the sum ends without a result."""

    def judge(data: bytes) -> bool:
        now = copy.deepcopy(server)
        now.hear({**replies, ONE: data}.items())
        assert now.missing == server.missing
        assert {refusal.client for refusal in now.refusals} <= set(replies)
        assert all(0 < len(refusal.reason) < 400 and "\n" not in refusal.reason for refusal in now.refusals)
        if now.summed is not None:
            assert np.abs(now.summed.mean).max() <= sums.CLIP
        if any(refusal.client == ONE for refusal in now.refusals):
            return False
        assert kind.decode(data).encode() == data
        return True

    return judge


def ledgers() -> list[bytes]:
    found = []
    for way in WAYS:
        ledger = server(way).checkpoint
        if isinstance(ledger, Ledger):
            found += [ledger.encode(), ledger.published().encode(), ledger.stamped({"settings": {"lr": 0.5}}).encode()]
    return found


def log_of(folder: Path, way: str) -> bytes:
    """A log of three rounds, in a folder with the ledger that it leads to."""
    settings = config(**WAYS[way])
    kind = Server if settings.facts.sends == "scalars" else ChangeServer
    a_server: Any = kind(settings, BASE, list(CLIENTS), GUESS, CLIENTS)
    folder.mkdir()
    log = AuditLog(folder, a_server)
    for _ in range(3):
        requests = [(request, request.encode()) for request in a_server.plan()]
        log.planned()
        for request, data in requests:
            log.sent(request, data)
        replies = [(request.client, honest(request)) for request, _ in requests] + [("bob", b"junk")]
        log.absorbed(a_server.absorb(replies), replies, {"eve": "no bytes"})
    a_server.ledger.save(folder / "ledger.safetensors")
    return (folder / "audit.jsonl").read_bytes()


def relinked(change: Change) -> Change:
    """A change of one line of a log, whose chain is made anew: it is not the chain that tells."""

    def changed(draw: Any, data: bytes, corpus: Sequence[bytes]) -> bytes:
        lines = data.splitlines()
        at = draw.randrange(len(lines))
        lines[at] = change(draw, lines[at], lines).replace(b"\n", b" ")
        before = "0" * 64
        for number, line in enumerate(lines):
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                lines[number] = json.dumps(json.loads(line) | {"before": before}).encode()
            before = hashlib.sha256(lines[number]).hexdigest()
        return b"".join(line + b"\n" for line in lines)

    return changed


def replayed(folder: Path) -> Callable[[bytes], bool]:
    wanted = Ledger.load(folder / "ledger.safetensors").digest()

    def judge(data: bytes) -> bool:
        (folder / "audit.jsonl").write_bytes(data)
        try:
            found = audit(folder, "ada")
        except (AuditError, RunError) as error:
            return refused(error, 800)
        assert found.ledger.digest() == wanted or found.notes
        return True

    return judge


@pytest.fixture(scope="module", autouse=True)
def quiet() -> Iterator[None]:
    """Flower's log of everybody who is let in."""
    logger = logging.getLogger("flwr")
    before = logger.level
    logger.setLevel(logging.WARNING)
    yield
    logger.setLevel(before)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    found: dict[str, Row] = {}
    packed, text, file = (
        (fields, fields, fields, bits, slices),
        (values, values, bits, slices),
        (tensors, tensors, bits, slices),
    )
    asked: dict[Any, list[bytes]] = {}
    for way in WAYS:
        corpus, judge = absorbed(way)
        changes = (*packed, within(tensors)) if way == "tensors" else packed
        found[f"reply, {way}"] = Row(corpus, changes, judge, 8)
        for request in server(way).plan():
            asked.setdefault(type(request), []).append(request.encode())
    for cls, corpus in asked.items():
        more = (10**6,) if cls is TensorRequest else ()
        found[f"request, {cls.__name__}"] = Row(corpus, packed, same_bytes(cls, *more), 8)
    for phase, (a_server, one, requests, replies) in zip(SUM_PHASES, sums.stages(ONE), strict=True):
        request, reply = (getattr(secure_messages, f"{phase}{word}") for word in ("Request", "Reply"))
        own, others = [requests[ONE]], [requests[name] for name in requests if name != ONE]
        found[f"secure sum, {request.__name__}"] = Row([*own, *others], packed, sum_answered(one, request), 2)
        own, others = [replies[ONE]], [replies[name] for name in replies if name != ONE]
        found[f"secure sum, {reply.__name__}"] = Row([*own, *others], packed, sum_heard(a_server, replies, reply), 2)
    hello = Hello(name="ada", base=BASE.fingerprint, num_examples=5, num_eval_examples=3, num_eval_tokens=30)
    hellos = [hello.encode(), hello.model_copy(update={"name": "bob", "num_examples": 7}).encode()]
    found["hello"] = Row(hellos, text, greeted, 8)
    evaluation = Evaluation(ledger="ab" * 32, loss=2.5, num_examples=3, num_tokens=30)
    found["evaluation"] = Row([evaluation.encode()], text, small(Evaluation), 8)
    found["lacking"] = Row([Lacking(pages=3).encode()], text, small(Lacking), 2)
    found["ledger"] = Row(ledgers(), file, read, 10)
    for way in ("float16", "coefficients, sign, pages"):
        folder = tmp_path_factory.mktemp("logs") / "run"
        found[f"log, {way}"] = Row([log_of(folder, way)], (relinked(values), relinked(bits), bits, slices), replayed(folder), 1)
    return found


def fuzz(row: Row, count: int) -> Counter[bool]:
    """How many mutations were refused, and how many accepted; a failure says which one it was."""
    verdicts = Counter[bool]()
    for number in range(count):
        data = mutated(number, row.corpus, row.changes)
        try:
            verdicts[row.judge(data)] += 1
        except Exception as error:
            raise AssertionError(f"mutation {number}: {data[:2000]!r}") from error
    return verdicts


def fuzz_all(rows: dict[str, Row], total: int) -> Iterator[tuple[str, Counter[bool]]]:
    shares = sum(row.share for row in rows.values())
    for name, row in rows.items():
        yield name, fuzz(row, -(-total * row.share // shares))


def test_what_is_not_mutated_is_accepted(rows: dict[str, Row]) -> None:
    """The control: it is for the mutations that others are refused. (bob's reply is not ada's, nor another's part of a sum.)"""
    for name, row in rows.items():
        own = row.corpus[:1] if name.startswith(("reply", "secure sum")) else row.corpus
        assert all(map(row.judge, own)), name


def test_mutations_are_used_as_what_they_say_or_refused(rows: dict[str, Row]) -> None:
    for name, verdicts in fuzz_all(rows, DAILY):
        assert verdicts[False] > 10, name


@pytest.mark.slow
def test_a_million_mutations_are_used_as_what_they_say_or_refused(rows: dict[str, Row], capsys: Any) -> None:
    total = Counter[bool]()
    for name, verdicts in fuzz_all(rows, MUTATIONS):
        assert verdicts[False] > verdicts[True] / 9, name
        total += verdicts
        with capsys.disabled():
            print(f"{name}: {verdicts[False]:,} refused, {verdicts[True]:,} accepted", flush=True)
    assert total.total() >= MUTATIONS


# --- Mistakes that it must find ---


def test_a_server_that_does_not_look_at_the_size_is_found(rows: dict[str, Row], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_of_scalars, "largest_grad", lambda config: math.inf)
    with pytest.raises(AssertionError, match="mutation"):
        fuzz(rows["reply, float16"], 2000)


def test_a_second_form_of_a_message_is_found(rows: dict[str, Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the shortest form of each field is not asked for."""
    monkeypatch.setattr(federation_envelope, "bytes", lambda data: _repacked(data), raising=False)
    with pytest.raises(AssertionError, match="mutation"):
        fuzz(rows["request, TrainRequest"], 3000)


def _repacked(data: bytes) -> bytes:
    packed: bytes = msgpack.packb(msgpack.unpackb(data, raw=False), use_bin_type=True)
    return packed


def test_a_crash_is_found(rows: dict[str, Row]) -> None:
    def judge(data: bytes) -> bool:
        return len(json.loads(data)["name"]) > 3

    with pytest.raises(AssertionError, match="mutation"):
        fuzz(replace(rows["hello"], judge=judge), 200)


def test_mutations_repeat(rows: dict[str, Row]) -> None:
    for row in rows.values():
        assert mutated(17, row.corpus, row.changes) == mutated(17, row.corpus, row.changes)
        assert mutated(17, row.corpus, row.changes) != mutated(18, row.corpus, row.changes)
