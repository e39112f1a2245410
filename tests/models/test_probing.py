"""What models answer: whole families of architectures, each from its configuration, and models with one thing wrong."""

from typing import Any

import pytest
import torch
import transformers
from tests.support.tiny import WORDS

from fedkseed.errors import ModelError
from fedkseed.models.probing import Traits, context_of, masks_padding, probe

IDS = list(range(4, 20))
SMALL: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 40,
}  # fmt: skip


def made(name: str, /, **config: Any) -> Any:
    """A random model of an architecture."""
    torch.manual_seed(5)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**config)).eval()


def llama(**changes: Any) -> Any:
    return made("Llama", **SMALL | changes)


@pytest.fixture(autouse=True)
def torchs_generator() -> Any:
    with torch.random.fork_rng():
        yield


def test_a_usual_model_has_nothing_odd_and_stays_as_it_was() -> None:
    model = llama().requires_grad_(False).train()
    model.model.norm.weight.requires_grad_(True)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert probe(model, IDS, 1024) == Traits(40, 24, True, ())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert [name for name, x in model.named_parameters() if x.requires_grad] == ["model.norm.weight"]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


# --- How long a text may be ---


@pytest.mark.parametrize(
    ("name", "value"), [("n_positions", 7), ("max_seq_len", 8), ("context_length", 9), ("max_position_embeddings", 10)]
)
def test_the_context_length_has_many_names(name: str, value: int) -> None:
    config = transformers.PretrainedConfig(**{name: value})
    assert context_of(config) == value
    assert context_of(transformers.PretrainedConfig(hidden_size=3, **{name: None})) is None


def test_of_a_model_of_several_kinds_of_data_the_texts_counts() -> None:
    config = transformers.Gemma3Config(text_config={"max_position_embeddings": 77, "num_hidden_layers": 1})
    assert context_of(config) == 77


def test_positions_that_a_configuration_counts_too_many_of_are_found() -> None:
    """RoBERTa's table begins behind the padding's place."""
    model = made("Roberta", **SMALL, is_decoder=True, pad_token_id=1, type_vocab_size=1)
    assert probe(model, IDS, 1024).context == 40 - 2
    assert probe(model, IDS, 30).context == 40  # of no interest here


def test_a_limit_without_a_known_name_is_learnt() -> None:
    model = made("GPT2", vocab_size=24, n_positions=21, n_embd=8, n_layer=2, n_head=1)
    model.config = transformers.PretrainedConfig(vocab_size=24, use_cache=False)
    model.transformer.config.n_positions = 10**6
    assert probe(model, IDS, 1024).context == 21
    assert probe(model, IDS, 21).context is None


def test_no_limit_is_none() -> None:
    model = made("Bloom", vocab_size=24, hidden_size=8, n_layer=2, n_head=2)
    assert probe(model, IDS, 100).context is None


def test_a_long_text_goes_through_the_first_layer_only() -> None:
    model, seen = llama(max_position_embeddings=512), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append((module, args[0].shape[1])))
    probe(model, IDS, 512)
    assert [length for module, length in seen if module is model.model.layers[0]].count(512) == 1
    assert max(length for module, length in seen if module is model.model.layers[1]) < 20


# --- Later tokens, padding ---


def test_a_masked_language_model_is_refused_and_its_decoder_is_not() -> None:
    masked = transformers.BertForMaskedLM(transformers.BertConfig(**SMALL)).eval()
    with pytest.raises(ModelError, match=r"^BertForMaskedLM sees later tokens: .* a causal language model$"):
        probe(masked, IDS, 32)
    assert probe(made("Bert", **SMALL, is_decoder=True), IDS, 32).context == 40


class Peeking(transformers.LlamaForCausalLM):
    """Its logits change wherever a mask hides anything."""

    factor = 1.5

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **more: Any) -> Any:
        found = super().forward(input_ids=input_ids, attention_mask=attention_mask, **more)
        if attention_mask is not None and not attention_mask.all():
            found.logits = found.logits * self.factor
        return found


def test_a_model_that_padding_changes_is_noticed() -> None:
    config = transformers.LlamaConfig(**SMALL)
    assert not probe(Peeking(config).eval(), IDS, 32).pads
    assert probe(transformers.LlamaForCausalLM(config).eval(), IDS, 32).pads


