"""What a client measures where a run is tuned on something else than the loss: scores of answers, or preferences.

A `Goal` is found once, where the records are; it makes the tasks that clients train on and that evaluations watch.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.data import EncodedExample, Example, collate, encode, why_dropped
from fedkseed.data.cache import cache_folder
from fedkseed.errors import DataError
from fedkseed.evaluation import Decoder, Score, check_score, find_score, response_log_probs, scored
from fedkseed.files import write_atomically
from fedkseed.models.identity import BaseIdentity
from fedkseed.randomness import derive
from fedkseed.runs.settings import RunConfig
from fedkseed.runs.task import Stopwatch, TextTask

if TYPE_CHECKING:
    from fedkseed.runs.learner import Learner

log = logging.getLogger("fedkseed")
F64 = NDArray[np.float64]
BATCH = 16
"""Records that are answered or compared at once when all of a set are; a step's batch is answered at once whatever its size."""
TIE = 1e-4
"""Nats: two computations of one margin may differ so much."""


@dataclass(frozen=True)
class Answers:
    """How a run's answers are made and scored.

    Attributes:
        name: of the objective.
        score: the function.
        learner: model and tokenizer.
        stop_ids: what ends an answer.
        max_new_tokens: longest answer.
        temperature: 0 answers greedily; of training's answers only.
        batch_size: records that are answered at once.
    """

    name: str
    score: Score = field(repr=False)
    learner: Learner = field(repr=False)
    stop_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    batch_size: int

    def task(
        self,
        model: torch.nn.Module,
        examples: Sequence[EncodedExample],
        records: Sequence[Example],
        watch: Stopwatch,
        base: BaseIdentity,
    ) -> AnswerTask:
        """A client's task, or the held-out records'; whatever the weights are."""
        decoder = Decoder(model, self.learner.tokenizer, self.stop_ids, self.learner.traits.context)
        return AnswerTask(self, model, examples, records, decoder, watch)


