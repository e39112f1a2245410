"""A baseline's server, client and messages, without a language model: the average, refusals, bytes, dropped steps, the file.

Every law runs over every row of the contract table in tests/support/baselines.py.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from tests.support.baselines import ROWS, Tensors, algorithms, assert_close, train_by_hand
from tests.support.messages import NAMES, POSITIVE, SHORT

import fedkseed as fk
from fedkseed.baselines import TensorClient, TensorServer, TunedTensors
from fedkseed.baselines.messages import TensorReply, TensorRequest, pack_tensors, size_cap, tensors_digest, unpack_tensors
from fedkseed.errors import ProtocolError, RunError
from fedkseed.federation import FederationConfig
from fedkseed.federation.algorithms import ALGORITHMS
from fedkseed.kseed.messages import TrainReply
from fedkseed.kseed.rounding import pack
from fedkseed.randomness import derive

# --- The average ---

BASE = bytes(range(32)).hex()
CLIENTS = ("ada", "bob", "cy", "dee")
SHAPES = {"a": torch.Size([2, 3]), "b": torch.Size([5]), "scalar": torch.Size([])}
SIZES = {"ada": 3, "bob": 17, "cy": 5, "dee": 100}


def config(algorithm: str, **changes: Any) -> FederationConfig:
    own = {name: value for name, value in ROWS[algorithm].settings.items() if name != "local_steps"}
    given = {"algorithm": algorithm, "lr": 0.5, "num_rounds": 5, "fraction_train": 1.0, "local_steps": 6, "seed": 7}
    return FederationConfig(**(given | own | changes))


def some_tensors(*seed: int) -> dict[str, torch.Tensor]:
    draw = np.random.default_rng(seed)
    return {name: torch.tensor(draw.standard_normal(shape), dtype=torch.float32) for name, shape in SHAPES.items()}


def server(algorithm: str, clients: Sequence[str] = CLIENTS, **changes: Any) -> TensorServer:
    return TensorServer(config(algorithm, **changes), TunedTensors(algorithm, BASE, 0, some_tensors(0)), clients)


def reply_to(request: TensorRequest, tensors: Tensors | None = None, **changes: Any) -> TensorReply:
    """An honest answer with tensors that depend on client and round, or one with some fields changed."""
    own = some_tensors(*request.client.encode(), request.server_round)
    answer = TensorReply(
        **request.head(),
        num_examples=SIZES[request.client],
        loss=2.0,
        dropped=0,
        tensors=pack_tensors(own if tensors is None else tensors),
    )
    return replace(answer, **changes)


def honest(requests: Sequence[TensorRequest]) -> dict[str, bytes]:
    return {request.client: reply_to(request).encode() for request in requests}


def average(replies: Mapping[str, bytes], weights: Mapping[str, float]) -> dict[str, np.ndarray]:
    """sum_i p_i x_i in NumPy, with the weights divided by their sum."""
    total = math.fsum(weights[client] for client in replies)
    sums = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for client, data in replies.items():
        tensors = unpack_tensors(TensorReply.decode(data, 10**6).tensors)
        for name in sums:
            sums[name] = sums[name] + weights[client] / total * tensors[name].numpy().astype(np.float64)
    return sums


def same_average(tensors: Tensors, expected: Mapping[str, np.ndarray]) -> bool:
    """To the rounding of float32."""
    return all(np.allclose(tensors[name].numpy(), x, rtol=2**-23, atol=1e-12) for name, x in expected.items())


@algorithms
@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_the_average_is_that_of_the_formula(algorithm: str, weighting: str) -> None:
    a_server = server(algorithm, weighting=weighting, max_share=1.0)
    equal = dict.fromkeys(CLIENTS, 1)
    right, wrong = (SIZES, equal) if weighting == "examples" else (equal, SIZES)
    for server_round in (1, 2):
        requests = a_server.plan()
        assert all(request.tensors == pack_tensors(a_server.checkpoint.tensors) for request in requests)
        replies = honest(requests)
        if server_round == 2:
            del replies["bob"]
        outcome = a_server.absorb(list(replies.items()))
        assert (outcome.status, outcome.refusals) == ("closed", ())
        assert outcome.missing == (() if server_round == 1 else ("bob",))
        total = sum(right[client] for client in replies)
        assert {c.client: c.weight for c in outcome.contributions} == {client: right[client] / total for client in replies}
        found = a_server.checkpoint
        assert found.round == server_round
        assert all(x.dtype == torch.float32 and x.shape == SHAPES[name] for name, x in found.tensors.items())
        assert same_average(found.tensors, average(replies, right))
        assert not same_average(found.tensors, average(replies, wrong))  # the negative control


@algorithms
def test_the_order_of_arrival_changes_no_bit(algorithm: str) -> None:
    digests, outcomes, controls = set(), set(), set()
    for order in permutations(CLIENTS):
        a_server = server(algorithm)
        replies = honest(a_server.plan())
        arrived = [(client, replies[client]) for client in order] + [("bob", b"junk"), ("eve", replies["ada"])]
        outcomes.add(repr(a_server.absorb(iter(arrived[::-1]))))
        digests.add(a_server.checkpoint.digest())
        sums = torch.zeros(SHAPES["a"])
        for client in order:  # the negative control: float32, as the replies come
            sums += SIZES[client] / 125 * unpack_tensors(TensorReply.decode(replies[client], 10**6).tensors)["a"]
        controls.add(sums.numpy().tobytes())
    assert len(digests) == len(outcomes) == 1
    assert len(controls) > 1


@algorithms
def test_a_request_says_what_was_decided(algorithm: str) -> None:
    a_server = server(algorithm, fraction_train=0.5, batch_size=4)
    requests = a_server.plan()
    assert len(requests) == 2
    assert a_server.plan() == requests
    for request in requests:
        assert (request.server_round, request.attempt, request.algorithm) == (1, 0, algorithm)
        assert (request.lr, request.batch_size, request.steps, request.num_steps) == (0.5, 4, 6, 6)
        assert request.base.hex() == BASE
        assert request.digest == tensors_digest(request.tensors)
        assert TensorRequest.decode(request.encode(), size_cap(SHAPES)) == request
    a_server.absorb([])
    assert {request.attempt for request in a_server.plan()} == {1}
    assert server(algorithm, seed=8).plan()[0].run_id != requests[0].run_id


# --- Refusals ---


def other(name: str, x: torch.Tensor) -> Callable[[TensorReply], bytes]:
    """The reply with another tensor under that name."""
    return lambda reply: replace(reply, tensors=save({**unpack_tensors(reply.tensors), name: x})).encode()


def holding(value: float) -> Callable[[TensorReply], bytes]:
    x = torch.zeros(SHAPES["a"])
    x[1, 2] = value
    return other("a", x)


def with_field(at: int, value: Any) -> Callable[[TensorReply], bytes]:
    """The reply's bytes with one field of the array replaced, past the checks of the class."""

    def changed(reply: TensorReply) -> bytes:
        fields = msgpack.unpackb(reply.encode())
        fields[at] = value
        return msgpack.packb(fields)

    return changed


