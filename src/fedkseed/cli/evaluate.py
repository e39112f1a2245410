"""`fedkseed evaluate`: what was measured, as tables and as a file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedkseed.cli.display import Lines
from fedkseed.errors import ConfigError
from fedkseed.evaluation import AllScores, Scores
from fedkseed.federation import Checkpoint
from fedkseed.files import write_atomically
from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.scoring import Choices, measure


def evaluate(run: Path | None, ledger: Path | None, choices: Choices, by_category: bool, output: Path | None) -> None:
    """Print the loss, and on request the answers' scores, of the base and of the tuned model.

    Args:
        run: a run folder, or a ledger file.
        ledger: a ledger other than the run's.
        choices: what else the command line says.
        by_category: show each category too.
        output: JSON file to write.

    Raises:
        ConfigError: no ledger, no model or no data is known.
        FedKSeedError: the ledger, the model or the data cannot be used.
    """
    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no such folder; give a file in a folder that exists")
    found = measure(run, ledger, choices, Lines(Console()))
    _show(found.base, found.tuned, found.tuning.round, by_category)
    if output is not None:
        _write(output, found.base, found.tuned, found.tuning)


def _show(base: AllScores, tuned: AllScores, rounds: int, by_category: bool) -> None:
    console, after = Console(soft_wrap=True), f"after {rounds} rounds"
    table = Table("", "base", after, box=None, pad_edge=False)
    for (name, value), new_value in zip(_rows(base.overall).items(), _rows(tuned.overall).values(), strict=True):
        table.add_row(name, value, new_value)
    console.print(table)
    if not by_category:
        return
    answered = base.overall.num_answers > 0
    columns = ["category", "records", "loss: base", after, *(["Rouge-L: base", after] if answered else [])]
    table = Table(*columns, box=None, pad_edge=False)
    for name, before in base.categories.items():
        now = tuned.categories[name]
        rouge = [_percent(scores.rouge_l) for scores in (before, now)] if answered else []
        table.add_row(escape(name), f"{before.num_examples:,}", f"{before.loss:.4f}", f"{now.loss:.4f}", *rouge)
    print()
    console.print(table)


def _rows(scores: Scores) -> dict[str, str]:
    rows = {
        "held-out loss": f"{scores.loss:.4f}",
        "perplexity": f"{scores.perplexity:.2f}",
        "records": f"{scores.num_examples:,}",
        "response tokens": f"{scores.num_tokens:,}",
    }
    if scores.num_answers:
        rows[f"exact match of {scores.num_answers:,}"] = _percent(scores.exact_match)
        rows["Rouge-L (rouge-score)"] = _percent(scores.rouge_l)
        rows["Rouge-L (as published)"] = _percent(scores.rouge_l_published)
    return rows


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f} %"


def _write(path: Path, base: AllScores, tuned: AllScores, tuning: Checkpoint) -> None:
    def plain(scores: AllScores) -> dict[str, Any]:
        return {"overall": _json(scores.overall), "categories": {name: _json(s) for name, s in scores.categories.items()}}

    kind = "ledger" if isinstance(tuning, Ledger) else "tensors"
    content = {kind: tuning.digest(), "rounds": tuning.round, "base": plain(base), "tuned": plain(tuned)}
    try:
        write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())
    except OSError as error:
        raise ConfigError(
            f"--output {path}: cannot be written ({error.strerror}); give a file in a folder that exists"
        ) from error


def _json(scores: Scores) -> dict[str, Any]:
    """Without what is not known: JSON has no NaN."""
    return {name: value for name, value in asdict(scores).items() if not isinstance(value, float) or math.isfinite(value)}
