"""`fedkseed export`: the tuned model as a Hugging Face folder, or the published ledger."""

from pathlib import Path
from typing import Literal

from fedkseed.cli.inspect import ledger_path
from fedkseed.errors import ConfigError, RunFolderError
from fedkseed.ledger import Ledger

Dtype = Literal["auto", "float32", "float16", "bfloat16"]


def export(path: Path, output: Path, model: str | None, dtype: Dtype, ledger_only: bool) -> None:
    """Write the tuned model or the published ledger; nothing that exists is overwritten.

    Raises:
        RunFolderError: the output exists.
        ConfigError: no base model is known.
        LedgerError: the ledger cannot be read, or the model is not its base.
    """
    ledger = Ledger.load(ledger_path(path))
    if output.exists():
        raise RunFolderError(f"{output} exists; give an output that does not")
    if ledger_only:
        ledger.published().save(output)
        print(f"{output}: {output.stat().st_size:,} bytes, {ledger.round} rounds, K = {ledger.pool.size}")
        return
    from fedkseed.models import load_model, load_tokenizer, save_model
    from fedkseed.run_folder import CONFIG, RunFolder
    from fedkseed.tuned_model import apply

    folder = path if path.is_dir() else path.parent
    if model is None:
        if not (folder / CONFIG).exists():
            raise ConfigError(f"--model is missing and {folder} has no {CONFIG} that names the base model; give --model")
        model = RunFolder.open(folder).config.model
    tokenizer = load_tokenizer(model)
    tuned = load_model(model, dtype, "cpu")
    apply(tuned, ledger)
    save_model(tuned, tokenizer, output)
    print(f"{output}: {model} after {ledger.round} rounds, {sum(p.numel() for p in tuned.parameters()):,} parameters")
