"""Examples as token ids, with an exact boundary between prompt and response."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from fedkseed.data.cache import TokenIds, cache_path, load, save
from fedkseed.data.example import Example
from fedkseed.data.rendered import Rendered, Template
from fedkseed.data.special import TextEncoder, control_tokens, end_ids, leading_specials
from fedkseed.data.template import plain
from fedkseed.errors import DataError, InvalidValueError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1024
"""Examples in one call of the tokenizer, which spreads a call over threads."""
MOST_REASONS = 4
"""Reasons for dropping records that a line names."""
RESERVED = 4
"""Of a cut record at most one part in so many is its response: the rest is for the prompt."""

LongPrompts = Literal["cut", "drop"]
"""What becomes of a record whose prompt alone fills max_length."""


@dataclass(frozen=True, slots=True, eq=False)
class EncodedExample:
    """One tokenised example: the prompt, then what the model is to learn.

    Attributes:
        input_ids: int32[n], n <= max_length: prompt (BOS included), response, and what ends it unless truncation took that.
        prompt_length: how many leading ids belong to the prompt.
    """

    input_ids: NDArray[np.int32]
    prompt_length: int

    @property
    def num_targets(self) -> int:
        """How many ids are predicted from at least one before them and count in the loss; at least 1."""
        return len(self.input_ids) - max(self.prompt_length, 1)


@dataclass(frozen=True, slots=True)
class Dropped:
    """A record that is not learnt.

    Attributes:
        where: file and line, if known.
        reason: in a few words.
    """

    where: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class EncodedData:
    """Tokenised examples and what encoding cost them.

    Attributes:
        examples: those with something to learn, in the order they came in.
        kept: int64[len(examples)]: their positions among the examples given (to look up a category, say).
        dropped: examples left out: no response, a prompt that fills max_length and is not to be cut, a conversation that the
            template refuses.
        num_truncated: kept examples that lost tokens (the end counts).
        num_tokens_cut: the tokens those lost.
        num_prompts_cut: how many of those lost tokens of their prompt.
        stop_ids: the ids that end a response, EOS first; an answer ends at any of them.
        needed: the max_length from which on an example is kept with its whole prompt, of each that has a response.
    """

    examples: tuple[EncodedExample, ...]
    kept: NDArray[np.int64]
    dropped: tuple[Dropped, ...]
    num_truncated: int
    num_tokens_cut: int
    num_prompts_cut: int = 0
    stop_ids: tuple[int, ...] = ()
    needed: tuple[int, ...] = ()

    @property
    def num_dropped(self) -> int:
        """How many examples are left out."""
        return len(self.dropped)

    @property
    def share_harmed(self) -> float:
        """Which part of all examples is left out, or lost tokens of its prompt."""
        return (self.num_dropped + self.num_prompts_cut) / ((self.num_dropped + len(self.examples)) or 1)

    def length_keeping(self, share: float) -> int | None:
        """The least max_length that keeps a share of the examples that have a response, whole prompts and all; None if there
        are none."""
        return sorted(self.needed)[math.ceil(share * len(self.needed)) - 1] if self.needed else None


def why_dropped(dropped: Sequence[Dropped]) -> str:
    """How many records were dropped for which reason, and the first of each, such as `2 no response, first d.jsonl:7`."""
    firsts = {item.reason: item.where for item in reversed(dropped)}
    counts = Counter(item.reason for item in dropped)
    parts = [
        f"{count:,} {reason}{firsts[reason] and ', first '}{firsts[reason]}"
        for reason, count in counts.most_common(MOST_REASONS)
    ]
    others = sum(count for _, count in counts.most_common()[MOST_REASONS:])
    return "; ".join([*parts, *([f"{others:,} for other reasons"] if others else [])])


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    template: Template = plain,
    on_progress: Callable[[int, int], None] | None = None,
    long_prompts: LongPrompts = "drop",
) -> EncodedData:
    """Tokenise examples: `[BOS] prompt | response end`, cut on the right to max_length tokens.

    Prompt and response are tokenised apart and joined, so that no token spans the boundary and generation, which starts
    from the prompt's ids alone, sees what training saw. The prompt gets the leading special tokens (BOS) that the
    tokenizer gives any text, unless the template wrote them already. The end is how the template ends an assistant's turn, up
    to its first special token, else EOS. The names of special tokens in a record's own text are text. An example that is a
    text alone has no prompt but BOS, and ends with EOS. What cannot be learnt is dropped; but where it is the prompt alone that
    fills max_length, `cut` takes tokens out of the prompt's middle (see `_room`).
    Token ids of many examples are kept on the disk (see `fedkseed.data.cache`).

    Args:
        examples: any number.
        tokenizer: a Hugging Face tokenizer.
        max_length: in tokens, at least 2.
        template: see `fedkseed.data.template`.
        on_progress: hears how many of the examples are tokenised.
        long_prompts: what becomes of a record whose prompt alone fills max_length.

    Raises:
        InvalidValueError: max_length below 2.
        ModelError: the tokenizer has no EOS token, or not what the template needs, or refuses a conversation.
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
    rendered = [_rendered(example, tokenizer, template) for example in examples]
    ends = {text: end_ids(text, tokenizer) for text in {item.end for item in rendered}}
    control = control_tokens(tokenizer, "".join(ends))
    prompts, responses = _all_token_ids(rendered, tokenizer, control, on_progress)
    start = leading_specials(tokenizer)
    encoded: list[EncodedExample] = []
    kept: list[int] = []
    dropped: list[Dropped] = []
    needed: list[int] = []
    num_truncated = num_tokens_cut = num_prompts_cut = 0
    for i, (item, prompt, response) in enumerate(zip(rendered, prompts, responses, strict=True)):
        if prompt[: len(start)] != start:
            prompt = start + prompt
        answer = [*response, *ends[item.end]]
        length = len(prompt) + len(answer)
        if response and item.response.strip() and not item.fault:
            needed.append(max(len(prompt), 1) + 1)
            if long_prompts == "cut" and len(prompt) >= max_length and (room := _room(len(start), len(answer), max_length)):
                prompt = _without_middle(prompt, len(start), room)
                num_prompts_cut += 1
        example = EncodedExample(np.array([*prompt, *answer][:max_length], np.int32), len(prompt))
        if reason := item.fault or _nothing_to_learn(item, response, example, max_length):
            dropped.append(Dropped(examples[i].where, reason))
            continue
        encoded.append(example)
        kept.append(i)
        num_truncated += length > max_length
        num_tokens_cut += length - len(example.input_ids)
    if examples and not encoded:
        if all(item.fault for item in rendered):
            raise DataError(
                f"none of {len(examples)} records can be learnt ({why_dropped(dropped)}); mend them or give another --template"
            )
        raise DataError(
            f"none of {len(examples)} records has a response token within max_length {max_length}; "
            f"raise max_length or give records with shorter prompts and non-empty responses ({why_dropped(dropped)})"
        )
    stop_ids = dict.fromkeys([eos, *(ids[-1] for ids in ends.values())])
    return EncodedData(
        tuple(encoded),
        np.array(kept, np.int64),
        tuple(dropped),
        num_truncated,
        num_tokens_cut,
        num_prompts_cut,
        tuple(stop_ids),
        tuple(needed),
    )


