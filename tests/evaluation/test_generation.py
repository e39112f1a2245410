"""Greedy generation: padding and batching change no answer, and an answer ends at EOS."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkseed.data import Example, encode
from fedkseed.evaluation import exact_match, generate
from fedkseed.models.loading import load_model, load_tokenizer


@pytest.fixture(scope="module")
def story(stories260k: Path):
    tokenizer = load_tokenizer(stories260k)
    prompts = ["Once upon a time", "Tom", "The little cat went to the park with her mom and she was", "Lily said"]
    encoded = encode([Example(p, "", "x", "") for p in prompts], tokenizer, 200)
    return load_model(stories260k, "float32"), tokenizer, encoded.examples


def test_a_batch_gives_the_answers_of_single_prompts(story):
    model, tokenizer, examples = story
    alone = [generate(model, tokenizer, [example], max_new_tokens=12)[0] for example in examples]
    assert generate(model, tokenizer, examples, batch_size=4, max_new_tokens=12) == alone
    assert generate(model, tokenizer, examples, batch_size=3, max_new_tokens=12) == alone
    assert len(set(alone)) > 1


def test_an_answer_is_the_greedy_one_and_no_longer_than_asked(story):
    model, tokenizer, examples = story
    ids = torch.from_numpy(examples[0].input_ids[: examples[0].prompt_length].astype(np.int64))[None]
    expected = []
    for _ in range(9):
        with torch.inference_mode():
            following = model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
        expected.append(int(following))
        ids = torch.cat([ids, following[None, None]], dim=1)
    assert generate(model, tokenizer, examples[:1], max_new_tokens=9) == [tokenizer.decode(expected, skip_special_tokens=True)]


def test_an_answer_ends_at_eos(story):
    """With EOS made the only token that can come, every answer is empty."""
    model, tokenizer, examples = story
    eos = tokenizer.eos_token_id

    def only_eos(module, args, output):
        logits = torch.full_like(output, -1e9)
        logits[..., eos] = 0
        return logits

    handle = model.lm_head.register_forward_hook(only_eos)
    try:
        assert generate(model, tokenizer, examples, max_new_tokens=50) == [""] * len(examples)
    finally:
        handle.remove()


def test_exact_match_counts_equal_answers_but_for_white_space_at_the_ends():
    assert exact_match([" a\n", "b", "c d"], ["a", "B", "c  d"]) == pytest.approx(1 / 3)
    assert math.isnan(exact_match([], []))


def test_an_answer_ends_where_the_context_does(story):
    """A model with learned positions has no more of them, and would fail."""
    from transformers import GPT2Config, GPT2LMHeadModel

    _, tokenizer, examples = story
    config = GPT2Config(vocab_size=512, n_positions=40, n_embd=8, n_layer=1, n_head=1, eos_token_id=2, bos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    assert max(example.prompt_length for example in examples) < 40
    answers = generate(model, tokenizer, examples, max_new_tokens=100)
    assert len(answers) == len(examples)
