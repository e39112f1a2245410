"""TensorBoard: event files in RUN/tensorboard; the only module that imports tensorboardX, which needs no TensorBoard."""

from __future__ import annotations

from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from fedkseed.runs.folder import RunFolder, settings_of
from fedkseed.runs.trackers import Tracker, numbers

FOLDER = "tensorboard"
OBJECTIVE = "evaluation/eval_loss"
"""What TensorBoard's page of hyperparameters compares runs by."""
PER_CLIENT = ("loss", "projected_grad_rms", "change_norm")


def open_tracker(run: RunFolder, done: int) -> Tracker:
    """See `fedkseed.runs.trackers.tracking`."""
    return TensorBoard(run, done)


class TensorBoard:
    """Numbers, the settings as hyperparameters, and histograms: of the clients in a round, and of the ledger's coefficients."""

    def __init__(self, run: RunFolder, done: int) -> None:
        self._run = run
        # hides what an interrupted run has logged beyond its checkpoint; by its name alone, which is the second, a file might
        # replace one of other rounds
        purge = done + 1 if done else None
        self._writer = SummaryWriter(str(run.path / FOLDER), purge_step=purge, filename_suffix=f".after-round-{done}")
        for summary in hparams(settings_of(run.config), {OBJECTIVE: 0.0}):
            self._writer.file_writer.add_summary(summary)

    def event(self, event: dict[str, Any]) -> None:
        """See `Tracker`."""
        step = event["server_round"]
        for name, value in numbers(event).items():
            self._writer.add_scalar(name, value, step)
        if event["event"] == "round":
            clients = event["clients"].values()
            for key in PER_CLIENT:
                self._histogram(f"clients/{key}", [own[key] for own in clients if own.get(key) is not None], step)
            if self._run.config.facts.has_ledger and (ledger := self._run.load_ledger()) is not None:
                self._histogram("ledger/coefficients", ledger.coefficients, step)
        self._writer.flush()

    def _histogram(self, name: str, values: Any, step: int) -> None:
        shown = np.asarray(values, float)
        shown = shown[np.isfinite(shown)]
        if shown.size:
            self._writer.add_histogram(name, shown, step)

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()
