"""What a model answers: batched greedy generation from prompts, and how often the answer is the expected one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fedkseed.data import EncodedExample, pad_token_id

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[EncodedExample],
    batch_size: int = 16,
    max_new_tokens: int = 128,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy answers to the prompts of examples, in their order; each ends at EOS, after max_new_tokens or where the model's
    context does.

    Prompts of similar length share a batch, padded on the left, with a key-value cache. Behind a soft prompt each is alone.

    Args:
        model: a Hugging Face causal LM in eval mode.
        tokenizer: its tokenizer.
        examples: only their prompts are used.
        batch_size: prompts in one batch.
        max_new_tokens: longest answer.
        on_progress: hears how many of the answers are done.
    """
    pad, device = pad_token_id(tokenizer), next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda i: -examples[i].prompt_length)
    soft_prompt = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0
    room = (getattr(model.config, "max_position_embeddings", None) or math.inf) - soft_prompt
    answers = [""] * len(examples)
    if soft_prompt:  # peft counts positions through the padding between its prompt and the text's; so there is none
        batch_size = 1
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        prompts = [examples[i].input_ids[: examples[i].prompt_length] for i in chosen]
        width = max(len(prompt) for prompt in prompts)
        ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
            mask[row, width - len(prompt) :] = 1
        longest = int(max(1, min(max_new_tokens, room - width)))
        limits: dict[str, Any] = {"max_new_tokens": longest, "do_sample": False, "pad_token_id": pad}
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Position ids are not supported for parameter efficient tuning")
            inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
            output = model.generate(**inputs, eos_token_id=tokenizer.eos_token_id, **limits)
        texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        for i, text in zip(chosen, texts, strict=True):
            answers[i] = text
        if on_progress is not None:
            on_progress(first + len(chosen), len(order))
    return answers


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Fraction of answers that are the reference, white space at the ends aside; NaN for none."""
    pairs = list(zip(answers, references, strict=True))
    return sum(a.strip() == b.strip() for a, b in pairs) / len(pairs) if pairs else float("nan")
