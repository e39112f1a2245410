"""Who watches a run: what is told to the live display, to plain lines, or to nobody."""

from dataclasses import dataclass
from typing import Any, Protocol

WARNING = "warning: "
"""How a note begins that nobody should miss."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A loss that a client has measured.

    Attributes:
        server_round: the round, from 1.
        client: its name.
        place: which of the round's cohort it is, from 1.
        cohort: how many they are.
        step: which of its steps this is, from 0.
        steps: how many it does in this round.
        loss: what it measured.
    """

    server_round: int
    client: str
    place: int
    cohort: int
    step: int
    steps: int
    loss: float


class Nobody:
    """An observer that hears nothing."""

    def note(self, text: str) -> None:
        """See `Observer`."""

    def progress(self, activity: str, done: int, total: int) -> None:
        """See `Observer`."""

    def probe(self, probe: Probe) -> None:
        """See `Observer`."""

    def event(self, event: dict[str, Any]) -> None:
        """See `Observer`."""


class Observer(Protocol):
    """Who watches a run: the live display, plain lines, or nobody."""

    def note(self, text: str) -> None:
        """One line about what is being done or was found; a warning begins with `WARNING`."""
        ...

    def progress(self, activity: str, done: int, total: int) -> None:
        """So much of something that may take long, beside the training, is done; a total of 0 is not known."""
        ...

    def probe(self, probe: Probe) -> None:
        """A client has measured a loss."""
        ...

    def event(self, event: dict[str, Any]) -> None:
        """What was just added to `metrics.jsonl`."""
        ...
