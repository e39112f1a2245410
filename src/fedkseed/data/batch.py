"""Encoded examples side by side in tensors.

torch is imported within the function, so that settings which name templates and sources can be checked without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedkseed.data.encode import EncodedExample
from fedkseed.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a position that counts in no loss (what torch and transformers use)."""
PASS_COST = 64
"""What a pass costs beside its tokens, in tokens: 18 with 135 million parameters, 90 with 260,000 (dev/LOG.md)."""


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

    def passes(self) -> Iterator[tuple[NDArray[np.intp], Batch]]:
        """What goes through a model at once: the batch, or parts of it with less padding, or without any.

        Returns:
            The places in the batch of a pass's examples, and these.
        """
        whole = np.arange(len(self.input_ids))
        if self.attention_mask is None:
            yield whole, self
            return
        lengths = self.attention_mask.sum(1).cpu().numpy()
        if self.by_length:
            groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
        elif self.input_ids.device.type == "cpu":
            groups = alike(lengths)
        else:  # a pass there costs as much for few tokens as for many
            yield whole, self
            return
        for rows in groups:
            longest = int(lengths[rows].max())
            mask = self.attention_mask[rows, :longest] if lengths[rows].min() < longest else None
            yield rows, Batch(self.input_ids[rows, :longest], mask, self.labels[rows, :longest])


def alike(lengths: NDArray[np.int64]) -> list[NDArray[np.intp]]:
    """Split a batch into passes that together take the least time on a CPU, where padding costs what tokens cost.

    Args:
        lengths: of the examples.

    Returns:
        The examples of each pass, by their places in the batch; the longest first.
    """
    order = np.argsort(-lengths, kind="stable")
    longest_first = lengths[order]
    least, begins = np.zeros(len(order) + 1), np.zeros(len(order) + 1, int)
    for end in range(1, len(order) + 1):
        begin = np.arange(end)
        costs = least[:end] + longest_first[:end] * (end - begin) + PASS_COST
        begins[end] = costs.argmin()
        least[end] = costs[begins[end]]
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]


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
