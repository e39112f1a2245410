"""Greedy generation: padding and batching change no answer, and an answer ends at EOS."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from tests.support.generators import global_states

from fedkseed.data import Example, encode
from fedkseed.evaluation import Decoder, exact_match, generate
from fedkseed.evaluation.generation import Draws
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


# --- Greedy, whatever the model's files say ---


def test_nothing_that_a_generation_config_wishes_counts(story):
    from transformers import GenerationConfig

    model, tokenizer, examples = story
    expected = generate(model, tokenizer, examples, max_new_tokens=30)
    wishes = {"repetition_penalty": 1.9, "no_repeat_ngram_size": 2, "num_beams": 3, "do_sample": True, "temperature": 9.0,
              "min_new_tokens": 30, "max_length": 5, "suppress_tokens": list(range(3, 300))}  # fmt: skip
    own, model.generation_config = model.generation_config, GenerationConfig(**wishes)
    try:
        assert generate(model, tokenizer, examples, max_new_tokens=30) == expected
        assert model.generation_config.num_beams == 3
    finally:
        model.generation_config = own


@pytest.mark.parametrize("named_by", ["generation_config", "config", "stop_ids"])
def test_an_answer_ends_at_every_stop_of_model_and_template(story, monkeypatch, named_by):
    """The stop is a token of the answer itself, and no special one."""
    model, tokenizer, examples = story
    (whole,) = generate(model, tokenizer, examples[:1], max_new_tokens=12)
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    stop = ids[5]
    more = {"stop_ids": [stop]} if named_by == "stop_ids" else {}
    if not more:
        monkeypatch.setattr(getattr(model, named_by), "eos_token_id", [tokenizer.eos_token_id, stop])
    (answer,) = generate(model, tokenizer, examples[:1], max_new_tokens=12, **more)
    assert answer == tokenizer.decode(ids[: ids.index(stop)])
    assert len(answer) < len(whole)


def test_a_model_that_reads_padding_gets_prompts_of_one_length(story):
    from transformers import RwkvConfig, RwkvForCausalLM

    _, tokenizer, examples = story
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = RwkvConfig(vocab_size=512, hidden_size=16, num_hidden_layers=2, context_length=200, rescale_every=0)
        model = RwkvForCausalLM(config).eval()
        torch.nn.init.normal_(model.head.weight, std=9.0)  # decided answers
    heard = []
    alone = [generate(model, tokenizer, [example], max_new_tokens=6)[0] for example in examples]
    assert generate(model, tokenizer, examples, max_new_tokens=6, on_progress=lambda *done: heard.append(done)) == alone
    lengths = {example.prompt_length for example in examples}
    assert len(heard) == len(lengths) > 1
    assert heard[-1] == (4, 4)


def test_a_context_that_was_learnt_ends_an_answer(story):
    from transformers import GPT2Config, GPT2LMHeadModel

    _, tokenizer, examples = story
    config = GPT2Config(vocab_size=512, n_positions=200, n_embd=8, n_layer=1, n_head=1, eos_token_id=2, bos_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    model.transformer.wpe = torch.nn.Embedding(40, 8)
    with pytest.raises(IndexError):
        generate(model, tokenizer, examples, max_new_tokens=100)
    assert len(generate(model, tokenizer, examples, max_new_tokens=100, context=40)) == len(examples)


# --- Drawn answers ---


def prompts_of(examples):
    return [example.input_ids[: example.prompt_length] for example in examples]


def test_equal_keys_are_equal_draws_whatever_stands_beside_and_no_global_generator_is_touched(story):
    model, tokenizer, examples = story
    decoder, prompts = Decoder(model, tokenizer), prompts_of(examples)
    before = global_states()
    drawn = decoder.answers(prompts, 4, 8, temperature=1.0, keys=[1, 2, 3, 4])
    assert [str(state) for state in global_states()] == [str(state) for state in before]
    assert decoder.answers(prompts[::-1], 3, 8, temperature=1.0, keys=[4, 3, 2, 1]) == drawn[::-1]
    assert decoder.answers(prompts, 4, 8, temperature=1.0, keys=[5, 6, 7, 8]) != drawn
    assert decoder.answers(prompts, 4, 8, temperature=1e-6, keys=[1, 2, 3, 4]) == decoder.answers(prompts, 4, 8)


def test_tokens_are_drawn_by_their_probabilities_at_a_temperature():
    """Chi-square over 3,000 draws of one token of six; the probabilities of another temperature must fail it."""
    logits = torch.tensor([[0.0, 0.5, 1.0, 1.5, 2.0, 2.5]])
    counts = np.zeros(6)
    for key in range(3000):
        counts[int(Draws(0.7, [key])(torch.zeros(1, 1), logits).argmax())] += 1
    expected = {t: torch.softmax(logits[0] / t, 0).numpy().astype(float) for t in (0.7, 1.0)}
    assert chisquare(counts, 3000 * expected[0.7] / expected[0.7].sum()).pvalue > 1e-3
    assert chisquare(counts, 3000 * expected[1.0] / expected[1.0].sum()).pvalue < 1e-9
