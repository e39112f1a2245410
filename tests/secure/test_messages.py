"""Messages of secure sums: one form each, and whatever a stranger makes of them is refused as such."""

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.messages import SHORT
from tests.support.sums import LENGTH, names, stages

from fedkseed.errors import ProtocolError
from fedkseed.secure.client import SumClient
from fedkseed.secure.messages import (
    KeysReply,
    KeysRequest,
    MaskedReply,
    MaskedRequest,
    Message,
    SharesReply,
    SharesRequest,
    UnmaskReply,
    UnmaskRequest,
    bytes_beside,
)
from fedkseed.secure.server import SecureSum

REQUESTS: tuple[type[Message], ...] = (KeysRequest, SharesRequest, MaskedRequest, UnmaskRequest)
REPLIES: tuple[type[Message], ...] = (KeysReply, SharesReply, MaskedReply, UnmaskReply)
ONE = "client-001"
kinds = pytest.mark.parametrize("kind", [*REQUESTS, *REPLIES], ids=lambda kind: kind.__name__)


@cache
def conversation() -> list[tuple[SecureSum, SumClient, dict[str, bytes], dict[str, bytes]]]:
    return stages(ONE)


def data_of(kind: type[Message]) -> bytes:
    which, place = (2, REQUESTS.index(kind)) if kind in REQUESTS else (3, REPLIES.index(kind))
    found: bytes = conversation()[place][which][ONE]
    return found


@kinds
def test_a_message_has_one_form(kind: type[Message]) -> None:
    data = data_of(kind)
    assert kind.decode(data).encode() == data
    fields = msgpack.unpackb(data)
    longer = b"\xdc\x00" + bytes([len(fields)]) + data[1:]
    with pytest.raises(ProtocolError, match="is not packed in the shortest form"):
        kind.decode(longer)
    for other in (*REQUESTS, *REPLIES):
        if other is not kind:
            with pytest.raises(ProtocolError, match="expected its kind as first field"):
                other.decode(data)
    with pytest.raises(ProtocolError, match="this is version 1"):
        kind.decode(msgpack.packb([fields[0], 2, *fields[2:]]))


VALUES = st.one_of(
    st.none(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=20), st.binary(max_size=200), st.booleans()
)


@st.composite
def meddled(draw: Any, data: bytes) -> bytes:
    """Fields of anything, or bytes changed, cut and added."""
    if draw(st.booleans()):
        fields = msgpack.unpackb(data)
        fields[draw(st.integers(0, len(fields) - 1))] = draw(VALUES)
        changed: bytes = msgpack.packb(fields)
        return changed
    raw = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.integers(0, len(raw)))] if draw(st.booleans()) else raw) + draw(st.binary(max_size=3))


def refusal(client: SumClient, data: bytes) -> str | None:
    try:
        client.answer(data)
    except ProtocolError as error:
        return str(error)
    return None


@pytest.mark.parametrize("phase", range(4))
@given(choose=st.data())
def test_a_client_refuses_whatever_a_server_makes_up(phase: int, choose: st.DataObject) -> None:
    _, client, requests, _ = conversation()[phase]
    data = choose.draw(meddled(requests[ONE]))
    asked = copy.copy(client)
    before = asked.state
    reason = refusal(asked, data)
    assert reason is None or (asked.state == before and len(reason) < SHORT)


@pytest.mark.parametrize("phase", range(4))
@given(choose=st.data())
def test_a_server_refuses_whatever_a_client_makes_up(phase: int, choose: st.DataObject) -> None:
    server, _, _, replies = conversation()[phase]
    asked = copy.copy(server)
    asked.refusals, asked.missing = [], []
    asked._hear = getattr(asked, asked._hear.__name__)  # the copy's own
    asked.hear({**replies, ONE: choose.draw(meddled(replies[ONE]))}.items())
    assert all(len(refusal.reason) < SHORT for refusal in asked.refusals)
    assert {refusal.client for refusal in asked.refusals} <= set(names(4))


def test_replies_of_strangers_and_second_ones_are_refused() -> None:
    server, _, _, replies = conversation()[0]
    asked = copy.copy(server)
    asked.refusals, asked.missing = [], []
    asked._hear = asked._keys
    twice = [*replies.items(), (ONE, replies[ONE]), ("client-009", replies[ONE]), ("client-000", replies["client-002"])]
    asked.hear(twice)
    assert [(refusal.client, refusal.reason.split(";")[0]) for refusal in asked.refusals] == [
        ("client-000", "reply to another request: run, round, attempt or client differ"),
        (ONE, "a second reply to one request"),
        ("client-009", "'client-009' was not asked in this phase"),
    ]
    assert not asked.over


def test_bytes_are_those_that_were_reckoned() -> None:
    down, up = bytes_beside(4, LENGTH + 3, ONE)
    found = conversation()
    train = len(MaskedRequest.decode(data_of(MaskedRequest)).train)
    assert sum(len(requests[ONE]) for _, _, requests, _ in found) - train == pytest.approx(down, rel=0.1)
    assert sum(len(replies[ONE]) for *_, replies in found) == pytest.approx(up, rel=0.1)


def test_a_signature_is_whole_or_missing() -> None:
    reply = KeysReply.decode(data_of(KeysReply))
    replace(reply, signature=bytes(96))
    with pytest.raises(ProtocolError, match="signature is"):
        replace(reply, signature=b"short")
