"""A whole federation in one process: the clients share one model in memory, every message passes through its bytes."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.binding import Binding, bind
from fedkseed.codec import check_name
from fedkseed.data import (
    COLUMNS,
    EncodedData,
    EncodedExample,
    Example,
    collate,
    dirichlet,
    encode,
    get_template,
    iid,
    is_natural_instructions,
    pad_token_id,
    parse_columns,
    read_examples,
    read_tasks,
    split_off,
)
from fedkseed.errors import ConfigError, DataError, LedgerError, ProtocolError, RunError
from fedkseed.evaluation import evaluate_loss, mean_loss
from fedkseed.events import evaluation_event, round_event
from fedkseed.federation import Client, Server, seed_pool, start
from fedkseed.ledger import Ledger
from fedkseed.messages import TrainRequest
from fedkseed.models import base_path, context_length, load_model, load_tokenizer, require_device
from fedkseed.noise import get_backend
from fedkseed.randomness import generator
from fedkseed.run_folder import RunFolder
from fedkseed.simulation_config import SimulationConfig

EVAL_FRACTION = 0.05
EVAL_BATCH = 8
DIVERGED = 1.1
"""A held-out loss that is so many times the best one before it is called divergence."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A loss that a client has measured.

    Attributes:
        server_round: the round, from 1.
        client: its name.
        place: which of the round's cohort it is, from 1.
        cohort: how many they are.
        step: which of its steps this is, from 0.
        steps: how many it does in this round.
        loss: what it measured.
    """

    server_round: int
    client: str
    place: int
    cohort: int
    step: int
    steps: int
    loss: float


class Observer(Protocol):
    """Who watches a run: the live display, plain lines, or nobody."""

    def note(self, text: str) -> None:
        """One line about what is being done or was found."""
        ...

    def progress(self, activity: str, done: int, total: int) -> None:
        """So much of something that may take long, beside the training, is done."""
        ...

    def probe(self, probe: Probe) -> None:
        """A client has measured a loss."""
        ...

    def event(self, event: dict[str, Any]) -> None:
        """What was just added to `metrics.jsonl`."""
        ...


class Stopwatch:
    """Seconds by activity since it was last read."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, activity: str) -> Iterator[None]:
        """Count the time inside as that activity."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[activity] += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """The seconds so far, and start anew."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


class TimedModel:
    """A bound model whose sweeps are timed."""

    def __init__(self, bound: Binding, watch: Stopwatch) -> None:
        self.pool, self._bound, self._watch = bound.pool, bound, watch

    def rebuild(self, coefficients: NDArray[np.float32]) -> None:
        """See `Binding.rebuild`."""
        with self._watch("rebuild"):
            self._bound.rebuild(coefficients)

    def move(self, indices: Sequence[int], amounts: Sequence[float]) -> None:
        """See `Binding.move`."""
        with self._watch("noise"):
            self._bound.move(indices, amounts)


class TextTask:
    """A simulated client's records and their loss under the shared model; see `fedkseed.federation.Task`."""

    def __init__(self, model: torch.nn.Module, examples: Sequence[EncodedExample], pad_id: int, watch: Stopwatch) -> None:
        self._model, self._examples, self._pad_id, self._watch = model, examples, pad_id, watch
        self._device = next(model.parameters()).device

    @property
    def num_examples(self) -> int:
        """How many records the client holds."""
        return len(self._examples)

    def loss(self, records: NDArray[np.int64]) -> float:
        """Mean loss over the response tokens of some records."""
        with self._watch("forward"), torch.inference_mode():
            batch = collate([self._examples[i] for i in records], self._pad_id, self._device)
            return mean_loss(self._model, batch).item()


@dataclass(frozen=True)
class Records:
    """Tokenised data, dealt out.

    Attributes:
        clients: each client's examples, by its name.
        held_out: what is evaluated on.
        references: the records that these were encoded from.
        pad_id: what padding holds.
    """

    clients: dict[str, list[EncodedExample]]
    held_out: list[EncodedExample]
    references: list[Example]
    pad_id: int


def prepare(config: SimulationConfig, observer: Observer) -> Records:
    """Read, tokenise and deal out the data: everything that can go wrong before the model is loaded.

    Raises:
        InvalidValueError: torch cannot use the device here.
        BackendError: no noise backend works on the device.
        DataError: a file cannot be read or used, or cannot be dealt out as asked.
        ModelError: the tokenizer is missing or lacks what is needed.
    """
    require_device(config.device)
    get_backend("auto", torch.device(config.device).type)
    tokenizer = load_tokenizer(config.model)
    pad_id = pad_token_id(tokenizer)
    train, held_out = load_examples(config, observer)
    template = get_template(config.template)
    encoded = encode(train, tokenizer, config.max_length, template, partial(observer.progress, "tokenising training records"))
    evaluation = encode(
        held_out, tokenizer, config.max_length, template, partial(observer.progress, "tokenising held-out records")
    )
    observer.note(describe("training", encoded))
    observer.note(describe("held-out", evaluation))
    check_context(config.model, config.max_length, [*encoded.examples, *evaluation.examples])
    parts = deal([train[i] for i in encoded.kept], config)
    clients = {name: [encoded.examples[i] for i in part] for name, part in parts.items()}
    cohort = config.cohort_size(len(clients))
    if cohort < config.min_replies:
        raise ConfigError(
            f"--min-replies is {config.min_replies} and a round asks {cohort} of {len(clients)} clients; "
            "lower it, or raise --fraction-train or --num-clients"
        )
    chosen = sample(len(evaluation.examples), config.eval_limit, config.seed)
    references = [held_out[evaluation.kept[i]] for i in chosen]
    return Records(clients, [evaluation.examples[i] for i in chosen], references, pad_id)


