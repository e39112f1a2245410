"""`fedkseed evaluate`: a ledger's model beside its base, on held-out records or any others."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedkseed.baselines import TunedTensors, restore
from fedkseed.cli.display import Notes
from fedkseed.data import Example, encode, get_template, read_source
from fedkseed.errors import ConfigError
from fedkseed.evaluation import AllScores, Scores, score
from fedkseed.federation import Checkpoint
from fedkseed.files import write_atomically
from fedkseed.kseed.apply import apply
from fedkseed.kseed.ledger import Ledger
from fedkseed.models.loading import load_model, load_tokenizer
from fedkseed.runs.algorithms import checkpoint_path
from fedkseed.runs.folder import CONFIG, RunFolder
from fedkseed.runs.records import check_context, describe, load_examples, sample
from fedkseed.runs.settings import RunConfig, SimulationConfig


@dataclass(frozen=True)
class Choices:
    """What the command line says instead of the run's settings; None: as the run has it.

    Attributes:
        model: the base model.
        data: records to evaluate on; of a Natural Instructions folder the test tasks.
        columns: what the data's fields are called.
        template: prompt template.
        max_length: longest record in tokens.
        limit: evaluate on a seeded draw of so many.
        answers: answer a seeded draw of so many of these.
        by_category: show each category too.
        output: JSON file to write.
    """

    model: str | None = None
    data: str | None = None
    columns: str | None = None
    template: str | None = None
    max_length: int | None = None
    limit: int | None = None
    answers: int = 0
    by_category: bool = False
    output: Path | None = None


def evaluate(run: Path | None, ledger: Path | None, choices: Choices) -> None:
    """Print the loss, and on request the answers' scores, of the base and of the tuned model.

    Args:
        run: a run folder, or a ledger file.
        ledger: a ledger other than the run's.
        choices: what else the command line says.

    Raises:
        ConfigError: no ledger, no model or no data is known.
        FedKSeedError: the ledger, the model or the data cannot be used.
    """
    where = ledger or run
    if where is None:
        raise ConfigError("no run and no --ledger; give a run folder, or --ledger FILE with --model and --data")
    if choices.columns is not None and choices.data is None:
        raise ConfigError("--columns is of --data, which is missing; give --data, or leave --columns out")
    if choices.output is not None and not choices.output.parent.is_dir():
        raise ConfigError(f"--output {choices.output}: there is no such folder; give a file in a folder that exists")
    config = _run_config(run or where)
    baseline = config if config is not None and not config.facts.has_ledger and ledger is None else None
    tuning = TunedTensors.load(checkpoint_path(where)) if baseline else Ledger.load(checkpoint_path(where))
    source, records = _source(config, choices, where), _records(config, choices, where)
    tokenizer = load_tokenizer(source)
    template = get_template(choices.template or (config.template if config else "plain"))
    max_length, seed = choices.max_length or (config.max_length if config else 1024), config.seed if config else 0
    notes = Notes(Console())
    encoded = encode(records, tokenizer, max_length, template, partial(notes.progress, "tokenising"))
    notes.note(describe("evaluation", encoded))
    check_context(source, max_length, encoded.examples, baseline.soft_prompt if baseline else 0)
    chosen = sample(len(encoded.examples), choices.limit or (config.eval_limit if config else None), seed)
    examples, kept = [encoded.examples[i] for i in chosen], [records[encoded.kept[i]] for i in chosen]
    answered = sample(len(examples), choices.answers, seed, "answered") if choices.answers else []
    model = load_model(source, config.dtype if config else "auto", "cpu")
    base = score(model, tokenizer, examples, kept, answered, notes.progress)
    if isinstance(tuning, Ledger):
        apply(model, tuning)
    elif baseline is not None:
        model = restore(model, baseline, tuning)
    tuned = score(model, tokenizer, examples, kept, answered, notes.progress)
    _show(base, tuned, tuning.round, choices.by_category)
    if choices.output is not None:
        _write(choices.output, base, tuned, tuning)


def _run_config(path: Path) -> RunConfig | None:
    """The settings of the run whose folder or ledger this is."""
    folder = path if path.is_dir() else path.parent
    return RunFolder.open(folder).config if (folder / CONFIG).exists() else None


def _source(config: RunConfig | None, choices: Choices, where: Path) -> str:
    if choices.model is None and config is None:
        raise ConfigError(f"--model is missing and {where} has no {CONFIG} beside it that names the base model; give --model")
    return choices.model or (config.model if config else "")


def _records(config: RunConfig | None, choices: Choices, where: Path) -> list[Example]:
    if choices.data is not None:
        seed, length = (config.seed, config.max_length) if config else (0, 1024)
        return read_source(choices.data, "test", choices.max_length or length, seed, choices.columns)
    if config is None:
        raise ConfigError(f"--data is missing and {where} has no {CONFIG} beside it that names held-out records; give --data")
    if isinstance(config, SimulationConfig):
        return load_examples(config)[1]
    if config.eval_data is not None:
        return read_source(config.eval_data, "test", config.max_length, config.seed, config.columns)
    raise ConfigError(f"--data is missing: {where} is a run on Flower, whose records are its clients' own; give --data")


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
