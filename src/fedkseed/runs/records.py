"""A run's records: read, tokenised, dealt out and held out; what can go wrong before a run starts goes wrong here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from fedkseed.data import (
    EncodedData,
    EncodedExample,
    Example,
    dirichlet,
    encode,
    iid,
    is_natural_instructions,
    read_source,
    shuffle_within_categories,
    split_off,
    why_dropped,
)
from fedkseed.errors import ConfigError, DataError, ProtocolError
from fedkseed.federation.envelope import check_name
from fedkseed.models.identity import BaseIdentity
from fedkseed.randomness import generator
from fedkseed.runs.held_out import affordable
from fedkseed.runs.inputs import Inputs
from fedkseed.runs.learner import USUAL_LENGTH, Learner, load_learner
from fedkseed.runs.objectives import Goal, goal_of
from fedkseed.runs.observer import WARNING, Observer
from fedkseed.runs.privacy import with_noise
from fedkseed.runs.settings import RunConfig, SimulationConfig, missing
from fedkseed.runs.task import ScoredTask, Stopwatch, TextTask
from fedkseed.text import counted

EVAL_FRACTION = 0.05
TOLERATED = 0.05
"""Share of records that may be dropped or lose tokens of their prompt without a warning."""


@dataclass(frozen=True)
class Records:
    """Tokenised data, dealt out, and what the model's answers mean for it.

    Attributes:
        config: the settings, with the length that the model takes and the number of records that are evaluated on where they
            left these open.
        clients: each client's examples, by its name.
        held_out: what is evaluated on.
        references: the records that these were encoded from.
        pad_id: what padding holds; None if the model must not see any.
        stop_ids: the ids that end a response.
        frozen: names of the tensors that are not tuned.
        sources: the records that the clients' examples were encoded from, by the client's name.
        goal: what is tuned on; None for the loss.
    """

    config: SimulationConfig
    clients: dict[str, list[EncodedExample]]
    held_out: list[EncodedExample]
    references: list[Example]
    pad_id: int | None
    stop_ids: tuple[int, ...]
    frozen: tuple[str, ...]
    sources: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    goal: Goal | None = None

    def task(self, model: torch.nn.Module, name: str, watch: Stopwatch, base: BaseIdentity) -> TextTask:
        """What a client measures; `model` is at the weights of `base`."""
        if self.goal is None:
            return TextTask(model, self.clients[name], self.pad_id, watch)
        return self.goal.task(model, self.clients[name], self.sources[name], watch, base)

    def watched(self, model: torch.nn.Module, watch: Stopwatch, base: BaseIdentity) -> ScoredTask | None:
        """The held-out records' scores, where there are scores; `model` is at the weights of `base`."""
        return None if self.goal is None else self.goal.task(model, self.held_out, self.references, watch, base)

    @property
    def sizes(self) -> dict[str, int]:
        """How many examples each client has, by its name."""
        return {name: len(examples) for name, examples in self.clients.items()}


