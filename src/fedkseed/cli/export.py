"""`fedkseed export`: the tuned model as a Hugging Face folder, an adapter as PEFT's, or the published ledger."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkseed.baselines import TunedTensors, adapter, restore
from fedkseed.cli.console import complain, say
from fedkseed.cli.display import Lines, waiting
from fedkseed.cli.outputs import make_folder_for, require_new
from fedkseed.errors import ConfigError, FedKSeedError, InvalidValueError, ModelError
from fedkseed.files import placed
from fedkseed.kseed.distance import relative_distance
from fedkseed.kseed.ledger import LEDGER, Ledger
from fedkseed.kseed.thinning import thinned
from fedkseed.models.dtypes import Dtype
from fedkseed.runs.checkpoints import TENSORS
from fedkseed.runs.folder import RunFolder, tuned_file
from fedkseed.runs.layout import CONFIG
from fedkseed.text import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedkseed.kseed.card import Prompt
    from fedkseed.report.reading import RunRecord
    from fedkseed.runs.settings import RunConfig


def export(
    path: Path,
    output: Path,
    model: str | None,
    dtype: Dtype,
    ledger_only: bool,
    which: str | None = None,
    bits: int | None = None,
) -> None:
    """Write the tuned model with its card, or the published ledger, bare or with its card; nothing that exists is overwritten.

    Args:
        path: a run's folder, or a ledger's file.
        output: what to write. A published ledger is bare where this has a suffix, as a file's name has.
        model: the base model; None for the run's own.
        dtype: precision of the exported weights.
        ledger_only: write the published ledger.
        which: the round whose ledger is taken, or "best"; None for the last.
        bits: of a number in the published ledger; None for as many as the run's.

    Raises:
        RunFolderError: the output exists.
        InvalidValueError: a number of bits that there is not, or with which the ledger would be no smaller.
        ConfigError: bits of a whole model, no base model is known, the run's settings are not valid (any more), or a baseline
            has no ledger.
        RunError: the run's settings or a baseline's tensors are damaged.
        LedgerError: the ledger cannot be read, or the model is not its base.
    """
    if bits is not None and not ledger_only:
        raise ConfigError(f"--bits is {bits} and a whole model is exported; give --ledger-only too, or leave --bits out")
    if ledger_only and dtype != "auto":
        raise ConfigError(f"--dtype is {dtype} and --ledger-only, whose numbers are of no weights; leave one of them out")
    if ledger_only and model is not None and output.suffix and (bits is None or not (path / CONFIG).exists()):
        raise ConfigError(f"--model is {model} and a bare ledger has no use for it; leave it out, or give a folder to write")
    checkpoint = tuned_file(path, which)
    if ledger_only and checkpoint.name == TENSORS:
        raise ConfigError(f"--ledger-only: {path} is the run of a baseline, which has no ledger; leave it out")
    tuning = TunedTensors.load(checkpoint) if checkpoint.name == TENSORS else Ledger.load(checkpoint)
    require_new(output)
    if ledger_only and isinstance(tuning, Ledger):
        published = tuning.published() if bits is None else thinned(tuning, bits)
        if output.suffix:
            file = output
            make_folder_for(file)
            published.save(file)
        else:
            file = _write_folder(path, output, model, which, tuning, published)
        say(f"{file}: {file.stat().st_size:,} bytes, {counted(tuning.round, 'round')}, K = {tuning.pool.size}")
        if bits is not None:
            _say_cost(path, checkpoint, tuning, published, file, model)
        return
    from fedkseed.kseed.card import licence_of
    from fedkseed.models.adapter_folder import has_adapter
    from fedkseed.models.loading import load_tokenizer, save_model
    from fedkseed.report.model_card import About, model_card

    model, config, losses = _origin(path, model, which, tuning)
    with waiting(Lines().note, f"loading {model} and adding {counted(tuning.round, 'round')} to it"):
        tokenizer = load_tokenizer(model)
        tuned = _tuned(tuning, model, config, dtype)
    prompt = _taught(tokenizer, tuned, config, path, tuning) if config else None
    card = model_card(public_name(model), tuning, About(config, losses, licence_of(model), prompt))
    wrapped = config is not None and config.facts.needs_peft
    # or else peft asks the hub whether the vocabulary has grown
    with waiting(Lines().note, f"writing {output}"):
        save_model(tuned, tokenizer, output, card, **({"save_embedding_layers": False} if wrapped else {}))
    what = "an adapter for" if wrapped or has_adapter(tuned) else f"{sum(p.numel() for p in tuned.parameters()):,} parameters,"
    say(f"{output}: {what} {model} after {counted(tuning.round, 'round')}")


def _origin(
    path: Path, model: str | None, which: str | None, tuning: Ledger | TunedTensors
) -> tuple[str, RunConfig | None, tuple[float, float] | None]:
    """The base model, and what `_known` knows."""
    from fedkseed.report.reading import read

    folder = path if path.is_dir() else path.parent
    # beside a bare ledger, a config.toml is looked at only for want of a model: it may be anybody's
    wanted = path.is_dir() or model is None or isinstance(tuning, TunedTensors)
    record = read(folder, which) if (folder / CONFIG).exists() and wanted else None
    if model is None:
        if record is None:
            raise ConfigError(f"--model is missing and {folder} has no {CONFIG} that names the base model; give --model")
        model = record.config.model
    if record is not None and record.damage:
        complain(f"{record.damage}; the card is without it")
    return model, *_known(record, tuning)


def _write_folder(path: Path, output: Path, model: str | None, which: str | None, ledger: Ledger, published: Ledger) -> Path:
    """A folder with the published ledger and its card; returns the ledger's file."""
    from fedkseed.kseed.card import licence_of
    from fedkseed.kseed.sharing import save_folder
    from fedkseed.models.adapter_folder import base_of, is_adapter
    from fedkseed.models.loading import load_tokenizer
    from fedkseed.report.model_card import About, rows_of

    given = model
    model, config, losses = _origin(path, model, which, ledger)
    if given is not None:
        _check_base(given, config, ledger)
    try:
        prompt = _prompt(load_tokenizer(model), config, path, ledger) if config else None
    except ModelError as error:
        complain(f"{error}; the card is without the prompt template")
        prompt = None
    known = losses if published.digest() == ledger.published().digest() else None  # fewer bits are another model
    about, named = rows_of(published, About(config, known, licence_of(model))), public_name(model)
    if is_adapter(folder := placed(model)):
        about, named = {**_adapter_row(folder), **about}, public_name(base_of(folder))
    return save_folder(published, output, named, prompt, about) / LEDGER


