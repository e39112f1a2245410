"""What a comparison came to: a table in Markdown, and the same numbers as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from fedkseed.comparison.measured import Equal, Measured, measure
from fedkseed.comparison.pictures import pictures
from fedkseed.comparison.plan import Comparison
from fedkseed.comparison.trials import Row, Trial
from fedkseed.errors import RunError
from fedkseed.files import write_atomically
from fedkseed.report import units
from fedkseed.text import visible

TABLE, NUMBERS = "table.md", "comparison.json"

HEADER = (
    "method",
    "lr",
    "loss at its end",
    "control",
    "minus control",
    "loss at equal examples",
    "loss at equal passes",
    "Rouge-L",
    "bytes a client and round",
    "bytes in all",
    "peak memory",
    "seconds",
)


@dataclass(frozen=True)
class Result:
    """What a method's runs came to, and what those came to that have a control: pairs of a run and its control."""

    row: Row
    runs: list[Measured]
    controls: list[tuple[Measured, Measured]]

    @classmethod
    def of(cls, row: Row) -> Result:
        """Read the folders of a row, but those that ended without a loss."""
        runs = [measure(trial) if _has_points(trial) else None for trial in row.runs]
        pairs = zip(runs, row.controls, strict=False)  # of a comparison without controls none
        return cls(
            row,
            [run for run in runs if run],
            [(run, measure(trial)) for run, trial in pairs if run and _has_points(trial)],
        )

    @property
    def failed(self) -> int:
        """How many runs ended without a loss."""
        return len(self.row.runs) - len(self.runs)

    @property
    def minus_control(self) -> list[float]:
        """How far the final losses lie above those of the controls with the same seed, which are as long."""
        return [run.final - control.final for run, control in self.controls]

    @property
    def rouge_l(self) -> list[float]:
        """From 0 to 1, of the runs that were answered."""
        return [m.rouge_l for m in self.runs if m.rouge_l is not None]

    def cells(self, equal: Equal) -> tuple[str, ...]:
        """The line of the table, under `HEADER`."""
        name, lr = self.row.entry.name, f"{self.row.lr:g}"
        if self.failed:
            name += f" ({self.failed} of {len(self.row.runs)} failed)"
        if not self.runs:
            return (name, lr, *[units.NONE] * (len(HEADER) - 2))
        return (
            name,
            lr,
            spread([m.final for m in self.runs]),
            spread([control.final for _, control in self.controls]),
            spread(self.minus_control),
            spread(equal.examples_of(self.runs)),
            spread(equal.passes_of(self.runs)),
            spread([100 * x for x in self.rouge_l], 2),
            units.amount(round(mean(m.bytes_per_round for m in self.runs))),
            units.size(mean(m.points[-1].num_bytes for m in self.runs)),
            units.size(max(m.peak_bytes for m in self.runs)),
            f"{mean(m.seconds for m in self.runs):.0f}",
        )

    def numbers(self, equal: Equal) -> dict[str, Any]:
        """The same for `comparison.json`, run by run."""
        return {
            "method": self.row.entry.name,
            "lr": self.row.lr,
            "grid": {f"{lr:g}": _json(t.final_loss()) for lr, t in zip(self.row.entry.lr, self.row.grid, strict=False)},
            "final": [_json(m.final) for m in self.runs],
            "at_equal_examples": [_json(x) for x in equal.examples_of(self.runs)],
            "at_equal_passes": [_json(x) for x in equal.passes_of(self.runs)],
            "control": [_json(control.final) for _, control in self.controls],
            "minus_control": [_json(x) for x in self.minus_control],
            "rouge_l": self.rouge_l,
            "failed": self.failed,
            "bytes_per_round": [m.bytes_per_round for m in self.runs],
            "bytes": [m.points[-1].num_bytes for m in self.runs],
            "peak_bytes": [m.peak_bytes for m in self.runs],
            "seconds": [m.seconds for m in self.runs],
        }


