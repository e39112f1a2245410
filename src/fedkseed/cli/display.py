"""What a person sees of a run: a live display on a terminal, plain lines elsewhere, TensorBoard on request."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedkseed.errors import ConfigError
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


class TensorBoard:
    """Another observer, and every number of every event in a TensorBoard log beside it."""

    def __init__(self, inner: PlainDisplay, writer: Any) -> None:
        self._inner, self._writer = inner, writer
        self.note, self.progress, self.probe = inner.note, inner.progress, inner.probe

    def event(self, event: dict[str, Any]) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        for name, value in event.items():
            if isinstance(value, (int, float)) and name != "server_round":
                self._writer.add_scalar(f"{event['event']}/{name}", value, event["server_round"])
        self._writer.flush()
        self._inner.event(event)


@contextmanager
def watching(config: SimulationConfig, folder: Path, tensorboard: bool) -> Iterator[PlainDisplay | TensorBoard]:
    """The observer that suits where the output goes.

    Raises:
        ConfigError: TensorBoard was asked for and is not installed.
    """
    console = Console()
    wrap: Any = _tensorboard(folder) if tensorboard else lambda display: display
    if not console.is_terminal:
        yield wrap(PlainDisplay(config, console))
        return
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        yield wrap(LiveDisplay(config, progress))


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("--tensorboard needs an extra; install it with: pip install 'fedkseed[tensorboard]'") from error
    return lambda display: TensorBoard(display, SummaryWriter(folder / "tensorboard"))
