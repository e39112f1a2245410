"""Examples as token ids, with an exact boundary between prompt and response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedkseed.data.cache import TokenIds, cache_path, load, save
from fedkseed.data.example import Example
from fedkseed.data.template import Template, plain
from fedkseed.errors import DataError, InvalidValueError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024
"""Examples in one call of the tokenizer, which spreads a call over threads."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedExample:
    """One tokenised example: the prompt, then what the model is to learn.

    Attributes:
        input_ids: int32[n], n <= max_length: prompt (BOS included), response, and EOS unless truncation took it.
        prompt_length: how many leading ids belong to the prompt.
    """

    input_ids: NDArray[np.int32]
    prompt_length: int

    @property
    def num_targets(self) -> int:
        """How many ids are predicted from at least one before them and count in the loss; at least 1."""
        return len(self.input_ids) - max(self.prompt_length, 1)


@dataclass(frozen=True, slots=True, eq=False)
class EncodedData:
    """Tokenised examples and what encoding cost them.

    Attributes:
        examples: those with something to learn, in the order they came in.
        kept: int64[len(examples)]: their positions among the examples given (to look up a category, say).
        num_dropped: examples left out: an empty response, or a prompt that fills max_length.
        num_truncated: kept examples that lost tokens (EOS counts).
        num_tokens_cut: the tokens those lost.
    """

    examples: tuple[EncodedExample, ...]
    kept: NDArray[np.int64]
    num_dropped: int
    num_truncated: int
    num_tokens_cut: int


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: Template = plain,
    on_progress: Callable[[int, int], None] | None = None,
) -> EncodedData:
    """Tokenise examples: `[BOS] prompt | response EOS`, cut on the right to max_length tokens.

    Prompt and response are tokenised apart and joined, so that no token spans the boundary and generation, which starts
    from the prompt's ids alone, sees what training saw. The prompt gets the leading special tokens (BOS) that the
    tokenizer gives any text, unless the template wrote them already. A blank response is not learnt: the record is dropped.
    Token ids of many examples are kept on the disk (see `fedkseed.data.cache`).

    Args:
        examples: any number.
        tokenizer: a Hugging Face tokenizer.
        max_length: in tokens, at least 2.
        template: see `fedkseed.data.template`.
        on_progress: hears how many of the examples are tokenised.

    Raises:
        InvalidValueError: max_length below 2.
        ModelError: the tokenizer has no EOS token, or not what the template needs.
        DataError: there are examples, but all of them would be dropped.
    """
    if max_length < 2:
        raise InvalidValueError(f"max_length is {max_length}; expected at least 2 tokens, one of the prompt and one to learn")
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            f"the tokenizer of {tokenizer.name_or_path} has no EOS token, so a response would have no end; "
            "set eos_token in its tokenizer_config.json"
        )
    texts = [template(example, tokenizer) for example in examples]
    prompts, responses = _all_token_ids(texts, tokenizer, on_progress)
    start = _leading_specials(tokenizer)
    encoded: list[EncodedExample] = []
    kept: list[int] = []
    num_truncated = num_tokens_cut = 0
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if prompt[: len(start)] != start:
            prompt = start + prompt
        num_cut = max(0, len(prompt) + len(response) + 1 - max_length)
        item = EncodedExample(np.array([*prompt, *response, eos][:max_length], np.int32), len(prompt))
        if not response or not texts[i][1].strip() or item.num_targets < 1:
            continue
        encoded.append(item)
        kept.append(i)
        num_truncated += num_cut > 0
        num_tokens_cut += num_cut
    if examples and not encoded:
        raise DataError(
            f"none of {len(examples)} records has a response token within max_length {max_length}; "
            "raise max_length or give records with shorter prompts and non-empty responses"
        )
    return EncodedData(tuple(encoded), np.array(kept, np.int64), len(examples) - len(encoded), num_truncated, num_tokens_cut)


def _all_token_ids(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, on_progress: Callable[[int, int], None] | None
) -> tuple[TokenIds, TokenIds]:
    """The ids of prompts and of responses, from the disk where they are there."""
    path = cache_path(texts, tokenizer)
    if path is not None and (kept := load(path, len(texts))) is not None:
        return kept
    prompts: TokenIds = []
    responses: TokenIds = []
    for first in range(0, len(texts), CHUNK):
        chunk = texts[first : first + CHUNK]
        prompts += _token_ids(tokenizer, [prompt for prompt, _ in chunk])
        responses += _token_ids(tokenizer, [response for _, response in chunk])
        if on_progress is not None:
            on_progress(len(prompts), len(texts))
    if path is not None:
        save(path, prompts, responses)
    return prompts, responses


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> TokenIds:
    # verbose=False: no advice about the model's own maximum length, max_length is ours to keep
    ids: TokenIds = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def _leading_specials(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer puts before any text by default: usually BOS or nothing."""
    full: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    at = (i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare)
    return full[: next(at, 0)]