def prepare(
    config: SimulationConfig, observer: Observer, inputs: Inputs | None = None, learner: Learner | None = None
) -> Records:
    """Read, tokenise and deal out the data: everything that can go wrong before a run starts.

    Args:
        config: the settings.
        observer: who watches.
        inputs: objects in place of what the settings name.
        learner: the model, if it is loaded already.

    Raises:
        ConfigError: records would be longer than the model takes, a pattern of tensors matches none, or a round asks too few
            clients.
        DataError: a file cannot be read or used, or cannot be dealt out as asked.
        ModelError: the tokenizer lacks what is needed or does not belong to the model; or see `load_learner`.
    """
    given = inputs or Inputs()
    learner = learner or load_learner(config, observer, given)
    config = config.model_copy(update={"max_length": learner.max_length(config.max_length, config.soft_prompt)})
    frozen = learner.frozen(config.train, config.freeze)
    train, held_out = load_examples(config, observer, given)
    named = [Path(source) for source in (config.data, config.eval_data) if source is not None]
    if config.columns is not None and named and all(map(is_natural_instructions, named)):
        observer.note(f"{WARNING}--columns is {config.columns!r}, and tasks of Natural Instructions have no columns")
    if config.responses == "shuffled":
        train = shuffle_within_categories(train, generator(config.seed, "shuffled responses"))
    encoded = encoded_for(config, learner, train, "training", observer)
    evaluation = encoded_for(config, learner, held_out, "held-out", observer)
    parts = deal([train[i] for i in encoded.kept], config)
    clients = {name: [encoded.examples[i] for i in part] for name, part in parts.items()}
    _check_cohort(config, len(clients))
    folded: dict[str, str] = {}
    for name in parts:
        if (like := folded.setdefault(name.casefold(), name)) != name:
            observer.note(f"{WARNING}clients {like!r} and {name!r} differ in capitals only; are they one?")
    sizes = {name: len(part) for name, part in parts.items()}
    if found := with_noise(config, sizes):
        config = config.model_copy(update=found)
        noise, kept = found["noise_multiplier"], f"{counted(config.num_rounds, 'round')} within epsilon {config.epsilon:g}"
        observer.note(f"noise multiplier: {noise:.4g}, which keeps {kept}")
    limit = affordable(config, sizes) if config.eval_limit is None else config.eval_limit
    chosen = sample(len(evaluation.examples), limit, config.seed)
    observer.note(f"evaluating on {len(chosen):,} of {len(held_out):,} held-out records{_why(config, len(chosen), evaluation)}")
    if config.eval_limit is None:
        config = config.model_copy(update={"eval_limit": len(chosen)})
    references = [held_out[evaluation.kept[i]] for i in chosen]
    examples = [evaluation.examples[i] for i in chosen]
    learnt = [train[i] for i in encoded.kept]
    sources = {name: [learnt[i] for i in part] for name, part in parts.items()}
    everything = [*encoded.examples, *examples], [*learnt, *references]
    goal = goal_of(config, learner, evaluation.stop_ids, *everything, given.score)
    return Records(config, clients, examples, references, learner.pad_id, evaluation.stop_ids, frozen, sources, goal)


def encoded_for(config: RunConfig, learner: Learner, examples: Sequence[Example], what: str, observer: Observer) -> EncodedData:
    """Tokenise records for a learner, by settings whose length is known, and say what was lost.

    Args:
        config: the settings.
        learner: the model.
        examples: the records.
        what: what they are called.
        observer: hears of it.

    Raises:
        ModelError: they have ids that the model has not; or see `encode`.
        DataError: see `encode`.
    """
    length = learner.max_length(config.max_length, config.soft_prompt)
    heard = partial(observer.progress, f"tokenising {what} records")
    encoded = encode(examples, learner.tokenizer, length, config.prompts(), heard, config.long_prompts)
    takes = learner.traits.context
    observer.note(describe(what, encoded, takes and takes - config.soft_prompt))
    learner.check_ids(encoded.examples)
    return encoded


def client_names(num_clients: int) -> list[str]:
    """Stable names of simulated clients: client-000, client-001, ..."""
    width = len(str(num_clients - 1))
    return [f"client-{i:0{width}}" for i in range(num_clients)]


def load_examples(
    config: SimulationConfig, observer: Observer | None = None, inputs: Inputs | None = None
) -> tuple[list[Example], list[Example]]:
    """The clients' records and the held-out ones, before tokenising.

    Held out is `--eval-data`; else the category of `--held-out-category`; else the test tasks of a Natural Instructions
    folder; else a seeded share of the training records.

    Raises:
        DataError: a source cannot be read or used.
    """
    if config.data is None:
        raise DataError(missing(["data"]))
    heard, given = observer.progress if observer else None, inputs or Inputs()

    def read(source: str, split: Literal["train", "test"]) -> list[Example]:
        return read_source(source, split, config.max_length or USUAL_LENGTH, config.seed, config.columns, heard)

    examples = given.data or read(config.data, "train")
    if config.subsample < 1:
        size = max(1, int(config.subsample * len(examples)))
        chosen = generator(config.seed, "subsample").choice(len(examples), size, replace=False)
        examples = [examples[i] for i in sorted(chosen.tolist())]
    if config.eval_data is not None:
        return examples, given.eval_data or read(config.eval_data, "test")
    if config.held_out_category is not None:
        return _by_category(examples, config.held_out_category, config.data)
    if is_natural_instructions(Path(config.data)):
        return examples, read(config.data, "test")
    if len(examples) < 2:
        raise DataError(f"{config.data} has {len(examples)} record; expected enough to hold some out, or give --eval-data")
    kept, held_out = split_off(len(examples), EVAL_FRACTION, generator(config.seed, "evaluation split"))
    return [examples[i] for i in kept], [examples[i] for i in held_out]