def _check_base(model: str, config: RunConfig | None, ledger: Ledger) -> None:
    """Refuse a base that the ledger is not of, which its card would name; what cannot be loaded here is not checked."""
    from fedkseed.kseed.apply import base_reader, parameters_of
    from fedkseed.models.loading import load_model

    try:
        loaded = load_model(model, config.dtype if config else "float32", "cpu")
    except ModelError as error:
        if not model:
            raise
        complain(f"{error}; that it is the ledger's base is not checked")
        return
    entries, _ = parameters_of(loaded, ledger)
    base_reader(loaded, entries, ledger)


def _adapter_row(folder: Path) -> dict[str, str]:
    """What is known of how to make an adapter again."""
    from fedkseed.kseed.card import ADAPTER_FIELD, fields_in

    made_by = fields_in(folder).get(ADAPTER_FIELD)
    return {
        "adapter": f"`{made_by}`" if isinstance(made_by, str) else f"`{folder.resolve().name}`, which goes with these numbers"
    }


def _tuned(tuning: Ledger | TunedTensors, model: str, config: RunConfig | None, dtype: Dtype) -> Any:
    """The tuned model, or the base with an adapter."""
    import torch

    from fedkseed.kseed.apply import apply
    from fedkseed.models.loading import give_stored_dtypes, load_model
    from fedkseed.runs.learner import learner_of
    from fedkseed.runs.task import tune_all_but

    if isinstance(tuning, Ledger):
        # as the run loaded it, so that it is its base; the weights are cast when they are tuned
        tuned = load_model(model, config.dtype if config else "float32", "cpu")
        apply(tuned, tuning)
        if dtype == "auto":
            give_stored_dtypes(tuned, model)
            return tuned
        return tuned.to(getattr(torch, dtype))
    if config is None:
        raise ConfigError(f"a baseline's tensors are nothing without the {CONFIG} of their run; give the run's folder")
    learner = learner_of(model, config.dtype, "cpu", config.max_length)
    base: Any = learner.model
    tune_all_but(base, learner.frozen(config.train, config.freeze))
    tuned = adapter(base, config, tuning, public_name(model)) if config.facts.needs_peft else restore(base, config, tuning)
    return tuned if dtype == "auto" else tuned.to(getattr(torch, dtype))


