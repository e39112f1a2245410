"""Answers, and how they score: what a client measures where a run is tuned on scores in place of the loss."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.data import EncodedExample, Example
from fedkseed.evaluation import Decoder, Score, scored
from fedkseed.models.identity import BaseIdentity
from fedkseed.randomness import derive
from fedkseed.runs.task import Stopwatch, TextTask

if TYPE_CHECKING:
    from fedkseed.runs.learner import Learner

log = logging.getLogger("fedkseed")


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
    ) -> NDArray[np.float64]:
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