def seed_reply(reply: TensorReply) -> bytes:
    """What a client of FedKSeed would send."""
    head = reply.head()
    grads = pack(np.ones(6), "float16", 0)
    return TrainReply(**head, num_examples=3, projected_grads=grads, dropped=(), loss=2.0).encode()


NUM_EXAMPLES, DROPPED, TENSORS = 8, 10, 11
INTEGERS = r"expected an integer from 1 to 9007199254740992"
REFUSED: dict[str, tuple[Callable[[TensorReply], bytes], str]] = {
    "nothing": (lambda reply: b"", r"message is not msgpack"),
    "not msgpack": (lambda reply: b"\xc1junk", r"message is not msgpack"),
    "truncated": (lambda reply: reply.encode()[:-1], r"message is not msgpack"),
    "a tail": (lambda reply: reply.encode() + b"x", r"message is not msgpack"),
    "a FedKSeed reply": (seed_reply, r"message is not a reply"),
    "a request": (with_field(0, "t?"), r"message is not a reply"),
    "another version": (with_field(1, 2), r"protocol version is 2; this is version 1"),
    "a field less": (lambda r: msgpack.packb(msgpack.unpackb(r.encode())[:-1]), r"reply has 11 fields; expected 12"),
    "another run": (lambda r: replace(r, run_id=b"12345678").encode(), r"another request: run_id is '3132"),
    "another round": (lambda r: replace(r, server_round=2).encode(), r"another request: server_round is 2, expected 1"),
    "another attempt": (lambda r: replace(r, attempt=1).encode(), r"another request: attempt is 1, expected 0"),
    "another client": (lambda r: replace(r, client="bob").encode(), r"another request: client is 'bob', expected 'ada'"),
    "another base": (lambda r: replace(r, base=bytes(32)).encode(), r"another request: base is '0000"),
    "another digest": (lambda r: replace(r, digest=bytes(32)).encode(), r"another request: digest is '0000"),
    "a loss that is no number": (with_field(9, math.nan), r"loss is nan; expected a finite float"),
    "no safetensors": (with_field(TENSORS, b"junk"), r"tensors are not a safetensors file"),
    "tensors cut": (lambda r: replace(r, tensors=r.tensors[:-1]).encode(), r"tensors are not a safetensors file"),
    "no bytes": (with_field(TENSORS, 5), r"tensors are 5; expected the bytes of a safetensors file"),
    "a text": (with_field(TENSORS, "x"), r"tensors are 'x'; expected the bytes of a safetensors file"),
    "no tensor at all": (with_field(TENSORS, save({})), r"tensor 'a' is missing"),
    "a tensor is missing": (
        lambda r: replace(r, tensors=save({k: v for k, v in unpack_tensors(r.tensors).items() if k != "b"})).encode(),
        r"tensor 'b' is missing",
    ),
    "a tensor more": (other("zoo", torch.zeros(1)), r"tensor 'zoo' came unasked"),
    "transposed": (other("a", torch.zeros(3, 2)), r"a is torch\.float32\[3, 2\]; expected float32\[2, 3\]"),
    "flat": (other("a", torch.zeros(6)), r"a is torch\.float32\[6\]; expected float32\[2, 3\]"),
    "one element for none": (other("scalar", torch.zeros(1)), r"scalar is torch\.float32\[1\]; expected float32\[\]"),
    "float16": (other("a", torch.zeros(2, 3).half()), r"a is torch\.float16\[2, 3\]; expected float32"),
    "bfloat16": (other("a", torch.zeros(2, 3).bfloat16()), r"a is torch\.bfloat16\[2, 3\]; expected float32"),
    "float64": (other("a", torch.zeros(2, 3).double()), r"a is torch\.float64\[2, 3\]; expected float32"),
    "integers": (other("a", torch.zeros(2, 3).int()), r"a is torch\.int32\[2, 3\]; expected float32"),
    "truth values": (other("a", torch.zeros(2, 3).bool()), r"a is torch\.bool\[2, 3\]; expected float32"),
    "NaN": (holding(math.nan), r"a holds a number that is not finite"),
    "inf": (holding(math.inf), r"a holds a number that is not finite"),
    "-inf": (holding(-math.inf), r"a holds a number that is not finite"),
    "large": (holding(101.0), r"a holds 101; at most 100 is accepted"),
    "large and negative": (holding(-101.0), r"a holds 101; at most 100 is accepted"),
    "no examples": (with_field(NUM_EXAMPLES, 0), rf"num_examples is 0; {INTEGERS}"),
    "fewer than no examples": (with_field(NUM_EXAMPLES, -5), rf"num_examples is -5; {INTEGERS}"),
    "half an example": (with_field(NUM_EXAMPLES, 1.5), rf"num_examples is 1\.5; {INTEGERS}"),
    "more examples than any": (with_field(NUM_EXAMPLES, 2**60), rf"num_examples is {2**60}; {INTEGERS}"),
    "more examples than allowed": (with_field(NUM_EXAMPLES, 1001), r"num_examples is 1001; at most 1000 are accepted"),
    "more dropped than steps": (with_field(DROPPED, 7), r"7 steps were dropped of 6; expected no more"),
    "fewer than none dropped": (with_field(DROPPED, -1), r"number of dropped steps is -1; expected an integer"),
}
LIMITS: dict[str, Any] = {"max_value": 100.0, "max_examples": 1000}