class AnswerTask(TextTask):
    """A client's records, and how a model's answers to them score; its loss is minus the mean score."""

    def __init__(
        self,
        goal: Answers,
        model: torch.nn.Module,
        examples: Sequence[EncodedExample],
        records: Sequence[Example],
        decoder: Decoder,
        watch: Stopwatch,
    ) -> None:
        super().__init__(model, examples, goal.learner.pad_id, watch)
        self._goal, self._records, self._decoder = goal, records, decoder
        self._said = False

    def loss(self, records: NDArray[np.int64]) -> float:
        """Minus the mean score of greedy answers."""
        return -float(self._scores(records, 0.0, 0).mean())

    def drawn_loss(self, records: NDArray[np.int64], key: int) -> float:
        """Minus the mean score, under the draws of a key; NaN if an answer has none."""
        return -float(self._scores(records, self._goal.temperature, key).mean())

    def reward(self, on_progress: Callable[[int, int], None] | None = None) -> float:
        """See `ScoredTask`."""
        scores = self._scores(np.arange(self.num_examples), 0.0, 0, on_progress)
        found = scores[np.isfinite(scores)]
        return float(found.mean()) if found.size else math.nan

    def subset(self, places: Sequence[int]) -> Self:
        """The same with some of the records."""
        examples, records = [self._examples[i] for i in places], [self._records[i] for i in places]
        return type(self)(self._goal, self._model, examples, records, self._decoder, self._watch)

    def _scores(
        self,
        places: NDArray[np.int64],
        temperature: float,
        key: int,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> F64:
        goal, prompts = self._goal, [self._examples[i].input_ids[: self._examples[i].prompt_length] for i in places]
        keys = [derive(key, place) for place in range(len(prompts))] if temperature else ()
        with self._watch("forward"):
            texts = self._decoder.answers(prompts, goal.batch_size, goal.max_new_tokens, on_progress, temperature, keys)
        return np.array([self._score(self._records[i], text) for i, text in zip(places, texts, strict=True)])

    def _score(self, record: Example, answer: str) -> float:
        value, reason = scored(self._goal.score, record, answer)
        if reason and not self._said:
            self._said = True  # once is enough
            log.warning("%s: the function %s; in training the step is dropped", self._goal.name, reason)
        return value


@dataclass(frozen=True)
class Preferences:
    """How two responses of a record are compared: by what a model has come to think of them since it was the base.

    A pair's margin is `log p(better) - log p(worse)`, less the same under the base model; dpo's loss is
    `-log sigmoid(beta margin)` (Rafailov et al., *Direct Preference Optimization*, 2023), dpo-sign's score the margin's sign.

    Attributes:
        config: the settings, with the length that the model takes.
        learner: model and tokenizer.
    """

    config: RunConfig
    learner: Learner = field(repr=False)

    def task(
        self,
        model: torch.nn.Module,
        examples: Sequence[EncodedExample],
        records: Sequence[Example],
        watch: Stopwatch,
        base: BaseIdentity,
    ) -> PairTask:
        """A client's task, or the held-out records'; `model` is at the weights of `base`.

        Raises:
            DataError: a record has no worse response, or one with no token within max_length.
        """
        lacking = next((record for record in records if not record.rejected.strip()), None)
        if lacking is not None:
            raise DataError(
                f"{lacking.where or 'a record'}: no worse response, which --objective {self.config.objective} compares with; "
                "give each record a field 'rejected' (or say with --columns what it is called)"
            )
        config, learner = self.config, self.learner
        worse = encode(
            [replace(record, output=record.rejected) for record in records],
            learner.tokenizer,
            learner.max_length(config.max_length),
            config.prompts(),
            long_prompts=config.long_prompts,
        )
        if worse.num_dropped:
            raise DataError(
                f"the worse response of {worse.num_dropped} records cannot be encoded ({why_dropped(worse.dropped)}); raise "
                "--max-length, or leave these records out"
            )
        task = PairTask(self, model, examples, worse.examples, np.zeros(len(examples)), watch)
        known = kept_margins(base, [*examples, *worse.examples], len(examples), task.all_margins)
        return PairTask(self, model, examples, worse.examples, known, watch)


class PairTask(TextTask):
    """A client's pairs, and by how much a model finds the better one better than the base model did."""

    def __init__(
        self,
        goal: Preferences,
        model: torch.nn.Module,
        examples: Sequence[EncodedExample],
        worse: Sequence[EncodedExample],
        reference: F64,
        watch: Stopwatch,
    ) -> None:
        super().__init__(model, examples, goal.learner.pad_id, watch)
        self._goal, self._worse, self._reference = goal, worse, reference

    def reward(self, on_progress: Callable[[int, int], None] | None = None) -> float:
        """The share of pairs whose margin is above 0, those at 0 counting half, as all do of the base model."""
        margins = self.all_margins(on_progress)
        return float(np.where(np.abs(margins) <= TIE, 0.5, margins > 0).mean())

    def all_margins(self, on_progress: Callable[[int, int], None] | None = None) -> F64:
        """The margin of every pair, float64[n]."""
        margins = np.empty(self.num_examples)
        with self._watch("forward"), torch.inference_mode():
            for first in range(0, self.num_examples, BATCH):
                places = np.arange(first, min(first + BATCH, self.num_examples))
                margins[places] = self._margins(places).double().cpu().numpy()
                if on_progress is not None:
                    on_progress(int(places[-1]) + 1, self.num_examples)
        return margins

    def subset(self, places: Sequence[int]) -> Self:
        """The same with some of the pairs."""
        examples, worse = [self._examples[i] for i in places], [self._worse[i] for i in places]
        return type(self)(self._goal, self._model, examples, worse, self._reference[list(places)], self._watch)

    def _loss(self, records: NDArray[np.int64]) -> torch.Tensor:
        margins, config = self._margins(records), self._goal.config
        if not config.goal.smooth:
            return -margins.sign().mean()
        return -torch.nn.functional.logsigmoid(config.dpo_beta * margins).mean()

    def _margins(self, records: NDArray[np.int64]) -> torch.Tensor:
        both = [*(self._examples[i] for i in records), *(self._worse[i] for i in records)]
        better, worse = response_log_probs(self._model, collate(both, self._pad_id, self._device)).chunk(2)
        return better - worse - torch.from_numpy(self._reference[records]).to(better)


def kept_margins(base: BaseIdentity, examples: Sequence[EncodedExample], number: int, measure: Callable[[], F64]) -> F64:
    """What the base model thinks of pairs, from the disk where it is there: a node's process lives for one message.

    Args:
        base: of the model.
        examples: all that it depends on.
        number: how many pairs there are.
        measure: gives it, float64[number].
    """
    digest = hashlib.sha256(bytes.fromhex(base.fingerprint))
    for example in examples:
        digest.update(np.array([example.prompt_length, *example.input_ids], "<i4").tobytes() + b"|")
    path = cache_folder() / f"base-{digest.hexdigest()}.npy"
    try:
        with path.open("rb") as file:
            kept: F64 = np.load(file, allow_pickle=False)
        if kept.shape == (number,) and kept.dtype == np.float64 and np.isfinite(kept).all():
            return kept
    except (OSError, ValueError, EOFError):  # not there, or damaged: measured, and written anew
        pass
    margins = measure()
    content = io.BytesIO()
    np.save(content, margins)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, content.getvalue(), private=True)
    except OSError as error:
        log.warning("%s: what the base model thinks of pairs cannot be kept (%s)", path.parent, error.strerror)
    return margins


Goal = Answers | Preferences


def goal_of(
    config: RunConfig,
    learner: Learner,
    stop_ids: tuple[int, ...],
    examples: Sequence[EncodedExample],
    records: Sequence[Example],
    score: Score | None = None,
    where: str = "--objective",
) -> Goal | None:
    """What a run's settings tune on; None if that is the loss.

    Args:
        config: the settings.
        learner: model and tokenizer.
        stop_ids: what ends a response.
        examples: all records, to look at before the run.
        records: what they were encoded from.
        score: a function in place of the named one.
        where: what messages call the setting.

    Raises:
        ConfigError: there is no such function.
        DataError: it has no number for a record's own response, or the model's context has no room for an answer to the longest
            prompt.
    """
    if config.goal.pairs:
        return Preferences(config, learner)
    if not config.goal.answers:
        return None
    found = score or find_score(config.objective, where)
    check_score(found, records[0], config.objective)
    longest, context = max(example.prompt_length for example in examples), learner.traits.context or math.inf
    if longest + config.max_new_tokens > context:
        raise DataError(
            f"--max-new-tokens is {config.max_new_tokens} and the longest prompt has {longest} tokens; {learner.source} takes "
            f"{context}, so lower it or --max-length, which cuts prompts"
        )
    at_once = max(BATCH, config.batch_size)
    return Answers(config.objective, found, learner, stop_ids, config.max_new_tokens, config.temperature, at_once)
