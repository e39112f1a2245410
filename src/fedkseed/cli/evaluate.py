"""`fedkseed evaluate`: a ledger's model beside its base, on held-out records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedkseed.cli.inspect import ledger_path
from fedkseed.data import EncodedExample, Example, encode, get_template, pad_token_id, read_jsonl
from fedkseed.errors import ConfigError
from fedkseed.evaluation import EvalLoss, evaluate_loss, exact_match, generate
from fedkseed.ledger import Ledger
from fedkseed.models import load_model, load_tokenizer
from fedkseed.run_folder import CONFIG, RunFolder
from fedkseed.simulation import load_examples
from fedkseed.simulation_config import SimulationConfig
from fedkseed.tuned_model import apply

BATCH = 8


def evaluate(path: Path, model: str | None, data: Path | None, limit: int | None, answers: int) -> None:
    """Print the loss, and on request the answers, of the base and of the tuned model.

    Args:
        path: a run folder or a ledger.
        model: the base model; None takes the run's.
        data: records to evaluate on; None takes the run's held-out records.
        limit: evaluate on the first so many.
        answers: generate answers to the first so many and count exact matches.

    Raises:
        ConfigError: no model or no data is known.
        FedKSeedError: the ledger, the model or the data cannot be used.
    """
    ledger = Ledger.load(ledger_path(path))
    folder = path if path.is_dir() else path.parent
    config = RunFolder.open(folder).config if (folder / CONFIG).exists() else None
    source, records = _source(config, model, folder), _records(config, data, folder)
    tokenizer = load_tokenizer(source)
    template, max_length = get_template(config.template if config else "plain"), config.max_length if config else 1024
    encoded = encode(records, tokenizer, max_length, template)
    examples, kept = encoded.examples[:limit], [records[i] for i in encoded.kept[:limit]]
    tuned = load_model(source, config.dtype if config else "auto", "cpu")
    rows = [_measure(tuned, tokenizer, examples, kept, answers)]
    apply(tuned, ledger)
    rows.append(_measure(tuned, tokenizer, examples, kept, answers))
    table = Table("", "base", f"after {ledger.round} rounds", box=None, pad_edge=False)
    for name, *values in zip(*[row.keys() for row in rows[:1]], *[row.values() for row in rows], strict=True):
        table.add_row(name, *values)
    Console(soft_wrap=True).print(table)


def _source(config: SimulationConfig | None, model: str | None, folder: Path) -> str:
    if model is None and config is None:
        raise ConfigError(f"--model is missing and {folder} has no {CONFIG} that names the base model; give --model")
    return model or (config.model if config else "")


def _records(config: SimulationConfig | None, data: Path | None, folder: Path) -> list[Example]:
    if data is not None:
        return read_jsonl(data)
    if config is None:
        raise ConfigError(f"--data is missing and {folder} has no {CONFIG} that names held-out records; give --data")
    return load_examples(config)[1]


def _measure(
    model: Any, tokenizer: Any, examples: tuple[EncodedExample, ...], records: list[Example], answers: int
) -> dict[str, str]:
    result: EvalLoss = evaluate_loss(model, examples, BATCH, pad_token_id(tokenizer))
    shown = {
        "held-out loss": f"{result.loss:.4f}",
        "perplexity": f"{result.perplexity:.2f}",
        "records": f"{result.num_examples:,}",
        "response tokens": f"{result.num_tokens:,}",
    }
    if answers:
        references = [record.output for record in records[:answers]]
        share = exact_match(generate(model, tokenizer, examples[:answers]), references)
        shown[f"exact match of {len(references)}"] = f"{100 * share:.1f} %"
    return shown
