"""Where a run is, from its folder, for whoever watches over it: read without torch, and nothing is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkseed.errors import RunError
from fedkseed.federation.algorithms import ALGORITHMS
from fedkseed.files import Lock, safetensors_entry, safetensors_header
from fedkseed.kseed.ledger_format import METADATA
from fedkseed.runs.checkpoints import file_of
from fedkseed.runs.layout import CONFIG, LOCK, METRICS, read_settings
from fedkseed.runs.metrics import best_round, read_metrics
from fedkseed.text import one_line, visible


@dataclass(frozen=True)
class Status:
    """A run at one moment.

    Attributes:
        run: its folder.
        algorithm: what it tunes by.
        round, num_rounds: rounds that are closed, and wanted.
        process: the number of the process that is at it, 0 if that cannot be read; None if none is.
        last_event: when its last round or evaluation ended, in seconds since 1970; None before the first.
        eval_loss, best_loss, best_round: the last held-out loss, and the smallest; None where there is none.
        num_replies, refused, missing, dropped_steps, seconds: of the last round; None before the first.
        bytes_down, bytes_up: of all rounds, mean per client and round.
        damage: what of the metrics cannot be read.
    """

    run: str
    algorithm: str
    round: int
    num_rounds: int
    process: int | None
    last_event: float | None
    eval_loss: float | None
    best_loss: float | None
    best_round: int | None
    num_replies: int | None
    refused: list[str] | None
    missing: list[str] | None
    dropped_steps: int | None
    seconds: float | None
    bytes_down: float | None
    bytes_up: float | None
    damage: str | None

    @property
    def state(self) -> str:
        """In a word: done, running, or stopped."""
        if self.process is not None:  # which may evaluate the last round yet
            return "running"
        return "done" if self.round >= self.num_rounds else "stopped"


def status_of(path: Path) -> Status:
    """Where a run is.

    Raises:
        RunFolderError: there is no run.
        RunError: its settings cannot be read.
    """
    settings, _ = read_settings(path)
    try:
        algorithm, num_rounds = str(settings["algorithm"]), int(settings["num_rounds"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise RunError(f"{path / CONFIG} is damaged ({one_line(error, 100)}); restore it from a copy") from error
    metrics = read_metrics(path / METRICS)
    rounds = [event for event in metrics.events if event["event"] == "round"]
    last: dict[str, Any] = rounds[-1] if rounds else {}
    losses = {number: loss for number, loss in metrics.losses.items() if math.isfinite(loss)}
    best, saved = best_round(losses), _saved_round(path, algorithm)
    return Status(
        run=str(path),
        algorithm=algorithm,
        round=last.get("server_round", 0) if saved is None else saved,
        num_rounds=num_rounds,
        process=Lock(path / LOCK).holder(),
        last_event=(path / METRICS).stat().st_mtime if metrics.events else None,
        eval_loss=losses[max(losses)] if losses else None,
        best_loss=None if best is None else losses[best],
        best_round=best,
        num_replies=last.get("num_replies"),
        refused=list(last.get("refused") or {}) if last else None,
        missing=list(last.get("missing") or []) if last else None,
        dropped_steps=last.get("dropped_steps"),
        seconds=last.get("seconds"),
        bytes_down=_mean([event["bytes_down"] for event in rounds]),
        bytes_up=_mean([event["bytes_up"] for event in rounds]),
        damage=metrics.damage,
    )


def _saved_round(path: Path, algorithm: str) -> int | None:
    """The round of the checkpoint, without its tensors; None if that is not to be had.

    Events are written first, and a full disk may take only these; or they are lost, and a run needs none of them.
    """
    if algorithm not in ALGORITHMS:
        return None
    try:
        with (path / file_of(ALGORITHMS[algorithm])).open("rb") as file:
            number = safetensors_entry(safetensors_header(file)[0], METADATA)["round"]
    except FileNotFoundError:
        return 0
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # for whoever reads it to say; or a baseline's
        return None
    return number if type(number) is int else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


GAUGES: dict[str, tuple[str, str]] = {
    "round": ("round", "Rounds that are closed."),
    "num_rounds": ("num_rounds", "Rounds that are wanted."),
    "last_event": ("last_event_timestamp_seconds", "When the last round or evaluation ended."),
    "eval_loss": ("eval_loss", "The last held-out loss."),
    "best_loss": ("best_eval_loss", "The smallest held-out loss."),
    "num_replies": ("round_replies", "Accepted replies of the last round."),
    "refused": ("round_refused", "Refused replies of the last round."),
    "missing": ("round_missing", "Clients of the last round that did not answer."),
    "dropped_steps": ("round_dropped_steps", "Steps that the clients of the last round dropped."),
    "seconds": ("round_seconds", "How long the last round took."),
    "bytes_down": ("bytes_down", "Mean bytes to a client and round."),
    "bytes_up": ("bytes_up", "Mean bytes from a client and round."),
}
"""What Prometheus is told: the attribute of `Status`, the metric's name after fedkseed_, and its help."""


def prometheus(status: Status) -> str:
    """The status in Prometheus' text format, for a textfile collector; what is not known is left out."""
    label = "".join({"\\": r"\\", '"': r"\""}.get(letter, letter) for letter in visible(status.run))
    values: dict[str, tuple[str, float]] = {"running": ("Whether a process is at the run.", float(status.process is not None))}
    for attribute, (name, about) in GAUGES.items():
        value = getattr(status, attribute)
        if value is not None:
            values[name] = about, float(len(value) if isinstance(value, list) else value)
    lines = [
        f'# HELP fedkseed_{name} {about}\n# TYPE fedkseed_{name} gauge\nfedkseed_{name}{{run="{label}"}} {value!r}\n'
        for name, (about, value) in values.items()
    ]
    return "".join(lines)
