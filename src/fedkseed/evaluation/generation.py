"""What a model answers: batched generation from prompts, greedy or drawn, and how often the answer is the expected one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedkseed.data import EncodedExample, pad_token_id
from fedkseed.errors import DataError
from fedkseed.models.probing import TOKENS, context_of, masks_padding, num_rows
from fedkseed.randomness import generator

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

NOTHING_ASKED = (
    "a record has no prompt, not even a token that a text begins with, so there is nothing to answer; give records with "
    "instructions, or ask for no answers"
)
"""Of texts that are learnt whole."""


class Decoder:
    """A model that answers: each answer ends at a stop, after so many tokens or where the model's context does.

    A stop is the tokenizer's EOS, any of those that the model's files name, and any of `stop_ids`. Nothing else that a
    generation_config.json says counts. Prompts of similar length share a batch, padded on the left, with a key-value cache;
    of a model that padding changes, which is asked once, only prompts of one length do. Behind a soft prompt each is alone.

    Args:
        model: a Hugging Face causal LM in eval mode, whose weights may change between calls.
        tokenizer: its tokenizer.
        stop_ids: what ends a response in training; see `EncodedData`.
        context: how many tokens the model takes; None for what its configuration says.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int] = (), context: int | None = None
    ) -> None:
        from transformers import GenerationConfig

        self._model, self._tokenizer = model, tokenizer
        self._pad, self._stops = pad_token_id(tokenizer, num_rows(model)), _stops(model, tokenizer, stop_ids)
        self._soft_prompt = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
        self._room = (context or context_of(model.config) or math.inf) - self._soft_prompt
        self._pads: bool | None = None
        plain: Any = GenerationConfig  # untyped there
        self._plain = plain(do_sample=False, pad_token_id=self._pad, eos_token_id=sorted(self._stops) or None)

    def answers(
        self,
        prompts: Sequence[NDArray[np.int32]],
        batch_size: int = 16,
        max_new_tokens: int = 128,
        on_progress: Callable[[int, int], None] | None = None,
        temperature: float = 0.0,
        keys: Sequence[int] = (),
    ) -> list[str]:
        """Answers to prompts, in their order.

        Args:
            prompts: token ids, int32[n].
            batch_size: prompts in one batch.
            max_new_tokens: longest answer.
            on_progress: hears how many of the answers are done.
            temperature: 0 takes the likeliest token each time; else one is drawn, from the logits over it.
            keys: what each prompt's draws are a function of, with its place in the answer, and nothing else: the same keys
                under other weights are the same draws (the Gumbel-max way, Maddison et al., 2014, with common random numbers).

        Raises:
            DataError: a prompt has no tokens.
        """
        from transformers import LogitsProcessorList

        if not all(map(len, prompts)):
            raise DataError(NOTHING_ASKED)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        answers = [""] * len(prompts)
        if self._soft_prompt:  # peft counts positions through the padding between its prompt and the text's; so there is none
            batch_size = 1
        done = 0
        with _configured(self._model, self._plain), torch.inference_mode():
            lengths = [len(prompts[i]) for i in order]
            mixed = batch_size > 1 and len(set(lengths)) > 1
            if mixed and self._pads is None:
                self._pads = _masks_padding(self._model, prompts[order[0]])
            for chosen in _batches(order, lengths, batch_size, mixed and not self._pads):
                ids, mask = _padded([prompts[i] for i in chosen], self._pad, next(self._model.parameters()).device)
                width = ids.shape[1]
                longest = int(max(1, min(max_new_tokens, self._room - width)))
                drawn = LogitsProcessorList([Draws(temperature, [keys[i] for i in chosen])] if temperature else [])
                output = self._model.generate(
                    input_ids=ids, attention_mask=mask, max_new_tokens=longest, logits_processor=drawn
                )
                for i, row in zip(chosen, output[:, width:].tolist(), strict=True):
                    end = next((place for place, token in enumerate(row) if token in self._stops), len(row))
                    answers[i] = str(self._tokenizer.decode(row[:end], skip_special_tokens=True))
                done += len(chosen)
                if on_progress is not None:
                    on_progress(done, len(order))
        return answers


class Draws:
    """Logits whose largest is a draw: over the temperature, plus Gumbel noise of each row's own generator."""

    def __init__(self, temperature: float, keys: Sequence[int]) -> None:
        self._temperature, self._draws = temperature, [generator(key, "tokens") for key in keys]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits [b, vocabulary] of the next token of each row; called once a token."""
        noise = np.stack([draw.gumbel(size=scores.shape[1]) for draw in self._draws])
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        return wide / self._temperature + torch.from_numpy(noise).to(wide)


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
    batch_size: int = 16,
    max_new_tokens: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
    stop_ids: Sequence[int] = (),
    context: int | None = None,
) -> list[str]:
    """Greedy answers to the prompts of examples, in their order; see `Decoder`."""
    prompts = [example.input_ids[: example.prompt_length] for example in examples]
    return Decoder(model, tokenizer, stop_ids, context).answers(prompts, batch_size, max_new_tokens, on_progress)


def end_ids(model: Any) -> set[int]:
    """The tokens that end a text by the model's configuration and its generation's, of which there may be none."""
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    named = [getattr(part, "eos_token_id", None) for part in (model.config, text, getattr(model, "generation_config", None))]
    lists = [ids if isinstance(ids, (list, tuple)) else [ids] for ids in named]
    return {int(i) for ids in lists for i in ids if i is not None}


def _stops(model: Any, tokenizer: PreTrainedTokenizerBase, more: Sequence[int]) -> set[int]:
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return end_ids(model) | {int(i) for i in (*own, *more)}


@contextmanager
def _configured(model: Any, plain: GenerationConfig) -> Iterator[None]:
    """The model's own wishes for generation (penalties, beams, sampling, lengths) aside; they are put back."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    inner.generation_config = plain
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
            yield
    finally:
        inner.generation_config = own


def _masks_padding(model: Any, prompt: Any) -> bool:
    def following(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        how: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
        return torch.cat(model.generate(input_ids=ids, attention_mask=mask, **how).logits, dim=-1)

    return masks_padding(model, [int(i) for i in prompt[: 2 * TOKENS]], following)


def _batches(order: Sequence[int], lengths: Sequence[int], batch_size: int, by_length: bool) -> Iterator[list[int]]:
    """Neighbours in the order; of one length, if so asked."""
    batch: list[int] = []
    for place, i in enumerate(order):
        if batch and (len(batch) == batch_size or (by_length and lengths[place] != lengths[place - 1])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _padded(prompts: Sequence[Any], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, and the mask, int64[b, t]."""
    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Fraction of answers that are the reference, white space at the ends aside; NaN for none."""
    pairs = list(zip(answers, references, strict=True))
    return sum(a.strip() == b.strip() for a, b in pairs) / len(pairs) if pairs else float("nan")
