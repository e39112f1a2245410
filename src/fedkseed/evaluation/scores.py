"""All scores of a model on some records: in all, and by category."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedkseed.data import EncodedExample, Example
from fedkseed.evaluation.generation import exact_match, generate
from fedkseed.evaluation.loss import EvalLoss, evaluate_loss
from fedkseed.evaluation.rouge import rouge_l, rouge_l_published

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 8
MAX_NEW_TOKENS = 128
Heard = Callable[[str, int, int], None]
"""Hears an activity, how many records are done and how many there are."""


@dataclass(frozen=True, slots=True)
class Scores:
    """What a model makes of a set of records.

    Attributes:
        loss: nats per response token, every token weighing the same.
        perplexity: exp(loss).
        num_examples: records that the loss is over.
        num_tokens: their response tokens.
        num_answers: records that were answered; the scores below are means over these, NaN for none.
        exact_match: share of answers that are the reference.
        rouge_l: as `rouge-score` computes it.
        rouge_l_published: as the published code computes it.
    """

    loss: float
    perplexity: float
    num_examples: int
    num_tokens: int
    num_answers: int
    exact_match: float
    rouge_l: float
    rouge_l_published: float


@dataclass(frozen=True, slots=True)
class AllScores:
    """The scores of a set, those of each category in it (none where there is but one), and answers by position."""

    overall: Scores
    categories: dict[str, Scores]
    answers: dict[int, str] = field(default_factory=dict)


def score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
    records: Sequence[Example],
    pad_id: int | None,
    answered: Sequence[int] = (),
    heard: Heard | None = None,
    stop_ids: Sequence[int] = (),
    context: int | None = None,
) -> AllScores:
    """Loss over all examples, and answers to some of them.

    Args:
        model: a Hugging Face causal LM in eval mode.
        tokenizer: its tokenizer.
        examples: at least one.
        records: what they were encoded from, with references and categories.
        pad_id: see `collate`.
        answered: positions of the examples that are answered greedily, by at most 128 tokens.
        heard: hears how far it is.
        stop_ids, context: see `generate`.

    Raises:
        DataError: no examples, or one that is to be answered has no prompt.
    """
    told = heard or (lambda activity, done, total: None)
    done = 0

    def measure(places: Sequence[int]) -> EvalLoss:
        nonlocal done
        chosen = [examples[i] for i in places]
        loss = evaluate_loss(model, chosen, BATCH, pad_id, lambda part, _: told("evaluating", done + part, len(examples)))
        done += len(chosen)
        return loss

    groups = _groups(records)
    losses = {name: measure(places) for name, places in groups.items()}
    texts = generate(
        model,
        tokenizer,
        [examples[i] for i in answered],
        max_new_tokens=MAX_NEW_TOKENS,
        on_progress=lambda part, total: told("answering", part, total),
        stop_ids=stop_ids,
        context=context,
    )
    answers = dict(zip(answered, texts, strict=True))
    scores = {name: _scores(losses[name], places, answers, records) for name, places in groups.items()}
    overall = _scores(_sum(list(losses.values())), range(len(records)), answers, records)
    return AllScores(overall, scores if len(scores) > 1 else {}, answers)


def _groups(records: Sequence[Example]) -> dict[str, list[int]]:
    """The positions of each category's records, by name."""
    groups: dict[str, list[int]] = {name: [] for name in sorted({record.category for record in records})}
    for i, record in enumerate(records):
        groups[record.category].append(i)
    return groups or {"": []}


def _sum(losses: Sequence[EvalLoss]) -> EvalLoss:
    """The loss over several sets together."""
    num_tokens = sum(loss.num_tokens for loss in losses)
    mean = math.fsum(loss.loss * loss.num_tokens for loss in losses) / num_tokens
    return EvalLoss.of(mean, sum(loss.num_examples for loss in losses), num_tokens)


def _scores(loss: EvalLoss, places: Sequence[int], answers: dict[int, str], records: Sequence[Example]) -> Scores:
    pairs = [(answers[i], records[i].output) for i in places if i in answers]
    texts, references = [answer for answer, _ in pairs], [reference for _, reference in pairs]
    return Scores(
        loss=loss.loss,
        perplexity=loss.perplexity,
        num_examples=loss.num_examples,
        num_tokens=loss.num_tokens,
        num_answers=len(pairs),
        exact_match=exact_match(texts, references),
        rouge_l=_mean([rouge_l(*pair) for pair in pairs]),
        rouge_l_published=_mean([rouge_l_published(*pair) for pair in pairs]),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
