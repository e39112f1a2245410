"""`fedkseed evaluate`: what was measured, as tables and as a file."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedkseed.cli.console import say, show_table
from fedkseed.cli.display import looking_on
from fedkseed.cli.outputs import make_folder_for, require_place
from fedkseed.errors import ConfigError
from fedkseed.evaluation import AllScores, Scores
from fedkseed.federation import Checkpoint
from fedkseed.files import write_atomically
from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.folder import exists
from fedkseed.runs.scoring import Choices, Evaluated, measure
from fedkseed.text import counted


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
        RunError: the file's folder cannot be made.
        FedKSeedError: the ledger, the model or the data cannot be used.
    """
    if output is not None:
        if exists(output) and not (output.is_file() and _holds_scores(output)):  # a pipe would be waited for
            raise ConfigError(f"--output {output} exists and is no file of scores; give another file")
        require_place(output)
    with looking_on() as observer:
        found = measure(run, ledger, choices, observer)
    _show(found, by_category)
    if output is not None:
        make_folder_for(output)
        _write(output, found.base, found.tuned, found.tuning)


def _holds_scores(path: Path) -> bool:
    """Whether a file may be written anew, as whoever asks again expects: it is one of scores, or empty."""
    try:
        content = path.read_bytes()
        return not content or bool({"base", "tuned"} <= json.loads(content).keys())
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _show(found: Evaluated, by_category: bool) -> None:
    base, tuned = found.base, found.tuned
    after, now = f"after {counted(found.tuning.round, 'round')}", _rows(tuned.overall, found.num_records)
    before = _rows(base.overall, found.num_records)
    show_table(("", "base", after), [(name, value, now[name]) for name, value in before.items()])
    if not by_category:
        return
    say()
    if not base.categories:
        say("by category: nothing to tell apart; these records are all of one category, or have none")
        return
    answered = base.overall.num_answers > 0
    header = ["category", "records", "loss: base", after, *(["Rouge-L: base", after] if answered else [])]
    rows = []
    for name, scores in base.categories.items():
        both = (scores, tuned.categories[name])
        rouge = [_percent(one.rouge_l) for one in both] if answered else []
        rows.append([name, f"{scores.num_examples:,}", *(f"{one.loss:.4f}" for one in both), *rouge])
    show_table(header, rows)


def _rows(scores: Scores, num_records: int) -> dict[str, str]:
    rows = {
        "held-out loss": f"{scores.loss:.4f}",
        "perplexity": f"{scores.perplexity:.2f}",
        f"records of {num_records:,}": f"{scores.num_examples:,}",
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
        raise ConfigError(f"--output {path}: cannot be written ({error.strerror}); give another file") from error


def _json(scores: Scores) -> dict[str, Any]:
    """Without what is not known: JSON has no NaN."""
    return {name: value for name, value in asdict(scores).items() if not isinstance(value, float) or math.isfinite(value)}
