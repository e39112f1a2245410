"""A ledger's model, or a baseline's tensors, beside the base: on held-out records or any others."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass, fields, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, get_args

from fedkseed.baselines import TunedTensors, restore
from fedkseed.data import Example, LongPrompts, encode, is_natural_instructions, read_source, resolve_source
from fedkseed.errors import ConfigError, FedKSeedError, RunError, RunFolderError
from fedkseed.evaluation import AllScores, Scores, score
from fedkseed.federation import Checkpoint
from fedkseed.files import placed
from fedkseed.kseed.apply import apply
from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.answers import Answer, answer_to, keep_answers
from fedkseed.runs.folder import RunFolder, exists, tuned_file
from fedkseed.runs.inputs import Inputs, separate
from fedkseed.runs.layout import CONFIG
from fedkseed.runs.learner import learner_of
from fedkseed.runs.observer import WARNING, Nobody, Observer
from fedkseed.runs.records import describe, load_examples, sample
from fedkseed.runs.settings import RunConfig, SimulationConfig
from fedkseed.runs.task import tune_all_but

CLOSE = 0.01
"""By how much of itself a loss differs between machines and precisions at most."""


@dataclass(frozen=True)
class Choices:
    """What is said instead of the run's settings; None: as the run has it.

    Attributes:
        model: the base model.
        data: records to evaluate on; of a Natural Instructions folder the test tasks.
        columns: what the data's fields are called.
        template: prompt template.
        max_length: longest record in tokens.
        limit: evaluate on a seeded draw of so many.
        answers: answer a seeded draw of so many of these.
        long_prompts: what becomes of records whose prompt fills that: cut or drop.
        round: of the run, take the ledger that it kept after this round, or after the "best" one.
    """

    model: str | None = None
    data: str | None = None
    columns: str | None = None
    template: str | None = None
    max_length: int | None = None
    limit: int | None = None
    answers: int = 0
    round: str | int | None = None
    long_prompts: LongPrompts | None = None


@dataclass(frozen=True)
class Evaluated:
    """What was measured.

    Attributes:
        base: of the base model.
        tuned: of the tuned one.
        tuning: what tunes it.
        num_records: how many records there are; the scores are over those that fit and were drawn.
        answers: to those records that were answered, of both.
    """

    base: AllScores
    tuned: AllScores
    tuning: Checkpoint
    num_records: int
    answers: tuple[Answer, ...] = ()


def evaluate(
    run: str | Path | None = None, *, ledger: str | Path | None = None, observer: Observer | None = None, **choices: Any
) -> Evaluated:
    """The held-out loss, and on request the answers' scores, of the base model and of the tuned one.

    Args:
        run: a run's folder, or a ledger file.
        ledger: another ledger than the run's, such as a published one.
        observer: who watches; None for nobody.
        choices: what is said instead of the run's settings; see `Choices`. `model` may be a pair (loaded model, tokenizer),
            which is left as it was; `data` may be records, as of `fedkseed.simulate`.

    Returns:
        The scores of the base model and of the tuned one, in nats per response token and as shares from 0 to 1.

    Raises:
        ConfigError: no ledger, no model or no data is known.
        FedKSeedError: the ledger, the model or the data cannot be used.
    """
    unknown = sorted(choices.keys() - {field.name for field in fields(Choices)})
    if unknown:
        known = ", ".join(field.name for field in fields(Choices))
        raise ConfigError(f"{unknown[0]!r} is unknown; expected one of: {known}")
    for name, least in (("limit", 1), ("answers", 0), ("max_length", 2)):
        number = choices.get(name)
        if number is not None and (not isinstance(number, Integral) or isinstance(number, bool) or number < least):
            raise ConfigError(f"{name} is {number!r:.40}; expected an integer from {least} on")
    for name in ("template", "columns"):
        if not isinstance(choices.get(name), (str, Path, dict, type(None))):
            raise ConfigError(f"{name} is {choices[name]!r:.80}; expected a text")
    for name, place in (("run", run), ("ledger", ledger)):
        if not isinstance(place, (str, os.PathLike, type(None))):
            raise ConfigError(
                f"{name} is a {type(place).__name__}; expected a run's folder or a ledger's file: .folder of a result, .save "
                "of a ledger"
            )
    named, inputs = separate(choices)
    where, other = None if run is None else placed(run), None if ledger is None else placed(ledger)
    return measure(where, other, Choices(**named), observer or Nobody(), inputs)


def measure(
    run: Path | None, ledger: Path | None, choices: Choices, observer: Observer, inputs: Inputs | None = None
) -> Evaluated:
    """The same, with the choices in one, and objects in place of what they name."""
    given = inputs or Inputs()
    as_run = given == Inputs() and replace(choices, answers=0, round=None) == Choices()
    where = ledger or run
    if where is None:
        raise ConfigError("no run and no --ledger; give a run folder, or --ledger FILE with --model and --data")
    if choices.columns is not None and choices.data is None:
        raise ConfigError("--columns is of --data, which is missing; give --data, or leave --columns out")
    if choices.round is not None and ledger is not None:
        raise ConfigError("--round is of a run, and --ledger is another ledger than the run's; give one of them")
    if run is not None and ledger is not None and not exists(run / CONFIG):
        raise RunFolderError(f"{run} holds no run (no {CONFIG}) whose records --ledger could be measured on; leave it out")
    file = tuned_file(where, choices.round)
    config = _run_config(run or where, choices)
    baseline = config if config is not None and not config.facts.has_ledger and ledger is None else None
    tuning = TunedTensors.load(file) if baseline else Ledger.load(file)
    source = _source(config, choices, where)
    own = config if config is not None else RunConfig.model_validate({"model": source, "lr": 1.0})
    long_prompts = choices.long_prompts or own.long_prompts
    if long_prompts not in get_args(LongPrompts):
        raise ConfigError(f"--long-prompts is {long_prompts!r}; expected {' or '.join(get_args(LongPrompts))}")
    learner = learner_of(source, own.dtype, "cpu", choices.max_length or own.max_length, inputs=given)
    soft_prompt = baseline.soft_prompt if baseline else 0
    max_length = learner.max_length(choices.max_length or own.max_length, soft_prompt)
    records = given.data or _records(config, choices, where, max_length)
    seed = config.seed if config else 0
    heard = partial(observer.progress, "tokenising")
    encoded = encode(records, learner.tokenizer, max_length, own.prompts(choices.template), heard, long_prompts)
    observer.note(describe("evaluation", encoded, learner.traits.context))
    learner.check_ids(encoded.examples)
    chosen = sample(len(encoded.examples), choices.limit or own.eval_limit, seed)
    examples, kept = [encoded.examples[i] for i in chosen], [records[encoded.kept[i]] for i in chosen]
    answered = sample(len(examples), choices.answers, seed, "answered") if choices.answers else []
    model: Any = learner.model if given.model is None else copy.deepcopy(given.model)
    model.train(False)

    def scored(of: Any) -> AllScores:
        told = observer.progress
        return score(
            of, learner.tokenizer, examples, kept, learner.pad_id, answered, told, encoded.stop_ids, learner.traits.context
        )

    base = scored(model)
    comparable = isinstance(config, SimulationConfig) and not config.facts.has_soft_prompt  # whose round 0 has one
    if comparable and as_run and (damage := _differs(run or where, base.overall)) is not None:
        observer.note(WARNING + damage)
    if isinstance(tuning, Ledger):
        apply(model, tuning)
    elif baseline is not None:
        tune_all_but(model, learner.frozen(baseline.train, baseline.freeze))
        model = restore(model, baseline, tuning)
    tuned = scored(model)
    answers = tuple(answer_to(kept[i], base.answers[i], tuned.answers[i]) for i in answered)
    own_records = ledger is None and choices.data is None and given.data is None
    if answers and run is not None and own_records and exists(run / CONFIG):  # a published folder is for others' eyes
        try:
            keep_answers(run, tuning, answers)
        except RunError as error:  # somebody else's run, perhaps: what was measured is worth more
            observer.note(str(error))
    return Evaluated(base, tuned, tuning, len(records), answers)


def _run_config(path: Path, choices: Choices) -> RunConfig | None:
    """The settings of the run whose folder or ledger this is; those beside a bare file may be no run's, and not wanted."""
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG).exists():
        return None
    try:
        return RunFolder.open(folder).config
    except FedKSeedError:
        if path.is_file() and choices.model is not None and choices.data is not None:  # anybody's, and not needed
            return None
        raise


