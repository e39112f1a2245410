"""Who is let in, and how often anybody is asked who it is."""

import logging
from collections import Counter
from typing import Any

import pytest
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from tests.support.flower_grid import Answer, MemoryGrid

from fedkseed.flower import roll
from fedkseed.flower.envelope import Hello, wrap
from fedkseed.flower.roll import Roll

pytestmark = pytest.mark.usefixtures("in_a_task")
BASE = "0" * 64


def says(name: str, num_examples: int = 3) -> Answer:
    hello = Hello(name=name, base=BASE, num_examples=num_examples, num_eval_examples=0).encode()
    return lambda message: Message(wrap(hello), reply_to=message)


def lost(message: Message) -> Message:
    return Message(Error(ErrorCode.NODE_UNAVAILABLE, "gone"), reply_to=message)


def test_a_client_keeps_the_number_of_records_that_it_first_said(heard: pytest.LogCaptureFixture) -> None:
    grid = MemoryGrid()
    grid.add(1, says("a", 18))
    grid.add(2, says("b", 5))
    of_this_run = Roll(grid, BASE, num_examples={"b": 7})
    assert {name: member.hello.num_examples for name, member in of_this_run.look().items()} == {"a": 18}
    assert "'b' has 5 records, and 7 when the run met it" in heard.text
    del grid.infos[1]
    grid.add(3, says("a", 1800))  # the same name, at a node that starts anew
    assert of_this_run.look() == {}
    grid.add(4, says("a", 18))
    assert [member.node_id for member in of_this_run.look().values()] == [4]


def test_a_lost_hello_is_asked_again_later_and_later(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr(roll.time, "monotonic", lambda: clock)
    grid = MemoryGrid()
    grid.add(1, lost)
    grid.add(2, says("b"))
    looks = Roll(grid, BASE)
    asked_at = []
    for _ in range(2400):  # twenty minutes of looks, two a second
        before = len(grid.sent)
        assert list(looks.look()) == ["b"]
        asked_at += [clock - 1000.0] * sum(message.metadata.dst_node_id == 1 for message in grid.sent[before:])
        clock += 0.5
    assert asked_at == [0, 5, 15, 35, 75, 155, 315, 615, 915]
    grid.answers[1] = says("a")
    clock += 300
    assert list(looks.look()) == ["a", "b"]


def test_a_node_with_another_name_leaves_its_old_one() -> None:
    grid = MemoryGrid()
    grid.add(1, says("a"))
    looks = Roll(grid, BASE)
    assert list(looks.look()) == ["a"]
    grid.add(1, says("b"))
    grid.infos[1].last_activated_at = "later"
    assert list(looks.look()) == ["b"]
    grid.add(2, says("a"))
    assert {name: member.node_id for name, member in looks.look().items()} == {"a": 2, "b": 1}


def test_letting_in_costs_the_same_for_each_node(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Counted in steps of Python, not in seconds: a look at n new nodes takes n times what one takes."""
    caplog.set_level(logging.WARNING)
    counts = {}
    for n in (50, 400):
        grid = MemoryGrid()
        for i in range(n):
            grid.add(i, says(f"client-{i}"))
        looks = Roll(grid, BASE)
        counted: Counter[str] = Counter()
        members = CountedDict(counted)
        monkeypatch.setattr(looks, "_members", members)
        assert len(looks.look()) == n
        counts[n] = counted["items"]
    assert counts[400] <= 8 * counts[50]


class CountedDict(dict[str, Any]):
    """A dict that counts the items that are gone through."""

    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()
        self._counted = counted

    def items(self) -> Any:
        self._counted["items"] += len(self)
        return super().items()


@pytest.mark.parametrize("now", [says("a", 1800), says("c", 7)], ids=["records", "name"])
def test_a_member_that_is_turned_away_is_none(now: Answer) -> None:
    """It has started again and says something else; nobody is asked at its old name."""
    grid = MemoryGrid()
    grid.add(1, says("a", 18))
    looks = Roll(grid, BASE, num_examples={"c": 8})
    assert list(looks.look()) == ["a"]
    grid.answers[1] = now
    grid.infos[1].last_activated_at = "later"
    assert looks.look() == {}
    grid.answers[1] = says("a", 18)
    grid.infos[1].last_activated_at = "later still"
    assert list(looks.look()) == ["a"]


def test_a_member_whose_hello_fails_once_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr(roll.time, "monotonic", lambda: clock)
    grid = MemoryGrid()
    grid.add(1, says("a", 18))
    looks = Roll(grid, BASE)
    assert list(looks.look()) == ["a"]
    error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the node's worker ended in the middle of its work")
    grid.answers[1] = lambda message: Message(error, reply_to=message)
    grid.infos[1].last_activated_at = "later"
    assert list(looks.look()) == ["a"]
    grid.answers[1] = says("a", 18)
    clock += 10
    before = len(grid.sent)
    assert list(looks.look()) == ["a"]
    assert len(grid.sent) == before + 1  # asked again, since what it is now is not known


def test_an_answer_to_an_older_hello_is_none() -> None:
    """A node has started again before it answered; what it says late, of its first start, is of nobody who is there."""
    grid = MemoryGrid()
    held: list[Message] = []
    grid.add(1, lambda message: held.append(message))  # type: ignore[arg-type,return-value,func-returns-value]
    looks = Roll(grid, BASE)
    assert looks.look() == {}
    grid.infos[1].last_activated_at = "later"
    grid.answers[1] = says("a", 18)
    assert list(looks.look()) == ["a"]
    assert list(looks.look()) == ["a"]
    assert len({message.metadata.message_id for message in held}) <= 1
