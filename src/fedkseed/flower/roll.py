"""Which client is at which node: Flower's node ids are random, so every node is asked for its stable name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import INFO, WARNING

from flwr.app import Message
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid

from fedkseed.errors import ProtocolError, RunError
from fedkseed.flower.envelope import Hello, unwrap, wrap
from fedkseed.flower.exchange import Exchange
from fedkseed.flower.log import log

HELLO = "query.hello"
HELLO_SECONDS = 3600.0
"""How long a node may take to load its model for the first time."""
GREET_AGAIN_SECONDS, MOST_GREET_AGAIN_SECONDS = 5.0, 300.0
"""How soon a node whose hello was lost is asked again; each time twice as long."""
LOST = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
"""Errors of Flower's that say nothing about the node: it is asked again."""


@dataclass(frozen=True)
class Member:
    """A client that has been let in: its node and what it said."""

    node_id: int
    hello: Hello


class Roll:
    """The clients of a federation, by stable name.

    A node is asked once for each time that it starts. It is turned away if its base weights are not the server's, if it
    gives another name than the one that its key was registered under (`flwr supernode register --name`), if another node
    that is online has that name already, if a name that the run has met differs in capitals only, or if it has another number
    of records than when the run first met it.

    Args:
        base: fingerprint of the server's base weights.
        num_examples: how many records the clients have that the run has met, by name.
        check: raises an error for a hello that the settings have no use for.
    """

    def __init__(
        self,
        grid: Grid,
        base: str,
        check: Callable[[Hello], None] = lambda hello: None,
        num_examples: Mapping[str, int] | None = None,
    ) -> None:
        self._grid, self._base, self._check = grid, base, check
        self._hellos = Exchange(grid)
        self._asked: dict[int, str] = {}
        self._online: dict[int, NodeInfo] = {}
        self._members: dict[str, Member] = {}
        self._named: dict[int, str] = {}
        self._num_examples = dict(num_examples or {})
        self._lost: dict[int, tuple[float, float]] = {}

    def look(self) -> dict[str, Member]:
        """Greet new nodes, let in those that have answered; the clients whose nodes are online."""
        self._online = {info.node_id: info for info in self._grid.get_nodes()}
        now = time.monotonic()
        waiting = {node_id for node_id, (until, _) in self._lost.items() if now < until}
        started = {id_: info.last_activated_at for id_, info in self._online.items() if id_ not in waiting}
        new = [node_id for node_id in started if self._asked.get(node_id) != started[node_id]]
        self._asked = started
        self._hellos.drop(lambda message: message.metadata.dst_node_id in self._online.keys() - set(new))  # a newer one follows
        self._hellos.send([Message(wrap(b"hello"), node_id, HELLO, ttl=HELLO_SECONDS) for node_id in new])
        for request, reply in self._hellos.collect():
            node_id = request.metadata.dst_node_id
            if reply.has_error() and (reply.error.code in LOST or node_id in self._named):  # a member's may heal by itself
                self._asked.pop(node_id, None)
                wait = self._lost.get(node_id, (0.0, GREET_AGAIN_SECONDS))[1]
                self._lost[node_id] = now + wait, min(2 * wait, MOST_GREET_AGAIN_SECONDS)
                continue
            self._lost.pop(node_id, None)
            try:
                self._admit(node_id, unwrap(reply))
            except (ProtocolError, RunError) as error:
                log(WARNING, "node %s is turned away: %s", node_id, error)
                self._forget(node_id)
        return {name: member for name, member in sorted(self._members.items()) if member.node_id in self._online}

    def _forget(self, node_id: int) -> None:
        """Let a node be no member, which was one before it started again and said something else."""
        name = self._named.pop(node_id, None)
        if name is not None and name in self._members and self._members[name].node_id == node_id:
            del self._members[name]

    def _admit(self, node_id: int, data: bytes) -> None:
        hello = Hello.decode(data)
        if hello.base != self._base:
            raise ProtocolError(
                f"{hello.name!r} has base model {hello.base[:16]}..., the server has {self._base[:16]}...; "
                "give the node the same base weights"
            )
        self._check(hello)
        registered = self._online[node_id].name
        if registered and registered != hello.name:
            raise ProtocolError(f"it says {hello.name!r} and its key is registered for {registered!r}; mend its node-config")
        other = self._members.get(hello.name)
        if other is not None and other.node_id != node_id and other.node_id in self._online:
            raise ProtocolError(f"{hello.name!r} is at node {other.node_id} already; names must be distinct")
        folded = hello.name.casefold()
        if like := [name for name in self._num_examples if name != hello.name and name.casefold() == folded]:
            raise ProtocolError(
                f"{hello.name!r} differs from {like[0]!r} in capitals only, and files of keys are called by names; rename one"
            )
        known = self._num_examples.setdefault(hello.name, hello.num_examples)
        if hello.num_examples != known:
            raise ProtocolError(
                f"{hello.name!r} has {hello.num_examples} records, and {known} when the run met it, by which it weighs; "
                "give it those records, or another name, or change its number in the run's config.toml"
            )
        self._forget(node_id)  # the name that it had
        self._members[hello.name], self._named[node_id] = Member(node_id, hello), hello.name
        log(INFO, "%s is here: node %s, %s examples", hello.name, node_id, hello.num_examples)
