"""Flower without its network: a grid in memory, real client apps behind it, and the server app's strategy in front."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedkseed.flower import client_app, exchange
from fedkseed.flower import strategy as flower_strategy
from fedkseed.flower.building import build_strategy
from fedkseed.flower.config import read_config
from fedkseed.flower.envelope import unwrap
from fedkseed.kseed.ledger import Ledger
from tests.support.flower_sites import RUN, SITES


@contextmanager
def as_in_a_task() -> Iterator[None]:
    """Flower's messages want to know which task makes them; and nobody here is worth waiting for."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_run_id", "_node_id", "_task_id"):
            patch.setattr(TaskIdentity, name, 1)
        for module in (exchange, flower_strategy):
            patch.setattr(module, "POLL_SECONDS", 0.01)
        yield


def run_config(sites: Path, run: Path, **changes: Any) -> dict[str, Any]:
    files = {"model": str(sites / "model"), "eval-data": str(sites / "held-out.jsonl"), "run": str(run)}
    return {**RUN, **files, **{key.replace("_", "-"): value for key, value in changes.items()}}


Answer = Callable[[Message], Message | list[Message] | None]


class MemoryGrid(Grid):
    """Nodes that answer when their reply is fetched; `shuffle` mixes the order of requests and replies."""

    def __init__(self, shuffle: random.Random | None = None) -> None:
        self.answers: dict[int, Answer] = {}
        self.infos: dict[int, NodeInfo] = {}
        self.sent: list[Message] = []
        self._open: dict[str, Message] = {}
        self._shuffle = shuffle

    def add(self, node_id: int, answer: Answer, name: str = "") -> None:
        self.answers[node_id], self.infos[node_id] = answer, NodeInfo(node_id=node_id, name=name)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(self, *args: Any, **options: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.infos)

    def get_nodes(self) -> list[NodeInfo]:
        return list(self.infos.values())

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        pushed = list(messages)
        if self._shuffle:
            self._shuffle.shuffle(pushed)
        for message in pushed:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            self._open[message.metadata.message_id] = message
            self.sent.append(message)
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        replies: list[Message] = []
        for key in message_ids:
            message = self._open[key]
            if self._shuffle and self._shuffle.random() < 0.5:
                continue  # not here yet
            found = self.answers[message.metadata.dst_node_id](message)
            replies += found if isinstance(found, list) else [found] if found is not None else []
        return replies


def node(sites: Path, name: str, config: dict[str, Any], **node_config: Any) -> Answer:
    """A real ClientApp."""
    app, state = client_app(), RecordDict()  # which a SuperNode keeps from message to message
    own = {"name": name, "data": str(sites / f"{name}.jsonl"), **{k.replace("_", "-"): v for k, v in node_config.items()}}

    def answer(message: Message) -> Message:
        context = Context(1, message.metadata.dst_node_id, own, state, config)
        return app(message, context)

    return answer


def federation(sites: Path, config: dict[str, Any], shuffle: random.Random | None = None, **node_config: Any) -> MemoryGrid:
    grid = MemoryGrid(shuffle)
    for i, name in enumerate(SITES):
        grid.add(101 + i, node(sites, name, config, **node_config))
    return grid


def engine(config: dict[str, Any], num_nodes: int) -> MemoryGrid:
    """As Flower's simulation engine numbers its nodes."""
    grid, app = MemoryGrid(), client_app()
    for i in range(num_nodes):
        own: dict[str, Any] = {"partition-id": i, "num-partitions": num_nodes}
        state = RecordDict()

        def answer(message: Message, own: dict[str, Any] = own, state: RecordDict = state) -> Message:
            return app(message, Context(1, message.metadata.dst_node_id, own, state, config))

        grid.add(i + 1, answer)
    return grid


def started(config: dict[str, Any], grid: MemoryGrid) -> Ledger:
    a_strategy = build_strategy(read_config(config))
    a_strategy.start(grid)
    return a_strategy.ledger


def lying(honest: Answer, make: Callable[[Message, bytes], Any]) -> Answer:
    """Honest about who it is, and nothing else."""

    def answer(message: Message) -> Any:
        reply = honest(message)
        assert isinstance(reply, Message)
        return make(message, unwrap(reply)) if message.metadata.message_type == "train" else reply

    return answer


class Killed(BaseException):
    pass


def die_after(grid: MemoryGrid, pulls: int) -> None:
    """Let the server be killed when it has asked for replies so many times."""
    pull, pulled = grid.pull_messages, 0

    def dying(message_ids: Iterable[str]) -> list[Message]:
        nonlocal pulled
        pulled += 1
        if pulled > pulls:
            raise Killed
        return pull(message_ids)

    grid.pull_messages = dying  # type: ignore[method-assign]


def renumbered(grid: MemoryGrid) -> MemoryGrid:
    """The same nodes at a new SuperLink, under new ids."""
    fresh = MemoryGrid()
    for node_id, answer in grid.answers.items():
        fresh.add(node_id + 500, answer)
    return fresh