def _differs(path: Path, base: Scores) -> str | None:
    """Why what is measured is not what the run measured, if that shows: the base model's loss on the same records."""
    events = RunFolder.open(path if path.is_dir() else path.parent).recorded().events
    evaluations = [event for event in events if event["event"] == "evaluation"]
    begun = next((event for event in evaluations if event["server_round"] == 0), None)
    if begun is None or not math.isfinite(begun["eval_loss"]):
        return None
    first, last = ((event.get("num_examples"), event.get("num_tokens")) for event in (begun, evaluations[-1]))
    if first != last:  # it went on with other records to evaluate on, which it may
        return None
    if first == (base.num_examples, base.num_tokens) and abs(base.loss - begun["eval_loss"]) <= CLOSE * abs(begun["eval_loss"]):
        return None
    return (
        f"the base model's loss is {base.loss:.4f} on {base.num_examples} records, and was {begun['eval_loss']:.4f} on "
        f"{begun.get('num_examples')} when the run began: records, template or model have changed, so that records that were "
        "trained on may be among these"
    )


def _source(config: RunConfig | None, choices: Choices, where: Path) -> str:
    if choices.model is None and config is None:
        raise ConfigError(f"--model is missing and {where} has no {CONFIG} beside it that names the base model; give --model")
    return config.model if choices.model is None and config else choices.model or ""


def _records(config: RunConfig | None, choices: Choices, where: Path, max_length: int) -> list[Example]:
    if choices.data is not None:
        resolve_source(choices.data)  # which says what is not there
        if choices.columns is not None and is_natural_instructions(Path(choices.data)):
            raise ConfigError(
                f"--columns is {choices.columns!r} and tasks of Natural Instructions have no columns; leave it out"
            )
        return read_source(choices.data, "test", max_length, config.seed if config else 0, choices.columns)
    if config is None:
        raise ConfigError(f"--data is missing and {where} has no {CONFIG} beside it that names held-out records; give --data")
    if isinstance(config, SimulationConfig):
        return load_examples(config)[1]
    if config.eval_data is not None:
        return read_source(config.eval_data, "test", max_length, config.seed, config.columns)
    raise ConfigError(f"--data is missing: {where} is a run on Flower, whose records are its clients' own; give --data")
