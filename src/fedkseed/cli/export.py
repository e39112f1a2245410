"""`fedkseed export`: the tuned model as a Hugging Face folder, or the published ledger."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fedkseed.errors import ConfigError, RunFolderError
from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.algorithms import TENSORS, checkpoint_path
from fedkseed.runs.folder import CONFIG

if TYPE_CHECKING:
    from fedkseed.report.reading import RunRecord
    from fedkseed.runs.settings import RunConfig

Dtype = Literal["auto", "float32", "float16", "bfloat16"]


def export(path: Path, output: Path, model: str | None, dtype: Dtype, ledger_only: bool) -> None:
    """Write the tuned model with its card, or the published ledger; nothing that exists is overwritten.

    Raises:
        RunFolderError: the output exists.
        ConfigError: no base model is known, or the run's settings are not valid (any more).
        RunError: the run's settings are damaged.
        LedgerError: the ledger cannot be read, or the model is not its base.
    """
    if checkpoint_path(path).name == TENSORS:
        raise ConfigError(f"{path} is the run of a baseline, which has no ledger; its tensors are {path / TENSORS}")
    ledger = Ledger.load(checkpoint_path(path))
    if output.exists():
        raise RunFolderError(f"{output} exists; give an output that does not")
    if ledger_only:
        ledger.published().save(output)
        print(f"{output}: {output.stat().st_size:,} bytes, {ledger.round} rounds, K = {ledger.pool.size}")
        return
    from fedkseed.kseed.apply import apply
    from fedkseed.models.loading import load_model, load_tokenizer, save_model
    from fedkseed.report.model_card import model_card
    from fedkseed.report.reading import read

    folder = path if path.is_dir() else path.parent
    # beside a bare ledger, a config.toml is looked at only for want of a model: it may be anybody's
    record = read(folder) if (folder / CONFIG).exists() and (path.is_dir() or model is None) else None
    if model is None:
        if record is None:
            raise ConfigError(f"--model is missing and {folder} has no {CONFIG} that names the base model; give --model")
        model = record.config.model
    if record is not None and record.damage:
        print(f"fedkseed: {record.damage}; the card is without it", file=sys.stderr)
    tokenizer = load_tokenizer(model)
    tuned = load_model(model, dtype, "cpu")
    apply(tuned, ledger)
    save_model(tuned, tokenizer, output, model_card(public_name(model), ledger, *_known(record, ledger)))
    print(f"{output}: {model} after {ledger.round} rounds, {sum(p.numel() for p in tuned.parameters()):,} parameters")


def public_name(model: str) -> str:
    """What a model may be called elsewhere: no path of this machine."""
    from fedkseed.demo import model_folder

    path = Path(model).expanduser()
    if not path.is_dir():
        return model
    return "fedkseed-demo" if path.resolve() == model_folder().resolve() else path.resolve().name


def _known(record: RunRecord | None, ledger: Ledger) -> tuple[RunConfig | None, tuple[float, float] | None]:
    """The settings of the ledger's run and its held-out losses before and after, as far as they are known."""
    if record is None or record.ledger is None or record.ledger.published().digest() != ledger.published().digest():
        return None, None
    losses = {evaluation.server_round: evaluation.loss for evaluation in record.evaluations}
    if not {0, ledger.round} <= losses.keys():
        return record.config, None
    return record.config, (losses[0], losses[ledger.round])