@dataclass(frozen=True)
class Report:
    """What a comparison came to, for a person.

    Attributes:
        rows: the cells under `HEADER`, the base model's first.
        notes: what they mean, a line each.
    """

    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]

    def markdown(self) -> str:
        """The table and the notes below it."""
        lines = [HEADER, ["---"] * len(HEADER), *([_cell(text) for text in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "\n".join(self.notes) + "\n"


def write_report(comparison: Comparison, rows: Sequence[Row], output: Path) -> Report:
    """Write `table.md`, `comparison.json` and the curves into a folder.

    Returns:
        What `table.md` holds.

    Raises:
        RunError: the folder cannot be written.
        FedKSeedError: a run in it is damaged.
    """
    results = [Result.of(row) for row in rows]
    every = [m for result in results for m in result.runs]
    if not every:
        raise RunError(f"no run in {output} has a held-out loss at its end; see the logs in {output / 'runs'}")
    equal = Equal(min(m.points[-1].examples for m in every), min(m.points[-1].passes for m in every))
    base = _mean([m.base_loss for m in every if m.base_loss is not None] or [m.points[0].loss for m in every])
    base_rouge = _mean([m.base_rouge_l for m in every if m.base_rouge_l is not None])
    report = _report(comparison, results, (base, base_rouge), equal)
    numbers = [result.numbers(equal) for result in results]
    summary = {"equal_examples": equal.examples, "equal_passes": equal.passes, "base": _json(base), "methods": numbers}
    drawn = pictures({result.row.entry.name: result.runs for result in results})
    try:
        write_atomically(output / TABLE, report.markdown().encode())
        write_atomically(output / NUMBERS, (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode())
        for name, png in drawn.items():
            write_atomically(output / f"{name}.png", png)
    except OSError as error:
        raise RunError(f"{output}: cannot write the report ({error.strerror}); make room, then compare again") from error
    return report


def _has_points(trial: Trial) -> bool:
    return math.isfinite(trial.final_loss())


def spread(values: Sequence[float], digits: int = 4) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return units.NONE
    text = f"{mean(values):.{digits}f}"
    return f"{text} ± {stdev(values):.{digits}f}" if len(values) > 1 else text


def _mean(values: Sequence[float]) -> float:
    return mean(values) if values else math.nan


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _cell(text: str) -> str:
    """A cell of a Markdown table, whatever a method is called."""
    return visible(text).replace("|", "\\|")


def _report(comparison: Comparison, results: Sequence[Result], base: tuple[float, float], equal: Equal) -> Report:
    nothing = units.NONE
    loss = spread([base[0]]) if math.isfinite(base[0]) else nothing
    rouge = f"{100 * base[1]:.2f}" if math.isfinite(base[1]) else nothing
    first = ("base model", nothing, loss, nothing, nothing, nothing, nothing, rouge, *[nothing] * 4)
    table = (first, *(result.cells(equal) for result in results))
    seeds = ", ".join(map(str, comparison.seeds))
    notes = [
        f"Held-out loss in nats per token, mean ± standard deviation over seeds {seeds}; bytes down and up together.",
        "Losses at equal budgets are the last that were measured within them; a method of longer runs has not come to its end.",
        f"Equal examples: {equal.examples:,} in all (steps times batch size); equal passes: {equal.passes:,} forward "
        "passes of a record (a step costs 2 without backpropagation, of n directions n + 1, and 3 with it; of mixed rounds "
        "their mean).",
    ]
    if comparison.control:
        notes.append(
            "Control: the final loss of runs whose training responses were shuffled within each category; minus control: a "
            "run's final loss less that of the control with its seed."
        )
    if len(comparison.methods[0].lr) > 1:
        notes.append(
            f"Each learning rate is the best of {len(comparison.methods[0].lr)} by the held-out loss with seed "
            f"{comparison.tuning_seed}."
        )
        rows = [result.row for result in results]
        if edges := [row.entry.name for row in rows if row.lr in (min(row.entry.lr), max(row.entry.lr))]:
            notes.append(f"At an end of its grid, so that a wider one may do better: {', '.join(edges)}.")
    return Report(table, tuple(map(visible, notes)))
