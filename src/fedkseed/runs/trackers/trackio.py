"""trackio: a run in its project `fedkseed`; the only module that imports trackio."""

from __future__ import annotations

from typing import Any

import trackio

from fedkseed.runs.folder import RunFolder, settings_of
from fedkseed.runs.trackers import PROJECT, Tracker, numbers, tracked_id


def open_tracker(run: RunFolder, done: int) -> Tracker:
    """See `fedkseed.runs.trackers.tracking`."""
    return Trackio(run)


class Trackio:
    """Numbers and settings; a run that is gone on with is the same one."""

    def __init__(self, run: RunFolder) -> None:
        name = f"{run.path.resolve().name}-{tracked_id(run)}"  # which trackio tells runs apart by
        self._run = trackio.init(project=PROJECT, name=name, config=settings_of(run.config), resume="allow", embed=False)

    def event(self, event: dict[str, Any]) -> None:
        """See `Tracker`."""
        self._run.log(numbers(event), step=event["server_round"])

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()
