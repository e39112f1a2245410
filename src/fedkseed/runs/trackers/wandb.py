"""Weights & Biases: a run in its project `fedkseed`; the only module that imports wandb."""

from __future__ import annotations

from typing import Any

import wandb

from fedkseed.runs.folder import RunFolder, settings_of
from fedkseed.runs.trackers import PROJECT, Tracker, numbers, tracked_id


def open_tracker(run: RunFolder, done: int) -> Tracker:
    """See `fedkseed.runs.trackers.tracking`."""
    return WandB(run)


class WandB:
    """Numbers and settings; a run that is gone on with is the same one. WANDB_MODE=offline keeps them on this machine."""

    def __init__(self, run: RunFolder) -> None:
        self._run = wandb.init(
            project=PROJECT,
            name=run.path.resolve().name,
            id=tracked_id(run),
            config=settings_of(run.config),
            dir=str(run.path),
            resume="allow",
        )

    def event(self, event: dict[str, Any]) -> None:
        """See `Tracker`."""
        self._run.log(numbers(event), step=event["server_round"])

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()
