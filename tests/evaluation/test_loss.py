"""The loss: against a plain computation, across batchings, and token-weighted."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from fedkseed.data import EncodedExample, collate, encode, read_examples
from fedkseed.errors import DataError, InvalidValueError
from fedkseed.evaluation import evaluate_loss, mean_loss, response_log_probs, response_loss
from fedkseed.models.loading import load_model, load_tokenizer

RTOL = 2e-6  # float32 sums in another order; measured 2e-7 on stories260k
SHAPES = st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**16)), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def model(stories260k: Path) -> PreTrainedModel:
    return load_model(stories260k)


@pytest.fixture(scope="module")
def dolly(shared: Path, stories260k: Path) -> tuple[EncodedExample, ...]:
    examples = read_examples(shared / "data" / "databricks-dolly-15k.jsonl")[:24]
    return encode(examples, load_tokenizer(stories260k), 160).examples


def random_example(prompt: int, response: int, seed: int) -> EncodedExample:
    ids = np.random.default_rng(seed).integers(3, 512, prompt + response)
    return EncodedExample(ids.astype(np.int32), prompt)


def by_hand(model: torch.nn.Module, example: EncodedExample) -> tuple[float, int]:
    """Token by token, in Python."""
    ids = torch.from_numpy(example.input_ids.astype(np.int64))
    with torch.inference_mode():
        log_p = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    places = range(example.prompt_length, len(ids))
    return -sum(log_p[i - 1, ids[i]].item() for i in places), len(places)


def total(model: torch.nn.Module, *examples: EncodedExample, pad_id: int = 0) -> tuple[float, int]:
    with torch.inference_mode():
        loss, num_tokens = response_loss(model, collate(examples, pad_id))
    assert loss.ndim == 0
    return loss.item(), num_tokens


@settings(max_examples=15)
@given(SHAPES, st.integers(0, 511))
def test_padding_changes_nothing(model: PreTrainedModel, shapes: list[tuple[int, int, int]], pad_id: int) -> None:
    examples = [random_example(*shape) for shape in shapes]
    loss, num_tokens = total(model, *examples, pad_id=pad_id)
    singles = [total(model, example) for example in examples]
    hands = [by_hand(model, example) for example in examples]
    assert num_tokens == sum(n for _, n in singles) == sum(n for _, n in hands)
    assert loss == pytest.approx(sum(x for x, _ in singles), rel=RTOL)
    assert loss == pytest.approx(sum(x for x, _ in hands), rel=RTOL)


def test_several_passes_give_the_loss_and_the_gradient_of_one(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [random_example(*shape) for shape in ((30, 170, 1), (4, 6, 2), (60, 130, 3), (2, 9, 4))]
    batch = collate(examples, 0)
    assert len(list(batch.passes())) == 2
    split, count = response_loss(model, batch)
    monkeypatch.setattr("fedkseed.data.batch.PASS_COST", 10**6)
    assert len(list(batch.passes())) == 1
    whole, same = response_loss(model, batch)
    assert (split.item(), count) == (pytest.approx(whole.item(), rel=RTOL), same)
    (here,), (there,) = (torch.autograd.grad(loss, [next(model.parameters())]) for loss in (split, whole))
    assert torch.allclose(here, there, rtol=1e-3, atol=1e-5 * there.abs().max().item())


def test_prompt_tokens_do_not_count_but_matter(model: PreTrainedModel) -> None:
    example = random_example(10, 5, 1)
    whole = EncodedExample(example.input_ids, 1)
    assert total(model, example)[1] == 5
    assert total(model, whole)[1] == 14
    other = EncodedExample(np.concatenate([example.input_ids[:9] ^ 1, example.input_ids[9:]]).astype(np.int32), 10)
    assert abs(total(model, other)[0] - total(model, example)[0]) > 0.01


def test_the_first_token_of_all_is_never_predicted(model: PreTrainedModel) -> None:
    assert total(model, EncodedExample(np.array([5, 6, 7], np.int32), 0))[1] == 2


def test_a_model_without_logits_to_keep_gives_the_same(model: PreTrainedModel) -> None:
    class Plain(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            assert not use_cache
            return model(input_ids=input_ids, attention_mask=attention_mask)

    examples = [random_example(7, 3, 1), random_example(2, 9, 2)]
    loss, num_tokens = total(Plain(), *examples)
    assert (loss, num_tokens) == (pytest.approx(total(model, *examples)[0], rel=RTOL), 12)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2],
)
def test_logits_are_widened_before_the_softmax(dtype: torch.dtype, wide: torch.dtype) -> None:
    logits = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0)).to(dtype)

    class Fixed(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            return SimpleNamespace(logits=logits)

    loss, _ = response_loss(Fixed(), collate([EncodedExample(np.array([1, 2, 3], np.int32), 1)], 0))
    log_p = logits[0].double().log_softmax(-1)
    assert loss.dtype == wide
    assert loss.item() == pytest.approx(-(log_p[0, 2] + log_p[1, 3]).item(), rel=1e-6)
    # negative control: a softmax in half precision misses that by far
    if dtype.itemsize == 2:
        narrow = logits[0].log_softmax(-1).double()
        assert -(narrow[0, 2] + narrow[1, 3]).item() != pytest.approx(-(log_p[0, 2] + log_p[1, 3]).item(), rel=1e-5)


def test_mean_loss_is_the_sum_over_the_tokens(model: PreTrainedModel, dolly: tuple[EncodedExample, ...]) -> None:
    batch = collate(dolly[:3], 0)
    loss, num_tokens = response_loss(model, batch)
    assert torch.equal(mean_loss(model, batch), loss / num_tokens)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_every_token_of_a_set_weighs_the_same(
    model: PreTrainedModel, dolly: tuple[EncodedExample, ...], batch_size: int
) -> None:
    hands = [by_hand(model, example) for example in dolly]
    num_tokens = sum(n for _, n in hands)
    result = evaluate_loss(model, dolly, batch_size, pad_id=0)
    assert (result.num_examples, result.num_tokens) == (len(dolly), num_tokens)
    assert result.loss == pytest.approx(sum(x for x, _ in hands) / num_tokens, rel=RTOL)
    assert result.perplexity == math.exp(result.loss)
    # negative control: a mean of the examples' means is another number
    assert result.loss != pytest.approx(np.mean([x / n for x, n in hands]), rel=1e-3)


def test_the_order_of_a_set_matters_only_to_rounding(model: PreTrainedModel, dolly: tuple[EncodedExample, ...]) -> None:
    result = evaluate_loss(model, dolly, 4, 0)
    assert evaluate_loss(model, dolly, 4, 0) == result
    assert evaluate_loss(model, dolly[::-1], 4, 0).loss == pytest.approx(result.loss, rel=RTOL)


def test_modes_come_back_even_after_an_error(model: PreTrainedModel, dolly: tuple[EncodedExample, ...]) -> None:
    frozen = next(module for module in model.modules() if not list(module.children()))
    seen: list[bool] = []
    hook = frozen.register_forward_hook(lambda module, *_: seen.append(module.training))
    try:
        model.train()
        frozen.eval()
        evaluate_loss(model, dolly[:1], 1, 0)
        with pytest.raises(IndexError):
            evaluate_loss(model, [EncodedExample(np.array([1, 9999], np.int32), 1)], 1, 0)
        assert model.training
        assert not frozen.training
        assert seen == [False]
    finally:
        hook.remove()
        model.eval()


def test_an_overflowing_perplexity_is_infinite_and_nan_stays_nan() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = torch.nn.Parameter(torch.tensor(value))

        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            logits = torch.zeros(*input_ids.shape, 10)
            logits[..., 0] = self.value
            return SimpleNamespace(logits=logits)

    example = EncodedExample(np.array([1, 2], np.int32), 1)
    assert evaluate_loss(Fixed(1000.0), [example], 1, 0).perplexity == math.inf
    assert math.isnan(evaluate_loss(Fixed(math.nan), [example], 1, 0).perplexity)


def test_no_examples_and_no_batch_size_are_refused(model: PreTrainedModel, dolly: tuple[EncodedExample, ...]) -> None:
    with pytest.raises(DataError, match="no examples to evaluate on"):
        evaluate_loss(model, [], 1, 0)
    with pytest.raises(InvalidValueError, match="batch_size is 0; expected at least 1"):
        evaluate_loss(model, dolly, 0, 0)


@settings(max_examples=25, deadline=None)
@given(SHAPES)
def test_log_probabilities_of_responses_are_those_of_each_alone_however_they_are_batched(
    model: PreTrainedModel, shapes: list[tuple[int, int, int]]
) -> None:
    examples = [random_example(*shape) for shape in shapes]
    with torch.inference_mode():
        alone = [-response_loss(model, collate([example], 0))[0].item() for example in examples]
        for pad_id in (0, None):
            found = response_log_probs(model, collate(examples, pad_id))
            np.testing.assert_allclose(found.numpy(), alone, rtol=1e-4, atol=1e-4)
