"""Who watches a run on Flower: its log."""

from __future__ import annotations

from collections.abc import Callable
from logging import INFO, WARNING
from typing import Any

from flwr.supercore import log

from fedkseed.runs.observer import Nobody


class Log(Nobody):
    """An observer whose notes go to Flower's log; see `fedkseed.runs.observer.Observer`.

    Args:
        level: of the notes: of a driver's, which are all of things that went wrong, a warning.
        describe: an event as a line; None says nothing of events.
    """

    def __init__(self, level: int = WARNING, describe: Callable[[dict[str, Any]], str] | None = None) -> None:
        self._level, self._describe = level, describe

    def note(self, text: str) -> None:
        """See `Observer`."""
        log(self._level, "%s", text)

    def event(self, event: dict[str, Any]) -> None:
        """See `Observer`."""
        if self._describe is not None:
            log(INFO, "%s", self._describe(event))
