"""Flower's log, in visible text; and who watches a run on Flower: that log."""

from __future__ import annotations

import time
from collections.abc import Callable
from logging import INFO, WARNING
from typing import Any

from flwr.supercore import log as flowers_log

from fedkseed.flower.exchange import NOTE_SECONDS
from fedkseed.runs.observer import WARNING as WARNS
from fedkseed.runs.observer import Nobody
from fedkseed.text import visible


def log(level: int, text: str, *values: object) -> None:
    """A line in Flower's log, whatever control characters the values hold."""
    flowers_log(level, "%s", visible(text % values if values else text))


class Log(Nobody):
    """An observer whose notes go to Flower's log; see `fedkseed.runs.observer.Observer`.

    Args:
        level: of the notes: of a driver's, which are all of things that went wrong, a warning.
        describe: an event as a line; None says nothing of events.
    """

    def __init__(self, level: int = WARNING, describe: Callable[[dict[str, Any]], str] | None = None) -> None:
        self._level, self._describe = level, describe
        self._said = time.monotonic()

    def note(self, text: str) -> None:
        """See `Observer`."""
        level = WARNING if text.startswith(WARNS) else self._level
        log(level, "%s", text.removeprefix(WARNS))

    def progress(self, activity: str, done: int, total: int) -> None:
        """See `Observer`; a line now and then."""
        now = time.monotonic()
        if now - self._said >= NOTE_SECONDS:
            self._said = now
            log(INFO, "%s: %s of %s", activity, f"{done:,}", f"{total:,}")

    def event(self, event: dict[str, Any]) -> None:
        """See `Observer`."""
        if self._describe is not None:
            log(INFO, "%s", self._describe(event))