def _check_cohort(config: SimulationConfig, num_clients: int) -> None:
    """Refuse rounds that ask too few."""
    cohort = config.cohort_size(num_clients)
    if cohort < config.min_replies:
        raise ConfigError(
            f"--min-replies is {config.min_replies} and a round asks {cohort} of {num_clients} clients; "
            "lower it, or raise --fraction-train or --num-clients"
        )
    if cohort < config.min_cohort:
        raise ConfigError(
            f"--secure-sums is {config.secure_sums} and a round asks {cohort} of {num_clients} clients, and a sum hides nobody "
            f"among fewer than {config.min_cohort}; raise --fraction-train or --num-clients"
        )


def _why(config: RunConfig, chosen: int, evaluation: EncodedData) -> str:
    """Why these are fewer than could be evaluated on."""
    if chosen == len(evaluation.examples):
        return ""
    if config.eval_limit is not None:
        return ", a seeded draw"
    return ", a seeded draw, so that it costs at most a tenth of the training; --eval-limit all takes all"


def sample(num_examples: int, limit: int | Literal["all"] | None, seed: int, purpose: str = "evaluation sample") -> list[int]:
    """Positions of examples in their order: of all, or of a seeded draw of `limit`."""
    if limit is None or limit == "all" or limit >= num_examples:
        return list(range(num_examples))
    chosen: list[int] = generator(seed, purpose).choice(num_examples, limit, replace=False).tolist()
    return sorted(chosen)


def _by_category(examples: Sequence[Example], category: str, source: str) -> tuple[list[Example], list[Example]]:
    held_out = [example for example in examples if example.category == category]
    train = [example for example in examples if example.category != category]
    if not held_out or not train:
        known = ", ".join(sorted({example.category for example in examples})[:20])
        raise DataError(
            f"--held-out-category is {category!r}; expected one of several categories of {source}, which has: {known}"
        )
    return train, held_out


def deal(examples: Sequence[Example], config: SimulationConfig) -> dict[str, list[int]]:
    """Which records each client holds, as positions, by the client's name.

    Raises:
        DataError: the records cannot be dealt out as asked.
    """
    if config.partition == "client":
        held: dict[str, list[int]] = {}
        for i, example in enumerate(examples):
            if not example.client:
                raise DataError(
                    f"{example.where or config.data}: a record has no field 'client'; --partition client needs it in every "
                    "record, so say with --columns client=COLUMN which column tells who holds a record"
                )
            held.setdefault(example.client, []).append(i)
        try:
            for name in held:
                check_name(name)
        except ProtocolError as error:
            raise DataError(f"{config.data}: {error} in every record's field 'client'") from None
        return held
    draw = generator(config.seed, "partition")
    if config.partition == "iid":
        parts = iid(len(examples), config.num_clients, draw)
    else:
        categories = [example.category for example in examples]
        parts = dirichlet(categories, config.num_clients, config.alpha, draw, config.min_partition_size)
    return dict(zip(client_names(config.num_clients), (part.tolist() for part in parts), strict=True))


def describe(what: str, encoded: EncodedData, context: int | None = None) -> str:
    """One line about how many records are used, and what was lost of the others: a warning if that is much.

    Args:
        what: what they are called.
        encoded: the records.
        context: how many tokens of a record the model takes, if that is known.
    """
    lost = f" ({why_dropped(encoded.dropped)})" if encoded.dropped else ""
    line = (
        f"{what} records: {len(encoded.examples):,} used, {encoded.num_dropped:,} dropped{lost}, "
        f"{encoded.num_truncated:,} cut ({encoded.num_tokens_cut:,} tokens)"
    )
    if encoded.num_prompts_cut:
        line = f"{line}, {encoded.num_prompts_cut:,} prompts cut"
    if encoded.share_harmed <= TOLERATED:
        return line
    harm, whole = ("dropped or lose part of their prompt", " whole") if encoded.num_prompts_cut else ("dropped", "")
    line, needed = f"{WARNING}{line}; {100 * encoded.share_harmed:.0f} % are {harm}", encoded.length_keeping(1 - TOLERATED)
    length = needed if context is None or needed is None else min(needed, context)
    if length is None or not _too_long(encoded, length):
        return line
    if length == needed:
        return f"{line}: --max-length {length} would keep {100 * (1 - TOLERATED):.0f} %{whole}"
    share = sum(need <= length for need in encoded.needed) / len(encoded.needed)
    return f"{line}: --max-length {length}, the most that the model takes, would keep {100 * share:.0f} %{whole}"


def _too_long(encoded: EncodedData, length: int) -> bool:
    """Whether a larger length would keep more, or more whole prompts."""
    return sum(need <= length for need in encoded.needed) > len(encoded.examples) - encoded.num_prompts_cut
