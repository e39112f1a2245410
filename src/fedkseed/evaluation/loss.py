"""Cross-entropy of responses: `-sum log p(token | all tokens before it)` over the tokens of response and EOS."""

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch

from fedkseed.data import IGNORED, Batch, EncodedExample, collate
from fedkseed.errors import DataError, InvalidValueError


@dataclass(frozen=True, slots=True)
class EvalLoss:
    """The loss over a whole set.

    Attributes:
        loss: nats per response token, every token of the set weighing the same; NaN if the model's is.
        perplexity: exp(loss).
        num_examples: how many.
        num_tokens: response tokens, EOS included.
        reward: mean score of the set, where a run is tuned on scores.
    """

    loss: float
    perplexity: float
    num_examples: int
    num_tokens: int
    reward: float | None = None

    @classmethod
    def of(cls, loss: float, num_examples: int, num_tokens: int) -> Self:
        """With the perplexity that belongs to the loss."""
        return cls(loss, _exp(loss), num_examples, num_tokens)


def guess_loss(model: torch.nn.Module) -> float:
    """The loss of a guess among all tokens, nats a token: what the loss that a client tells is measured by.

    Args:
        model: a Hugging Face causal LM.
    """
    return math.log(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]


def response_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
    """The summed loss of a batch's response tokens, and how many they are.

    Logits are made, where the model's `logits_to_keep` allows, only for positions that predict a response token (on
    SmolLM2-135M with 64 of 128 tokens that saves 6 to 18 % of the pass), and widened only there.

    Args:
        model: a Hugging Face causal LM, in the mode that the caller wants.
        batch: see `Batch`; on the model's device.

    Returns:
        0-dim tensor of the sum in nats, float32 (float64 for a float64 model); the number of tokens.
    """
    parts = [_response_loss(model, part) for _, part in batch.passes()]
    (total, num_tokens), others = parts[0], parts[1:]
    return sum((loss for loss, _ in others), total), sum((number for _, number in others), num_tokens)


def response_log_probs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The log-probability of each response of a batch, its tokens' sum, EOS included; as `response_loss` sees it.

    Returns:
        tensor[b], in nats.
    """
    places, parts = zip(*((rows, _response_log_probs(model, part)) for rows, part in batch.passes()), strict=True)
    return torch.cat(parts)[np.concatenate(places).argsort()]


def _response_log_probs(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    logits, targets, rows = _scored_logits(model, batch)
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return -torch.zeros(len(batch.labels), dtype=each.dtype, device=each.device).index_add(0, rows, each)


def _response_loss(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, int]:
    logits, targets, _ = _scored_logits(model, batch)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum"), len(logits)


def _scored_logits(model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The logits that predict response tokens [n, vocabulary], these tokens int64[n], and the example of each, int64[n]."""
    targets = batch.labels[:, 1:]
    scored = targets != IGNORED
    keep = scored.any(0).nonzero()[:, 0]
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(**inputs, logits_to_keep=keep).logits
    else:
        logits = model(**inputs).logits[:, -batch.input_ids.shape[1] :][:, keep]  # a soft prompt has logits too, in front
    logits = logits[scored[:, keep]]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide, targets[scored], scored.nonzero()[:, 0]


def mean_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The loss per response token of a batch, every token weighing the same: `response_loss`'s sum / number, 0-dim.

    This is what a training step compares at `w + eps z` and `w - eps z`.
    """
    total, num_tokens = response_loss(model, batch)
    return total / num_tokens


def evaluate_loss(
    model: torch.nn.Module,
    examples: Sequence[EncodedExample],
    batch_size: int,
    pad_id: int | None,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvalLoss:
    """The loss over a set, in inference mode; the model's train/eval modes are as before afterwards.

    Examples are batched by length, longest first, so that there is little padding and want of memory shows at once. The
    order of the examples matters only to rounding.

    Args:
        model: a Hugging Face causal LM.
        examples: at least one.
        batch_size: examples in one forward pass, at least 1.
        pad_id: see `collate`.
        on_progress: hears how many of the examples are done.

    Raises:
        DataError: no examples.
        InvalidValueError: batch_size below 1.
    """
    if not examples:
        raise DataError("no examples to evaluate on; give evaluation data with at least one record that fits max_length")
    if batch_size < 1:
        raise InvalidValueError(f"the evaluation's batch_size is {batch_size}; expected at least 1")
    device = next(model.parameters()).device
    ordered = sorted(examples, key=lambda example: -len(example.input_ids))
    total, num_tokens = 0.0, 0
    with _evaluating(model), torch.inference_mode():
        for first in range(0, len(ordered), batch_size):
            batch_total, batch_tokens = response_loss(model, collate(ordered[first : first + batch_size], pad_id, device))
            total += batch_total.item()
            num_tokens += batch_tokens
            if on_progress is not None:
                on_progress(min(first + batch_size, len(ordered)), len(ordered))
    return EvalLoss.of(total / num_tokens, len(ordered), num_tokens)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in eval mode, and each back in its own afterwards (a frozen part may differ from the rest)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