class Simulation:
    """A federation that is ready to run: model loaded and bound, server where the run's ledger is.

    Args:
        run: the run's folder; its ledger, if there is one, is gone on from.
        records: the data.
        observer: who watches.

    Raises:
        FedKSeedError: the model or the ledger cannot be used.
    """

    def __init__(self, run: RunFolder, records: Records, observer: Observer) -> None:
        config = run.config
        self.run, self.config, self.observer = run, config, observer
        self._records, self._watch = records, Stopwatch()
        ledger = run.load_ledger()
        self.model = load_model(config.model, config.dtype, config.device)
        self.model.requires_grad_(True)
        # a GPU keeps its own copy of the base: the file would go through the bus at every rebuild
        base_file = base_path(config.model, self.model) if config.device == "cpu" else None
        self.bound = bind(self.model, seed_pool(config), base_file)
        base = self.bound.identity()
        if ledger is not None and (difference := ledger.base.difference(base, self.bound.names)):
            raise LedgerError(f"{run.ledger_path} is of another base model than {config.model}: {difference}")
        sizes = {name: len(examples) for name, examples in records.clients.items()}
        self.server = Server(config, ledger or start(config, base), list(sizes), num_examples=sizes)
        shared = TimedModel(self.bound, self._watch)
        self.clients = {
            name: Client(name, shared, base, TextTask(self.model, examples, records.pad_id, self._watch))
            for name, examples in records.clients.items()
        }
        d, dtype = sum(p.numel() for p in self.model.parameters()), str(self.model.dtype).removeprefix("torch.")
        observer.note(f"model: {config.model}, {d:,} parameters in {dtype}")

    def train(self) -> Ledger:
        """Do all rounds that are left; after each the ledger is on the disk.

        Raises:
            RunError: a round failed three times for want of replies, or a file cannot be written; the ledger is safe.
        """
        self.run.cut_metrics(self.server.ledger.round)
        evaluated = {event["server_round"] for event in self.run.metrics() if event["event"] == "evaluation"}
        if self._due(self.server.ledger.round) and self.server.ledger.round not in evaluated:
            self._evaluate()
        while not self.server.finished:
            self._round()
            if self._due(self.server.ledger.round):
                self._evaluate()
        return self.server.ledger

    def _round(self) -> None:
        status = "repeat"
        while status == "repeat":
            begin = time.perf_counter()
            requests = [(request, request.encode()) for request in self.server.plan()]
            replies = []
            for place, (request, data) in enumerate(requests, start=1):
                heard = self._hear(request, place, len(requests))
                replies.append((request.client, self.clients[request.client].answer(data, heard)))
            outcome = self.server.absorb(replies)
            status = outcome.status
            event = round_event(outcome, request.lr) | {
                "bytes_down": sum(len(data) for _, data in requests) / len(requests),
                "bytes_up": sum(len(data) for _, data in replies) / len(replies),
                "seconds": time.perf_counter() - begin,
                "seconds_by": self._watch.read(),
            }
            for refusal in outcome.refusals:
                self.observer.note(f"round {outcome.server_round}: reply of {refusal.client} refused: {refusal.reason}")
            if status == "closed":
                # metrics first: a kill in between leaves a line too many, which a resume cuts, never one too few
                self.run.append_metrics(event)
                self.server.ledger.save(self.run.ledger_path)
                self.observer.event(event)
        if status == "failed":
            raise RunError(
                f"round {outcome.server_round} ended three times with fewer than {self.config.min_replies} accepted replies; "
                f"the ledger of round {self.server.ledger.round} is safe in {self.run.path}: lower --min-replies, then --resume"
            )

    def _hear(self, request: TrainRequest, place: int, cohort: int) -> Callable[[int, float], None]:
        """Tells the observer of each loss that this client measures in this round."""

        def heard(step: int, loss: float) -> None:
            steps = len(request.indices)
            self.observer.probe(Probe(request.server_round, request.client, place, cohort, step, steps, loss))

        return heard

    def _due(self, server_round: int) -> bool:
        return server_round % self.config.eval_every == 0 or server_round == self.config.num_rounds

    def _evaluate(self) -> None:
        ledger = self.server.ledger
        begin = time.perf_counter()
        self.bound.rebuild(ledger.coefficients)
        heard = partial(self.observer.progress, f"evaluating after round {ledger.round}")
        result = evaluate_loss(self.model, self._records.held_out, EVAL_BATCH, self._records.pad_id, heard)
        self._warn(ledger.round, result.loss)
        weight_bytes = sum(p.nbytes for p in self.model.parameters())
        event = evaluation_event(ledger.round, result, weight_bytes, time.perf_counter() - begin)
        self._watch.read()  # the rebuild here is part of the evaluation's own seconds
        self.run.append_metrics(event)
        self.observer.event(event)

    def _warn(self, server_round: int, loss: float) -> None:
        """Say so when the run goes the wrong way."""
        best = min((e["eval_loss"] for e in self.run.metrics() if e["event"] == "evaluation"), default=loss)
        if math.isfinite(loss) and loss <= DIVERGED * best:
            return
        self.observer.note(
            f"round {server_round}: the held-out loss is {loss:.4f}, it was {best:.4f}: the run diverges. "
            f"Start anew with a lower --lr than {self.config.lr:g}, or with --lr auto; fedkseed tune explains it"
        )


