"""What a person sees of a run: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedkseed.runs.events import summary
from fedkseed.runs.observer import Nobody, Probe
from fedkseed.runs.settings import SimulationConfig

QUIET_SECONDS = 10
"""After so long without a line, plain output says how far a long activity is."""


class Lines(Nobody):
    """A line for every note, and now and then one for what takes long; nothing for probes, which are too many."""

    def __init__(self, console: Console) -> None:
        self._console, self._said = console, time.monotonic()

    def note(self, text: str) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        self._said = time.monotonic()
        self._console.print(text, soft_wrap=True, markup=False, highlight=False)

    def progress(self, activity: str, done: int, total: int) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        if time.monotonic() - self._said > QUIET_SECONDS:
            self.note(f"{activity}: {done:,} of {total:,}")


class PlainDisplay(Lines):
    """Lines for events too."""

    def __init__(self, config: SimulationConfig, console: Console) -> None:
        super().__init__(console)
        self._config = config

    def event(self, event: dict[str, Any]) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        self.note(summary(event, self._config.num_rounds))


class LiveDisplay(PlainDisplay):
    """The lines, and below them a bar: how far the rounds are, with the loss and the time left; and one for what else
    takes long, while it does."""

    def __init__(self, config: SimulationConfig, progress: Progress) -> None:
        super().__init__(config, progress.console)
        self._progress = progress
        self._bar = progress.add_task("starting", total=config.num_rounds, visible=False)
        self._activity = progress.add_task("", total=None, visible=False)
        self._held_out = ""

    def progress(self, activity: str, done: int, total: int) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        self._progress.update(self._activity, description=activity, completed=done, total=total, visible=done < total)

    def probe(self, probe: Probe) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        done = probe.server_round - 1 + (probe.place - 1 + probe.step / probe.steps) / probe.cohort
        text = (
            f"round {probe.server_round}/{self._config.num_rounds}  {probe.client} ({probe.place}/{probe.cohort})  "
            f"step {probe.step + 1}/{probe.steps}  loss {probe.loss:.3f}{self._held_out}"
        )
        if not self._progress.tasks[self._bar].visible:
            self._progress.reset(self._bar, completed=done, visible=True)  # type: ignore[arg-type]  # an int by its hint only
        self._progress.update(self._bar, completed=done, description=text)

    def event(self, event: dict[str, Any]) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        if event["event"] == "evaluation":
            self._held_out = f"  held-out {event['eval_loss']:.4f}"
        super().event(event)


@contextmanager
def watching(config: SimulationConfig) -> Iterator[PlainDisplay]:
    """The observer that suits where the output goes."""
    console = Console()
    if not console.is_terminal:
        yield PlainDisplay(config, console)
        return
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        yield LiveDisplay(config, progress)
