"""Batches: right padding, masks, labels."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkseed.data import EncodedExample, collate, pad_token_id
from fedkseed.errors import DataError, ModelError


def encoded(ids: list[int], prompt_length: int) -> EncodedExample:
    return EncodedExample(np.array(ids, np.int32), prompt_length)


def test_a_batch_by_hand() -> None:
    batch = collate([encoded([1, 5, 6, 7, 2], 3), encoded([1, 8, 2], 1)], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 2], [1, 8, 2, 0, 0]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.labels.tolist() == [[-100, -100, -100, 7, 2], [-100, 8, 2, -100, -100]]
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}


def test_equal_lengths_need_no_mask() -> None:
    assert collate([encoded([1, 2], 1), encoded([3, 4], 1)], pad_id=0).attention_mask is None


def test_no_examples_no_batch() -> None:
    with pytest.raises(DataError, match="a batch of no examples"):
        collate([], pad_id=0)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), st.integers(0, 50))
def test_labels_cover_exactly_what_follows_the_prompt(shapes: list[tuple[int, int]], pad_id: int) -> None:
    # ids that also occur as padding must still be learnt
    examples = [encoded([pad_id] * prompt + [pad_id] * response, prompt) for prompt, response in shapes]
    batch = collate(examples, pad_id)
    mask = torch.ones_like(batch.input_ids) if batch.attention_mask is None else batch.attention_mask
    assert mask.sum(1).tolist() == [prompt + response for prompt, response in shapes]
    for row, (prompt, response) in enumerate(shapes):
        expected = torch.zeros(batch.labels.shape[1], dtype=torch.bool)
        expected[prompt : prompt + response] = True
        assert torch.equal(batch.labels[row] != -100, expected)


def test_padding_takes_the_pad_token_then_eos() -> None:
    def tokenizer(pad: int | None, eos: int | None) -> Any:
        return SimpleNamespace(pad_token_id=pad, eos_token_id=eos, name_or_path="some/model")

    assert pad_token_id(tokenizer(0, 2)) == 0
    assert pad_token_id(tokenizer(None, 2)) == 2
    with pytest.raises(ModelError, match=r"some/model has neither a pad token nor an EOS token; set pad_token in its"):
        pad_token_id(tokenizer(None, None))