@algorithms
@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_reply_is_refused_and_the_round_is_as_without_it(algorithm: str, case: str) -> None:
    spoil, reason = REFUSED[case]
    a_server, without = server(algorithm, **LIMITS), server(algorithm, **LIMITS)
    requests = a_server.plan()
    replies = honest(requests)
    outcome = a_server.absorb(list((replies | {"ada": spoil(reply_to(requests[0]))}).items()))
    (refusal,) = outcome.refusals
    assert refusal.client == "ada"
    assert "\n" not in refusal.reason
    assert len(refusal.reason) <= SHORT
    assert re.search(reason, refusal.reason), refusal.reason
    assert outcome.status == "closed"
    assert [c.client for c in outcome.contributions] == ["bob", "cy", "dee"]
    replies = honest(without.plan())
    del replies["ada"]
    without.absorb(list(replies.items()))
    assert a_server.checkpoint.digest() == without.checkpoint.digest()
    usual = server(algorithm, **LIMITS)
    usual.absorb(list(honest(usual.plan()).items()))  # the honest reply does count
    assert a_server.checkpoint.digest() != usual.checkpoint.digest()
    assert len(usual.plan()) == 4


@algorithms
def test_a_second_reply_and_a_stranger_are_refused(algorithm: str) -> None:
    usual, a_server = server(algorithm, fraction_train=0.75), server(algorithm, fraction_train=0.75)
    replies = honest(a_server.plan())
    (left_out,) = set(CLIENTS) - set(replies)
    again = TensorReply.decode(replies[min(replies)], 10**6)
    arrived = [*replies.items(), (min(replies), replies[min(replies)]), (left_out, replace(again, client=left_out).encode())]
    outcome = a_server.absorb([*arrived, ("eve", replace(again, client="eve").encode())])
    assert sorted((r.client, r.reason) for r in outcome.refusals) == sorted(
        [
            (min(replies), "a second reply to one request"),
            (left_out, f"{left_out!r} was not asked in this round"),
            ("eve", "'eve' was not asked in this round"),
        ]
    )
    usual.absorb(list(honest(usual.plan()).items()))
    assert a_server.checkpoint.digest() == usual.checkpoint.digest()


