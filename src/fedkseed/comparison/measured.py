"""What one run of a comparison came to, read from its folder; and what all had at their disposal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkseed.comparison.trials import SCORES, Trial
from fedkseed.report.reading import RunRecord, read
from fedkseed.report.summary import traffic


@dataclass(frozen=True)
class Point:
    """A held-out loss, and what had been spent until then over all clients."""

    examples: int
    passes: int
    num_bytes: float
    loss: float


@dataclass(frozen=True)
class Measured:
    """One run's numbers; Rouge-L from 0 to 1, None where nothing was answered."""

    points: tuple[Point, ...]
    base_loss: float | None
    base_rouge_l: float | None
    rouge_l: float | None
    bytes_per_round: float
    peak_bytes: int
    seconds: float

    @property
    def final(self) -> float:
        """The loss after all rounds."""
        return self.points[-1].loss


def measure(trial: Trial) -> Measured:
    """Read a run's folder.

    Raises:
        FedKSeedError: it is damaged.
    """
    record = read(trial.folder)
    moved = traffic(record.rounds)
    scores = _scores(trial.folder / SCORES)
    return Measured(
        points=tuple(_points(record)),
        base_loss=scores.get("base", {}).get("loss"),
        base_rouge_l=scores.get("base", {}).get("rouge_l"),
        rouge_l=scores.get("tuned", {}).get("rouge_l"),
        bytes_per_round=moved.both if moved else 0.0,
        peak_bytes=max((r.peak_bytes or 0 for r in record.rounds), default=0),
        seconds=sum(r.seconds for r in record.rounds),
    )


def _scores(path: Path) -> dict[str, dict[str, float]]:
    """The overall scores of the base and of the tuned model, as far as they are there."""
    if not path.exists():
        return {}
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return {which: dict(content[which]["overall"]) for which in ("base", "tuned")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # half written: scored anew where answers are wanted
        return {}


def _points(record: RunRecord) -> Iterable[Point]:
    rounds, config = {r.server_round: r for r in record.rounds}, record.config
    passes = config.passes_per_step
    for evaluation in record.evaluations:
        done = [r for n, r in rounds.items() if n <= evaluation.server_round]
        examples = sum(r.num_steps or 0 for r in done) * config.batch_size
        moved = traffic(done)
        yield Point(examples, round(examples * passes), moved.total if moved else 0.0, evaluation.loss)


@dataclass(frozen=True)
class Equal:
    """What every run had at its disposal: so many examples, and so many forward passes."""

    examples: int
    passes: int

    def examples_of(self, measured: Sequence[Measured]) -> list[float]:
        """The losses at equal examples."""
        return [_at(m, self.examples, lambda point: point.examples) for m in measured]

    def passes_of(self, measured: Sequence[Measured]) -> list[float]:
        """The losses at equal passes."""
        return [_at(m, self.passes, lambda point: point.passes) for m in measured]


def _at(measured: Measured, budget: int, spent: Callable[[Point], int]) -> float:
    """The last loss within a budget; NaN where none is known, as of metrics whose first lines are damaged."""
    return next((point.loss for point in reversed(measured.points) if spent(point) <= budget), math.nan)
