"""Messages one at a time: made when asked for, laid by in any order, on the disk where they are many."""

import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kseed.test_server import reply_to, server

from fedkseed.errors import RunError
from fedkseed.federation import streams
from fedkseed.federation.streams import InTurn, Read, Requests, Taken, place_of
from fedkseed.kseed.messages import TrainReply, TrainRequest


def test_a_request_is_made_when_it_is_asked_for_and_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEPT", 2)
    made: list[str] = []
    requests = Requests(["a", "b", "c"], lambda name: made.append(name) or name.upper())  # type: ignore[func-returns-value]
    assert (len(requests), list(requests), "b" in requests, "d" in requests, made) == (3, ["a", "b", "c"], True, False, [])
    assert (requests["c"], requests["c"], requests.get("d"), made) == ("C", "C", None, ["c"])
    assert list(requests.values()) == ["A", "B", "C"]
    assert requests["c"] == "C"
    assert made == ["c", "a", "b", "c"]  # of three the last two are kept
    with pytest.raises(KeyError):
        requests["d"]
    turn = InTurn(requests)
    assert (turn[0], turn[-1], turn[1:], len(turn), turn == ["A", "B", "C"]) == ("A", "C", ("B", "C"), 3, True)
    assert turn != ["A", "B"]


@given(names=st.sets(st.sampled_from("abcdefgh")), limit=st.sampled_from([1, 5, 1000]), data=st.data())
@settings(max_examples=50, deadline=None)
def test_messages_come_back_in_the_order_of_the_names(names: set[str], limit: int, data: st.DataObject) -> None:
    before, streams.IN_MEMORY = streams.IN_MEMORY, limit
    try:
        taken = Taken(list("abcdefgh"))
    finally:
        streams.IN_MEMORY = before
    order = data.draw(st.permutations(sorted(names)))
    for name in order:
        taken.add(name, name.encode() * 3)
        assert taken[name] == name.encode() * 3
    assert dict(taken) == {name: name.encode() * 3 for name in sorted(names)}
    assert list(taken) == sorted(names)
    read = Read(taken, bytes.decode)
    assert list(read.values()) == [name * 3 for name in sorted(names)]
    assert ("a" in read, len(read)) == ("a" in names, len(names))
    with pytest.raises(KeyError):
        taken["x"]


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Taken(["a"])
    monkeypatch.setattr(streams, "IN_MEMORY", 0)

    class Full:
        def seek(self, place: int) -> None:
            pass

        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

    taken._file = Full()
    with pytest.raises(RunError, match=r"cannot keep a round's replies \(No space left on device\); make room, or let TMPDIR"):
        taken.add("a", b"x")


def test_nobody_else_can_open_what_is_laid_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(streams, "IN_MEMORY", 1)
    taken = Taken(["a"])
    taken.add("a", b"secret")
    assert (list(tmp_path.iterdir()), taken["a"]) == ([], b"secret")


@pytest.mark.parametrize("name", ["", "a", "b", "bb", "z"])
def test_a_place_is_that_of_the_name(name: str) -> None:
    assert place_of(name, ["a", "b"]) == {"a": 0, "b": 1}.get(name)


def test_a_round_holds_few_messages_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "KEPT", 8)
    a_server = server([f"client-{i:03}" for i in range(60)], fraction_train=1.0, aggregator="clipped")
    alive, planned = list[int](), a_server.plan()
    close = a_server._step

    def count() -> None:
        alive.append(sum(type(one) in (TrainRequest, TrainReply) for one in gc.get_objects()))

    def replies() -> Iterator[tuple[str, bytes]]:
        for request in planned:
            yield request.client, reply_to(request).encode()
        count()

    def step(*totals: Any) -> None:
        count()
        close(*totals)

    monkeypatch.setattr(a_server, "_step", step)
    count()
    outcome = a_server.absorb(replies())
    before, *others = alive
    assert (len(outcome.contributions), len(others)) == (60, 2)
    assert max(others) <= before + 16
