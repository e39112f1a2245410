"""Encoded examples side by side in tensors.

torch is imported within the function, so that settings which name templates and sources can be checked without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedkseed.data.encode import EncodedExample
from fedkseed.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a position that counts in no loss (what torch and transformers use)."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Examples padded on the right to the longest.

    Attributes:
        input_ids: int64[b, t].
        attention_mask: int64[b, t], 0 on padding; None when there is no padding.
        labels: int64[b, t]: the ids of response and EOS in their own places (not shifted), -100 elsewhere.
        by_length: a model must not see the padding: examples of one length make up a pass.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor | None
    labels: torch.Tensor
    by_length: bool = False

    def passes(self) -> Iterator[Batch]:
        """What goes through a model at once: the batch, or its examples of each length without their padding."""
        if not self.by_length or self.attention_mask is None:
            yield self
            return
        lengths = self.attention_mask.sum(1)
        for length in sorted(set(lengths.tolist())):
            rows = lengths == length
            yield Batch(self.input_ids[rows, :length], None, self.labels[rows, :length])


def collate(examples: Sequence[EncodedExample], pad_id: int | None, device: torch.device | str = "cpu") -> Batch:
    """A batch of examples, in their order.

    Args:
        examples: at least one.
        pad_id: what padding holds (see `pad_token_id`); None if the model must not see any.
        device: where the tensors shall be.

    Raises:
        DataError: no examples.
    """
    import torch

    if not examples:
        raise DataError("a batch of no examples; give at least one")
    lengths = [len(example.input_ids) for example in examples]
    input_ids = np.full((len(examples), max(lengths)), pad_id or 0, np.int64)
    mask = np.zeros_like(input_ids)
    labels = np.full_like(input_ids, IGNORED)
    for row, (example, n) in enumerate(zip(examples, lengths, strict=True)):
        input_ids[row, :n] = example.input_ids
        mask[row, :n] = 1
        labels[row, example.prompt_length : n] = example.input_ids[example.prompt_length :]
    padded = min(lengths) < max(lengths)
    return Batch(
        input_ids=torch.from_numpy(input_ids).to(device),
        attention_mask=torch.from_numpy(mask).to(device) if padded else None,
        labels=torch.from_numpy(labels).to(device),
        by_length=pad_id is None,
    )


def pad_token_id(tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> int:
    """The id to pad with: the pad token's, else EOS's. Padding is masked, so that its value changes no result.

    Args:
        tokenizer: of the model.
        rows: how many ids the model has, if that is known; one that it does not have is replaced by 0.

    Raises:
        ModelError: the tokenizer has neither.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token) if rows is None or token < rows else 0
    raise ModelError(
        f"the tokenizer of {tokenizer.name_or_path} has neither a pad token nor an EOS token; "
        "set pad_token in its tokenizer_config.json"
    )