def check_context(model: str, max_length: int, examples: Sequence[EncodedExample]) -> None:
    """Refuse records that are longer than what a model takes.

    Raises:
        ConfigError: one of them is; the message names --max-length, which cuts them.
    """
    longest, room = max(len(example.input_ids) for example in examples), context_length(model)
    if room is not None and longest > room:
        raise ConfigError(f"--max-length is {max_length} and a record has {longest} tokens; {model} takes {room}")


def client_names(num_clients: int) -> list[str]:
    """Stable names of simulated clients: client-000, client-001, ..."""
    width = len(str(num_clients - 1))
    return [f"client-{i:0{width}}" for i in range(num_clients)]


def load_examples(config: SimulationConfig, observer: Observer | None = None) -> tuple[list[Example], list[Example]]:
    """The clients' records and the held-out ones, before tokenising.

    Held out is `--eval-data`; else the category of `--held-out-category`; else the test tasks of a Natural Instructions
    folder; else a seeded share of the training records.

    Raises:
        DataError: a source cannot be read or used.
    """
    if config.data is None:
        raise DataError("--data is missing; give it on the command line or as data in the --config file")
    examples = read_source(config.data, "train", config.max_length, config.seed, config.columns, observer)
    if config.subsample < 1:
        size = max(1, int(config.subsample * len(examples)))
        chosen = generator(config.seed, "subsample").choice(len(examples), size, replace=False)
        examples = [examples[i] for i in sorted(chosen.tolist())]
    if config.eval_data is not None:
        return examples, read_source(config.eval_data, "test", config.max_length, config.seed, config.columns, observer)
    if config.held_out_category is not None:
        return _by_category(examples, config.held_out_category, config.data)
    if is_natural_instructions(Path(config.data)):
        return examples, read_source(config.data, "test", config.max_length, config.seed, None, observer)
    if len(examples) < 2:
        raise DataError(f"{config.data} has {len(examples)} record; expected enough to hold some out, or give --eval-data")
    kept, held_out = split_off(len(examples), EVAL_FRACTION, generator(config.seed, "evaluation split"))
    return [examples[i] for i in kept], [examples[i] for i in held_out]


def sample(num_examples: int, limit: int | None, seed: int, purpose: str = "evaluation sample") -> list[int]:
    """Positions of examples in their order: of all, or of a seeded draw of `limit`."""
    if limit is None or limit >= num_examples:
        return list(range(num_examples))
    chosen: list[int] = generator(seed, purpose).choice(num_examples, limit, replace=False).tolist()
    return sorted(chosen)


def read_source(
    source: str,
    split: Literal["train", "test"],
    max_length: int,
    seed: int,
    columns: str | None,
    observer: Observer | None = None,
) -> list[Example]:
    """The records that `--data` or `--eval-data` names.

    Args:
        source: a file, a Natural Instructions folder or a hub id.
        split: of Natural Instructions: which of the tasks.
        max_length: of Natural Instructions: inputs have fewer characters, as the published code has it.
        seed: of Natural Instructions: draws the instances.
        columns: see `parse_columns`; None for the usual names.
        observer: hears how far it is.

    Raises:
        DataError: the source cannot be read or used.
    """
    path = Path(source)
    if is_natural_instructions(path):
        heard = partial(observer.progress, f"reading {split} tasks") if observer else None
        return read_tasks(path, split, max_length, seed, heard)
    return read_examples(source, parse_columns(columns) if columns else COLUMNS)


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
                    f"{config.data}: a record has no field 'client'; --partition client needs it in every record, "
                    "so say with --columns client=COLUMN which column tells who holds a record"
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


def describe(what: str, encoded: EncodedData) -> str:
    """One line about how many records are used, and what was lost of the others."""
    return (
        f"{what} records: {len(encoded.examples):,} used, {encoded.num_dropped:,} dropped (no response token), "
        f"{encoded.num_truncated:,} cut ({encoded.num_tokens_cut:,} tokens)"
    )
