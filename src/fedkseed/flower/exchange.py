"""Messages over a Flower grid and what comes back until a deadline; no reply can raise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import httpx
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedkseed.text import named_line

POLL_SECONDS = 0.5
NOTE_SECONDS = 30.0
"""How often a wait says what it waits for."""


class Exchange:
    """Requests on their way and the replies to them.

    Replies are fetched one by one, so that one that cannot be unpacked takes no other with it.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._open: dict[str, Message] = {}

    def send(self, messages: Sequence[Message]) -> None:
        """Hand requests to the grid."""
        if messages:
            self._grid.push_messages(messages)
            self._open |= {message.metadata.message_id: message for message in messages}

    def drop(self, wanted: Callable[[Message], bool]) -> None:
        """Forget open requests that are not wanted any more."""
        self._open = {key: message for key, message in self._open.items() if wanted(message)}

    def collect(self) -> list[tuple[Message, Message]]:
        """(request, reply) for what has come since the last call; an error in place of one that cannot be unpacked."""
        replies: list[tuple[Message, Message]] = []
        for key, request in list(self._open.items()):
            try:
                found = list(self._grid.pull_messages([key]))
            except httpx.TransportError:
                raise  # the SuperLink is out of reach: no reply's fault
            except Exception as error:  # a reply is whatever a stranger made of Flower's object format
                reason = f"reply cannot be unpacked ({named_line(error)})"
                found = [Message(Error(ErrorCode.UNKNOWN, reason), reply_to=request)]
            if found:
                del self._open[key]
            replies += [(request, reply) for reply in found]
        return replies

    def wait(
        self,
        seconds: float,
        again: Callable[[Message, Message], Message | None] = lambda request, reply: None,
        waiting: Callable[[list[Message], float], None] = lambda requests, passed: None,
    ) -> list[tuple[Message, Message]]:
        """All replies that come within so many seconds; returns early when none is open.

        Args:
            seconds: how long.
            again: what to ask instead, after a (request, reply) that does not count; None for one that does.
            waiting: hears now and then which requests are open, and after how many seconds.
        """
        begin = noted = time.monotonic()
        end = begin + seconds
        replies: list[tuple[Message, Message]] = []
        while True:
            for request, reply in self.collect():
                further = again(request, reply)
                if further is None:
                    replies.append((request, reply))
                else:
                    self.send([further])
            now = time.monotonic()
            left = end - now
            if not self._open or left <= 0:
                return replies
            if now - noted >= NOTE_SECONDS:
                noted = now
                waiting(list(self._open.values()), now - begin)
            time.sleep(min(POLL_SECONDS, left))
