"""Pairs of responses, and by how much a model prefers the better one to what the base model did; see `Preferences`."""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.data import EncodedExample, Example, collate, encode, why_dropped
from fedkseed.data.cache import cache_folder
from fedkseed.errors import DataError
from fedkseed.evaluation import response_log_probs
from fedkseed.files import write_atomically
from fedkseed.models.identity import BaseIdentity
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