def _taught(
    tokenizer: PreTrainedTokenizerBase, tuned: Any, config: RunConfig, path: Path, tuning: Ledger | TunedTensors
) -> Prompt | None:
    """Let tokenizer and model ask and end as the run did, and say how."""
    from fedkseed.data import Example, encode

    prompt = _prompt(tokenizer, config, path, tuning)
    if prompt is None:
        return None
    template = config.prompts()
    jinja = template.chat_template(tokenizer)
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template["default"] = jinja
    else:
        tokenizer.chat_template = jinja
    ends = encode([Example("a", "", "b", "")], tokenizer, 1 << 20, template).stop_ids
    generation = getattr(tuned, "generation_config", None)
    if generation is not None:
        known = generation.eos_token_id
        stop = list(dict.fromkeys([*(known if isinstance(known, list) else [] if known is None else [known]), *ends]))
        generation.eos_token_id = stop if len(stop) > 1 else stop[0]
    return prompt


def _prompt(tokenizer: PreTrainedTokenizerBase, config: RunConfig, path: Path, tuning: Ledger | TunedTensors) -> Prompt | None:
    """How the run asked; None where its template is a file that is not there any more, or says something else now."""
    from fedkseed.kseed.card import Prompt
    from fedkseed.runs.provenance import template_digest

    run = RunFolder.open(path if path.is_dir() else path.parent)
    try:
        checkpoint = run.load_checkpoint() if isinstance(tuning, Ledger) else tuning  # a kept round's ledger says nothing of it
    except FedKSeedError:  # it is not the one that is exported
        checkpoint = None
    was = (checkpoint.made_with or {}).get("template") if checkpoint is not None else None
    try:
        if was is not None and template_digest(config) not in (None, was):
            raise InvalidValueError(f"template {config.template}: has changed since the run")
        return Prompt(Path(config.template).name, *config.prompts().text(tokenizer))
    except InvalidValueError as error:
        complain(f"{error}; the export is without its prompt template")
        return None


def _say_cost(path: Path, whole: Path, ledger: Ledger, thin: Ledger, output: Path, model: str | None) -> None:
    """What fewer bits cost: how far the weights lie off, and in a run's folder the held-out loss with and without them."""
    off = relative_distance(ledger, thin)
    say(f"bytes before {len(ledger.published().encode()):,}; off by {off:.1%} of the way from the base")
    if not (path / CONFIG).exists():
        return
    from fedkseed.runs.scoring import Choices, measure

    try:
        losses = [measure(path, file, Choices(model=model), Lines()).tuned.overall.loss for file in (whole, output)]
    except FedKSeedError as error:
        complain(f"the loss with fewer bits is not known: {error}")
        return
    say("held-out loss {:.4f}, with fewer bits {:.4f}".format(*losses))


def public_name(model: str) -> str:
    """What a model may be called elsewhere: no path of this machine."""
    from fedkseed.demo import model_folder

    path = placed(model)
    if not path.is_dir():
        return model
    return "fedkseed-demo" if path.resolve() == model_folder().resolve() else path.resolve().name


def _known(record: RunRecord | None, tuning: Ledger | TunedTensors) -> tuple[RunConfig | None, tuple[float, float] | None]:
    """The settings of the run that led to this, and its held-out losses before and after, as far as they are known."""
    if record is None or (isinstance(tuning, Ledger) and not _same(record.ledger, tuning)):
        return None, None
    losses = {evaluation.server_round: evaluation.loss for evaluation in record.evaluations}
    if not {0, tuning.round} <= losses.keys():
        return record.config, None
    return record.config, (losses[0], losses[tuning.round])


def _same(one: Ledger | None, other: Ledger) -> bool:
    return one is not None and one.published().digest() == other.published().digest()