def test_what_rounding_makes_of_padding_depends_on_the_products() -> None:
    """With TF32 equal logits differ by a thousandth between passes of other shapes: no reason to give up batches."""
    model = Peeking(transformers.LlamaConfig(**SMALL)).eval()
    model.factor = 1.005
    assert not probe(model, IDS, 32).pads
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        assert probe(model, IDS, 32).pads
        model.factor = 1.5
        assert not probe(model, IDS, 32).pads
    finally:
        torch.set_float32_matmul_precision(before)


def test_padding_in_front_of_a_prompt_is_asked_for_by_itself() -> None:
    """A recurrent model reads it."""
    recurrent = made("Rwkv", vocab_size=24, hidden_size=16, num_hidden_layers=2, context_length=32, rescale_every=0)

    def last(model: Any) -> Any:
        def logits(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                places = (mask.cumsum(1) - 1).clamp(min=0)
                more = {} if model is recurrent else {"position_ids": places}
                return model(input_ids=ids, attention_mask=mask, **more).logits[:, -1]

        return logits

    assert probe(recurrent, IDS, 32).pads
    assert not masks_padding(recurrent, IDS[:8], last(recurrent))
    usual = llama()
    assert masks_padding(usual, IDS[:8], last(usual))


# --- Numbers that are none ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    """Wherever they are: the row of the embedding is of no token that is asked with."""
    model = llama()
    model.get_parameter(name).data[-1] = value
    with pytest.raises(
        ModelError, match=rf"^the base model holds numbers that are not finite, in {name} \(float32\); its loss"
    ):
        probe(model, IDS, 32)


def test_half_precision_that_overflows_is_told_apart() -> None:
    model = llama()
    model.model.layers[0].mlp.down_proj.weight.data.fill_(6e4)
    model.lm_head.weight.data.fill_(6e4)
    with pytest.raises(
        ModelError, match=r"the loss of the base model is \w+ in float16, whose weights are finite; give --dtype"
    ):
        probe(model.half(), IDS, 32)
    model = llama()
    model.model.norm.weight.data[3] = 1e6
    with pytest.raises(ModelError, match=r"in model\.norm\.weight \(float16\).*: give --dtype float32, or mend"):
        probe(model.half(), IDS, 32)


def test_a_pass_that_changes_the_weights_is_refused() -> None:
    """Base plus coefficients would not be what runs."""
    model = made("Rwkv", vocab_size=24, hidden_size=16, num_hidden_layers=4, context_length=32, rescale_every=2)
    with pytest.raises(ModelError, match=r'changes its own weights \(rwkv\.blocks\..*; set "rescale_every": 0 in its config'):
        probe(model, IDS, 32)


# --- What a loss on text depends on ---


def test_the_tensors_of_another_kind_of_data_are_idle() -> None:
    text = {**SMALL, "head_dim": 8, "sliding_window": 16}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 8,
              "patch_size": 4}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=23)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    found = probe(model, IDS, 32)
    parts = {"model.vision_tower", "model.multi_modal_projector"}
    assert found.context == 40
    assert {".".join(name.split(".")[:2]) for name in found.idle} == parts
    assert set(found.idle) == {name for name, _ in model.named_parameters() if name.startswith(tuple(parts))}


class Experts(torch.nn.Module):
    """One of many for each text: a few tokens do not come to all."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(9))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[4](x)


def test_an_expert_that_was_not_asked_is_not_idle() -> None:
    model = llama()
    model.model.layers[1].mlp = Experts()
    model.unused = torch.nn.Linear(2, 2, bias=False)
    assert probe(model, IDS, 32).idle == ("unused.weight",)


# --- Ids ---


def test_ids_that_do_not_exist_are_not_asked_with() -> None:
    assert probe(llama(), [*IDS, 24, 1000], 32).rows == 24
    assert probe(llama(), [1000, 1001], 32).rows == 24
    assert probe(llama(), [], 32).rows == 24


def test_a_head_with_fewer_rows_counts() -> None:
    model = llama()
    model.lm_head = torch.nn.Linear(16, len(WORDS), bias=False)
    assert probe(model, IDS, 32).rows == len(WORDS)


def test_what_gives_no_loss_is_one_line() -> None:
    model = llama()
    model.forward = lambda **_: (_ for _ in ()).throw(ValueError("You must give\n\n  pixel_values"))
    with pytest.raises(
        ModelError, match=r"^LlamaForCausalLM gives no loss on a text \(You must give pixel_values\); give a caus"
    ):
        probe(model, IDS, 32)