@algorithms
def test_a_reply_that_is_too_large_is_refused_unread(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a_server = server(algorithm)
    cap = size_cap(SHAPES)
    replies = honest(a_server.plan())
    assert max(map(len, replies.values())) < cap
    unpackb, read = msgpack.unpackb, []

    def listen(data: bytes, **options: Any) -> Any:
        read.append(len(data))
        return unpackb(data, **options)

    monkeypatch.setattr("fedkseed.federation.envelope.msgpack.unpackb", listen)
    large = other("zoo", torch.zeros(cap // 4))(reply_to(a_server.plan()[0]))
    outcome = a_server.absorb(list((replies | {"ada": large}).items()))
    assert [r.reason for r in outcome.refusals] == [f"message has {len(large)} bytes; at most {cap} are accepted"]
    assert 0 < max(read) <= cap


def test_the_cap_leaves_room_for_honest_messages_of_long_names() -> None:
    shapes = {f"model.layers.{i}.self_attn.q_proj.lora_A.default.{'weight' * 10}": torch.Size([1]) for i in range(200)}
    shapes["empty"] = torch.Size([0, 7])
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    (request,) = server("fedavg", clients=["a" * 64]).plan()
    packed = pack_tensors(tensors)
    request = replace(request, tensors=packed, digest=tensors_digest(packed))
    assert TensorRequest.decode(request.encode(), size_cap(shapes)) == request
    sent = replace(a_reply(), client="a" * 64, tensors=packed, num_examples=2**53)
    assert TensorReply.decode(sent.encode(), size_cap(shapes)) == sent


def test_a_round_without_a_usable_reply_is_repeated_and_nothing_moves() -> None:
    a_server = server("fedit")
    before = a_server.checkpoint.digest()
    statuses = []
    for _ in range(3):
        statuses.append(a_server.absorb([(request.client, b"") for request in a_server.plan()]).status)
    assert statuses == ["repeat", "repeat", "failed"]
    assert a_server.checkpoint.digest() == before


def a_reply() -> TensorReply:
    return reply_to(server("fedavg").plan()[0])


@settings(max_examples=150)
@given(st.data())
def test_no_bytes_of_a_client_do_anything_but_count_or_be_refused(data: st.DataObject) -> None:
    a_server = server("fedavg", **LIMITS)
    replies = honest(a_server.plan())
    sent = bytearray(replies["ada"])
    for _ in range(data.draw(st.integers(1, 4))):
        # most of the structure is in the first bytes: the head, and safetensors' own
        at = data.draw(st.integers(0, len(sent) - 1) | st.integers(0, min(400, len(sent) - 1)))
        sent[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        if not sent:
            break
    outcome = a_server.absorb(list((replies | {"ada": bytes(sent)}).items()))
    assert outcome.status == "closed"
    accepted = [c.client for c in outcome.contributions]
    assert accepted in (list(CLIENTS), ["bob", "cy", "dee"])
    assert len(outcome.refusals) == 4 - len(accepted)
    assert all(torch.isfinite(x).all() for x in a_server.checkpoint.tensors.values())


# --- Messages ---

NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@st.composite
def packed_tensors(draw: st.DrawFn) -> bytes:
    shapes = draw(
        st.dictionaries(
            st.text(st.characters(categories=["L", "N", "P"]), max_size=20), st.lists(st.integers(0, 3), max_size=3), max_size=4
        )
    )
    found = {}
    for name, shape in shapes.items():
        if name != "__metadata__":
            count = math.prod(shape)
            found[name] = torch.tensor(draw(st.lists(NUMBERS, min_size=count, max_size=count)), dtype=torch.float32).reshape(
                shape
            )
    return pack_tensors(found)


HEAD = {
    "run_id": st.binary(min_size=8, max_size=8),
    "server_round": st.integers(1, 2**31),
    "attempt": st.integers(0, 255),
    "client": NAMES,
    "base": st.binary(min_size=32, max_size=32),
}
REQUESTS = packed_tensors().flatmap(
    lambda packed: st.builds(
        TensorRequest,
        **HEAD,
        digest=st.just(tensors_digest(packed)),
        lr=POSITIVE,
        batch_size=st.integers(1, 65535),
        algorithm=st.sampled_from(sorted(ROWS)),
        steps=st.integers(1, 65535),
        tensors=st.just(packed),
    )
)
REPLIES = st.builds(
    TensorReply,
    **HEAD,
    digest=st.binary(min_size=32, max_size=32),
    num_examples=st.integers(1, 2**53),
    loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    dropped=st.integers(0, 65535),
    tensors=packed_tensors(),
)
CAP = 10**6


@given(REQUESTS | REPLIES)
def test_a_message_comes_back_from_its_bytes(sent: TensorRequest | TensorReply) -> None:
    data = sent.encode()
    arrived = type(sent).decode(data, len(data))
    assert arrived == sent
    assert arrived.encode() == data
    tensors, again = unpack_tensors(sent.tensors), unpack_tensors(arrived.tensors)
    assert tensors.keys() == again.keys()
    assert all(torch.equal(x, again[name]) for name, x in tensors.items())
    assert pack_tensors(again) == sent.tensors
    with pytest.raises(ProtocolError, match=r"message has \d+ bytes; at most \d+ are accepted"):
        type(sent).decode(data, len(data) - 1)


def decoded_or_refused(cls: type[TensorRequest] | type[TensorReply], data: bytes) -> None:
    try:
        found = cls.decode(data, CAP)
    except ProtocolError as error:
        reason = str(error)
    else:
        assert type(found) is cls
        assert cls.decode(found.encode(), CAP) == found
        return
    assert 0 < len(reason) <= SHORT
    assert "\n" not in reason


@pytest.mark.parametrize("cls", [TensorRequest, TensorReply], ids=lambda cls: cls.__name__)
@given(data=st.data())
def test_any_bytes_are_a_message_or_refused(cls: type[TensorRequest] | type[TensorReply], data: st.DataObject) -> None:
    decoded_or_refused(cls, data.draw(st.binary(max_size=200)))
    fields = msgpack.unpackb((server("fedavg").plan()[0] if cls is TensorRequest else a_reply()).encode())
    anything = (
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats()
        | st.text(max_size=9)
        | st.binary(max_size=40)
    )
    value = data.draw(anything | st.lists(anything, max_size=3) | st.dictionaries(st.text(max_size=3), anything, max_size=2))
    fields[data.draw(st.integers(0, len(fields) - 1))] = value
    decoded_or_refused(cls, msgpack.packb(fields))


def test_the_tensors_of_a_request_must_have_its_digest() -> None:
    (request, *_) = server("fedavg").plan()
    fields = msgpack.unpackb(request.encode())
    tensors = bytearray(request.tensors)
    tensors[-1] ^= 1
    fields[-1] = bytes(tensors)
    with pytest.raises(ProtocolError, match=r"the tensors do not have the digest that came with them"):
        TensorRequest.decode(msgpack.packb(fields), CAP)


def test_bytes_are_frozen() -> None:
    """A server and clients of different versions of this package must understand each other: positional fields."""
    tensors = {"w": torch.tensor([0.5, -2.0])}
    numbers = np.array([0.5, -2.0], "<f4").tobytes()
    header = b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    header += b" " * (-len(header) % 8)
    packed = len(header).to_bytes(8, "little") + header + numbers
    assert pack_tensors(tensors) == packed
    head = [b"run-id-8", 3, 1, "ada", bytes(range(32)), tensors_digest(packed)]
    request = TensorRequest(*head, 0.5, 2, "fedit", 6, packed)
    reply = TensorReply(*head, 100, 2.5, 1, packed)
    assert request.encode() == msgpack.packb(["t?", 1, *head, 0.5, 2, "fedit", 6, packed])
    assert reply.encode() == msgpack.packb(["t!", 1, *head, 100, 2.5, 1, packed])


# --- The client ---


class Toy:
    """Records x with the loss (w x - 1)^2; the losses of some steps are spoilt."""

    num_examples = 5

    def __init__(self, model: torch.nn.Linear, spoilt: Mapping[int, float], probes: int) -> None:
        self.model, self.spoilt, self.probes, self.calls = model, spoilt, probes, 0
        self.batches: list[list[int]] = []

    def differentiable_loss(self, records: Any) -> torch.Tensor:
        self.batches.append(records.tolist())
        step = self.calls // self.probes
        self.calls += 1
        return toy_loss(self.model.weight, records.tolist()) + self.spoilt.get(step, 0.0)

    def loss(self, records: Any) -> float:
        with torch.inference_mode():
            return self.differentiable_loss(records).item()


def toy_loss(weight: torch.Tensor, records: Sequence[int]) -> torch.Tensor:
    x = torch.tensor([[1.0, 0.1 * i, -0.05 * i * i] for i in records])
    return ((x @ weight.T - 1) ** 2).mean()


def toy(
    algorithm: str, steps: int, spoilt: Mapping[int, float], lr: float = 0.05, **changes: Any
) -> tuple[TensorClient, TensorRequest, Toy]:
    model = torch.nn.Linear(3, 1, bias=False)
    start = TunedTensors(algorithm, BASE, 0, {"weight": torch.tensor([[0.5, -0.25, 2.0]])})
    settings = config(algorithm, lr=lr, local_steps=steps, batch_size=2, **changes)
    task = Toy(model, spoilt, 2 if ALGORITHMS[algorithm].measures == "two-point" else 1)
    (request,) = TensorServer(settings, start, ["ada"]).plan()
    return TensorClient("ada", settings, model, BASE, task), request, task


def answered(client: TensorClient, request: TensorRequest) -> tuple[TensorReply, torch.Tensor]:
    reply = TensorReply.decode(client.answer(request.encode()), CAP)
    return reply, unpack_tensors(reply.tensors)["weight"]


@algorithms
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_with_a_loss_that_is_not_finite_is_dropped(algorithm: str, bad: float) -> None:
    """And counts for nothing: the other steps are those of an optimiser that never heard of it."""
    client, request, task = toy(algorithm, 5, {1: bad, 3: bad})
    reply, weight = answered(client, request)
    assert reply.dropped == reply.num_dropped == 2
    assert reply.loss is not None
    assert math.isfinite(reply.loss)
    kept = [0, 2, 4]
    if algorithm == "fedzo":
        key = derive(int.from_bytes(request.run_id, "little"), 1, 0, "ada", "pool")
        pool = fk.SeedPool(key, 5, "hadamard")
        w = torch.tensor([[0.5, -0.25, 2.0]])
        for t in kept:
            z = torch.from_numpy(pool.perturbation("weight", 3, t)).reshape(1, 3)
            plus, minus = (toy_loss(w + s * 0.01 * z, task.batches[2 * t]) for s in (1, -1))
            w = w - 0.05 * (plus - minus) / 0.02 * z
        expected = {"weight": w}
    else:
        optimizer = ROWS[algorithm].optimizer
        losses = lambda leaves, i: toy_loss(leaves["weight"], task.batches[kept[i]])  # noqa: E731
        expected = train_by_hand(optimizer, {"weight": torch.tensor([[0.5, -0.25, 2.0]])}, losses, 3, 0.05)
    assert_close({"weight": weight}, expected, 1e-4)
    untouched, request, _ = toy(algorithm, 5, {})
    with pytest.raises(AssertionError):
        assert_close({"weight": answered(untouched, request)[1]}, expected, 1e-4)


@algorithms
def test_nothing_but_dropped_steps_leaves_the_parameters_alone(algorithm: str) -> None:
    client, request, _ = toy(algorithm, 4, dict.fromkeys(range(4), math.nan))
    reply, weight = answered(client, request)
    assert (reply.dropped, reply.loss) == (4, None)
    # probing forth and back rounds; the others do not touch them at all
    tolerance = 2e-6 if algorithm == "fedzo" else 0.0
    assert_close({"weight": weight}, unpack_tensors(request.tensors), tolerance)


def test_fedzo_drops_a_step_whose_losses_differ_too_much() -> None:
    client, request, _ = toy("fedzo", 4, {}, loss_clip=1e-9)
    assert answered(client, request)[0].dropped == 4


@algorithms
def test_every_loss_is_heard(algorithm: str) -> None:
    client, request, task = toy(algorithm, 3, {1: math.nan})
    heard: list[tuple[int, float]] = []
    client.answer(request.encode(), lambda step, loss: heard.append((step, loss)))
    assert [step for step, _ in heard] == [step for step in range(3) for _ in range(task.probes)]
    assert [step for step, loss in heard if math.isnan(loss)] == [1] * task.probes


@algorithms
def test_a_client_remembers_nothing_between_rounds(algorithm: str) -> None:
    client, request, _ = toy(algorithm, 3, {})
    first = client.answer(request.encode())
    assert client.answer(request.encode()) == first


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"client": "bob"}, r"request is for client 'bob'; this is 'ada'"),
        ({"base": bytes(32)}, r"request is for base model 0000.*, this client has 0001.*; load the same base weights"),
        ({"algorithm": "fedprompt"}, r"request is for 'fedprompt'; this client runs fedavg"),
        ({"tensors": pack_tensors({})}, r"tensor 'weight' is missing"),
        ({"tensors": pack_tensors({"weight": torch.zeros(1, 3), "v": torch.zeros(1)})}, r"tensor 'v' came unasked"),
        ({"tensors": pack_tensors({"weight": torch.zeros(3)})}, r"weight is torch\.float32\[3\]; expected float32\[1, 3\]"),
        ({"tensors": pack_tensors({"weight": torch.zeros(1, 3).half()})}, r"weight is torch\.float16\[1, 3\]; expected"),
        ({"tensors": pack_tensors({"weight": torch.full((1, 3), math.nan)})}, r"weight holds a number that is not finite"),
    ],
    ids=str,
)
def test_a_request_that_is_not_for_this_client_is_refused_before_anything_changes(changes: dict[str, Any], reason: str) -> None:
    client, request, task = toy("fedavg", 3, {})
    before = task.model.weight.detach().clone()
    if "tensors" in changes:
        changes = changes | {"digest": tensors_digest(changes["tensors"])}
    with pytest.raises(ProtocolError, match=reason):
        client.answer(replace(request, **changes).encode())
    with pytest.raises(ProtocolError, match=r"message is not msgpack"):
        client.answer(b"")
    assert torch.equal(task.model.weight, before)
    assert task.calls == 0


