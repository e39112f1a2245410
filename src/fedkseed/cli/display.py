"""What a person sees of a run: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from fedkseed.cli.console import drawing_on, is_quiet, is_verbose, new_console, say
from fedkseed.runs.events import details, summary
from fedkseed.runs.observer import WARNING, Nobody, Probe
from fedkseed.runs.settings import SimulationConfig
from fedkseed.text import visible

PATIENCE = 1
"""Seconds after which it is said what is waited for."""
FIRST_SECONDS, QUIET_SECONDS = 3, 10
"""After so long without a line, plain output says how far a long activity is: for the first time, and after that."""
LOADING = "loading torch and transformers"
NARROW = 100
"""Columns below which the bar is short."""


class Lines(Nobody):
    """A line for every note; and for what takes long a bar where there are bars, else a line now and then."""

    def __init__(self, console: Console | None = None, bars: Progress | None = None) -> None:
        self._console = bars.console if bars else console or new_console()
        self._bars = bars
        self._long = bars.add_task("", total=None, visible=False) if bars else None
        self._said = time.monotonic()
        self._spoken_of = ""

    def note(self, text: str) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        warns = text.startswith(WARNING)
        if warns or not is_quiet():
            self._said = time.monotonic()
            say(text, self._console, "yellow" if warns else "")

    def progress(self, activity: str, done: int, total: int) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        if self._bars is None or self._long is None:
            self._now_and_then(activity, f"{activity}: {done:,} of {total:,}")
            return
        task = next(task for task in self._bars.tasks if task.id == self._long)
        if task.description != visible(activity) or done < task.completed:
            self._bars.reset(self._long)  # its clock starts anew
        self._bars.update(
            self._long, description=visible(activity), completed=done, total=total, visible=done < total, refresh=done == total
        )

    def _now_and_then(self, activity: str, text: str) -> None:
        wait = QUIET_SECONDS if activity == self._spoken_of else FIRST_SECONDS
        if time.monotonic() - self._said > wait:
            self._spoken_of = activity
            self.note(text)


class PlainDisplay(Lines):
    """Lines for events too."""

    def __init__(self, config: SimulationConfig, console: Console | None = None, bars: Progress | None = None) -> None:
        super().__init__(console, bars)
        self._config = config

    def probe(self, probe: Probe) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        self._now_and_then(f"round {probe.server_round}", self._where(probe))

    def event(self, event: dict[str, Any]) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        self.note(summary(event, self._config.num_rounds))
        if is_verbose():
            for line in details(event):
                self.note(line)

    def _where(self, probe: Probe, held_out: str = "") -> str:
        """Round, step and losses; the name last, since others chose how long it is."""
        return (
            f"round {probe.server_round}/{self._config.num_rounds}  step {probe.step + 1}/{probe.steps}  "
            f"loss {probe.loss:.3f}{held_out}  {probe.place}/{probe.cohort} {probe.client}"
        )


class LiveDisplay(PlainDisplay):
    """The lines, and below them a bar: how far the rounds are, with the loss and the time left."""

    def __init__(self, config: SimulationConfig, bars: Progress) -> None:
        self._rounds, self._bar = bars, bars.add_task("starting", total=config.num_rounds, visible=False)
        super().__init__(config, bars=bars)
        self._held_out = ""

    def probe(self, probe: Probe) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        done = probe.server_round - 1 + (probe.place - 1 + probe.step / probe.steps) / probe.cohort
        if not next(task for task in self._rounds.tasks if task.id == self._bar).visible:
            self._rounds.reset(self._bar, completed=done, visible=True)  # type: ignore[arg-type]  # an int by its hint only
        self._rounds.update(self._bar, completed=done, description=visible(self._where(probe, self._held_out)))

    def event(self, event: dict[str, Any]) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        if event["event"] == "evaluation":
            self._held_out = f"  held-out {event['eval_loss']:.4f}"
        super().event(event)


class Clock(ProgressColumn):
    """How long it has taken, and how long it will take yet."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        """`0:01:02, 0:14:00 left`."""
        elapsed = timedelta(seconds=int(task.finished_time or task.elapsed or 0))
        left = "" if task.time_remaining is None else f", {timedelta(seconds=int(task.time_remaining))} left"
        return Text(f"{elapsed}{left}", "progress.elapsed")


def live(console: Console) -> Progress:
    """A bar that fits the console: what it is about is cut before the clock is."""
    about = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    bar = BarColumn(bar_width=8 if console.width < NARROW else 20)
    columns = [about, bar, Clock(table_column=Column(no_wrap=True, justify="right"))]
    return Progress(*columns, console=console, transient=True, refresh_per_second=4, expand=True)


@contextmanager
def watching(config: SimulationConfig) -> Iterator[PlainDisplay]:
    """The observer that suits where the output goes."""
    console = new_console()
    if not console.is_terminal or is_quiet():
        yield PlainDisplay(config, console)
        return
    with drawing_on(console), live(console) as bars:
        yield LiveDisplay(config, bars)


@contextmanager
def looking_on() -> Iterator[Lines]:
    """The observer of what is no run, such as an evaluation."""
    console = new_console()
    if not console.is_terminal or is_quiet():
        yield Lines(console)
        return
    with drawing_on(console), live(console) as bars:
        yield Lines(bars=bars)


@contextmanager
def waiting(note: Callable[[str], None], text: str) -> Iterator[None]:
    """Say what is waited for if it takes long, and while it lasts now and then how long already."""
    begin, over = time.monotonic(), threading.Event()

    def tick() -> None:
        if over.wait(PATIENCE):
            return
        note(text)
        while not over.wait(QUIET_SECONDS):
            note(f"{text}: {time.monotonic() - begin:.0f} s")

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        over.set()
        ticker.join()
