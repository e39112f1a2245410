"""Batches: right padding, masks, labels."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedkseed.data import EncodedExample, collate, pad_token_id
from fedkseed.data.batch import PASS_COST, alike
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


def cost(passes: list[list[int]]) -> int:
    return sum(max(lengths) * len(lengths) + PASS_COST for lengths in passes)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8))
def test_a_batch_goes_through_in_the_passes_that_cost_least(lengths: list[int]) -> None:
    groups = alike(np.array(lengths))
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(lengths)))
    found = cost([[lengths[i] for i in group] for group in groups])
    longest_first = sorted(lengths, reverse=True)
    for cuts in itertools.product((False, True), repeat=len(lengths) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut]
        assert found <= cost([longest_first[a:b] for a, b in itertools.pairwise([0, *ends, len(lengths)])])


def test_the_passes_hold_what_the_batch_holds_and_no_padding_that_costs_more_than_a_pass() -> None:
    examples = [encoded([1] * n, 1) for n in (300, 20, 290, 24)]
    batch = collate(examples, pad_id=0)
    parts = list(batch.passes())
    assert [tuple(part.input_ids.shape) for _, part in parts] == [(2, 300), (2, 24)]
    for (places, part), wholes in zip(parts, ((0, 2), (3, 1)), strict=True):
        assert places.tolist() == list(wholes)
        assert part.attention_mask is not None
        assert part.attention_mask.sum(1).tolist() == [len(examples[i].input_ids) for i in wholes]
        assert torch.equal(part.labels, batch.labels[list(wholes), : part.labels.shape[1]])
    alone = collate([examples[0], examples[1]], pad_id=0)
    assert [part.attention_mask for _, part in alone.passes()] == [None, None]


def test_a_model_that_must_not_see_padding_sees_none() -> None:
    parts = [part for _, part in collate([encoded([1] * n, 1) for n in (3, 5, 3)], pad_id=None).passes()]
    assert [tuple(part.input_ids.shape) for part in parts] == [(2, 3), (1, 5)]
    assert all(part.attention_mask is None for part in parts)


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