def _room(num_leading: int, num_answer: int, max_length: int) -> int:
    """How many tokens a prompt is cut to: what its response leaves, which is kept whole up to a quarter of max_length.

    0 where there is no room for BOS, a token of the prompt's beginning, one of its end and one of the response.
    """
    reserved = min(num_answer, max_length // RESERVED)
    room = max_length - reserved
    return room if reserved and room >= num_leading + 2 else 0


def _without_middle(prompt: list[int], num_leading: int, room: int) -> list[int]:
    """A prompt's first and last tokens, which hold the instruction and the mark that an answer follows; as LongBench cuts."""
    tail = (room - num_leading) // 2
    return prompt[: room - tail] + prompt[-tail:]


def _rendered(example: Example, tokenizer: PreTrainedTokenizerBase, template: Template) -> Rendered:
    if example.fault:
        return Rendered((), "", fault=example.fault)
    return Rendered((), example.output) if example.alone else template(example, tokenizer)


def _nothing_to_learn(item: Rendered, response: list[int], example: EncodedExample, max_length: int) -> str:
    if not response or not item.response.strip():
        return "no response"
    return f"no response token within {max_length}" if example.num_targets < 1 else ""


def _all_token_ids(
    rendered: Sequence[Rendered],
    tokenizer: PreTrainedTokenizerBase,
    control: Sequence[str],
    on_progress: Callable[[int, int], None] | None,
) -> tuple[TokenIds, TokenIds]:
    """The ids of prompts and of responses, from the disk where they are there."""
    texts = [(item.parts, item.response) for item in rendered]
    path = cache_path(texts, tokenizer, control)
    if path is not None and (kept := load(path, len(texts))) is not None:
        return kept
    encoder = TextEncoder(tokenizer, control)
    prompts: TokenIds = []
    responses: TokenIds = []
    for first in range(0, len(texts), CHUNK):
        chunk = texts[first : first + CHUNK]
        prompts += encoder.encode([parts for parts, _ in chunk])
        responses += encoder.encode([((response, True),) for _, response in chunk])
        if on_progress is not None:
            on_progress(len(prompts), len(texts))
    if path is not None:
        save(path, prompts, responses)
    return prompts, responses