# --- The checkpoint's file ---


@algorithms
def test_a_checkpoint_is_a_function_of_its_content(tmp_path: Path, algorithm: str) -> None:
    tensors = some_tensors(1)
    tuned = TunedTensors(algorithm, BASE, 3, tensors)
    tuned.save(tmp_path / "a")
    loaded = TunedTensors.load(tmp_path / "a")
    assert (loaded.algorithm, loaded.base, loaded.round) == (algorithm, BASE, 3)
    assert all(torch.equal(loaded.tensors[name], x) for name, x in tensors.items())
    again = TunedTensors(algorithm, BASE, 3, dict(reversed(tensors.items())))
    assert loaded.digest() == tuned.digest() == again.digest()
    changed = [replace(tuned, round=4), replace(tuned, base=bytes(32).hex()), replace(tuned, algorithm="fedkseed")]
    changed.append(replace(tuned, tensors={**tensors, "b": tensors["b"] + 1}))
    assert len({x.digest() for x in [tuned, *changed]}) == 5


@pytest.mark.parametrize("failing", ["replace", "open"])
def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    path = tmp_path / "tensors.safetensors"
    TunedTensors("fedavg", BASE, 1, some_tensors(1)).save(path)
    before = path.read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, failing, full)
        with pytest.raises(RunError, match=r"tensors\.safetensors: cannot save the tensors of round 2 \(No space left"):
            TunedTensors("fedavg", BASE, 2, some_tensors(2)).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"",
        lambda data: data[:7],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b"fedkseed_baseline", b"fedkseed_baselime"),
        lambda data: data.replace(b'\\"format\\":1', b'\\"format\\":2'),
        lambda data: data.replace(b'\\"round\\":3', b'\\"round\\":x'),
        lambda data: data.replace(b"F32", b"F99"),
        lambda data: save({"a": torch.zeros(1)}),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "tensors.safetensors"
    data = TunedTensors("fedavg", BASE, 3, some_tensors(1)).encode()
    assert spoil(data) != data
    path.write_bytes(spoil(data))
    with pytest.raises(RunError, match=r"tensors\.safetensors: not a baseline's tensors, or damaged .*restore them"):
        TunedTensors.load(path)


def test_a_checkpoint_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"x: cannot read the run's tensors \(No such file or directory\)"):
        TunedTensors.load(tmp_path / "x")
