"""The names of special tokens in a record's own text stay text, with every kind of tokenizer; those of a template do not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny import CHAT, tiny_model
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedkseed.data import Example, encode, get_template
from fedkseed.models.loading import load_tokenizer


class Letters(PreTrainedTokenizer):
    """A slow tokenizer: one token a character."""

    def __init__(self, **kwargs: Any) -> None:
        self._known = {chr(code): code - 32 for code in range(32, 127)} | {"\n": 95, "<s>": 96, "</s>": 97, "<unk>": 98}
        super().__init__(bos_token="<s>", eos_token="</s>", unk_token="<unk>", **kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self._known)

    def get_vocab(self) -> dict[str, int]:
        return dict(self._known)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self._known.get(token, 98)

    def _convert_id_to_token(self, index: int) -> str:
        return next(token for token, i in self._known.items() if i == index)


def pieces() -> PreTrainedTokenizerBase:
    """A fast tokenizer whose model has EOS among its own pieces, so that it finds it in any text."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram

    letters = [(chr(code), -10.0) for code in range(32, 127)]
    backend = Tokenizer(Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("\n", -10.0), *letters], unk_id=0))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


MAKES: dict[str, Callable[[Path, Path], PreTrainedTokenizerBase]] = {
    "byte-fallback BPE, fast": lambda shared, _: load_tokenizer(shared / "models" / "stories260k"),
    "words, fast": lambda _, folder: AutoTokenizer.from_pretrained(tiny_model(folder / "model")),
    "pieces, fast": lambda *_: pieces(),
    "letters, slow": lambda *_: Letters(),
}


@pytest.fixture(params=MAKES)
def tokenizer(request: pytest.FixtureRequest, shared: Path, tmp_path: Path) -> PreTrainedTokenizerBase:
    return MAKES[request.param](shared, tmp_path)


def ids_of(example: Example, tokenizer: PreTrainedTokenizerBase, template: str = "plain") -> tuple[list[int], list[int]]:
    (encoded,) = encode([example], tokenizer, 4096, get_template(template)).examples
    ids = encoded.input_ids.tolist()
    return ids[: encoded.prompt_length], ids[encoded.prompt_length :]


def specials(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    marks = {tokenizer.bos_token, tokenizer.eos_token}
    return [token for token in tokenizer.convert_ids_to_tokens(ids) if token in marks]


def test_eos_in_a_response_is_text_and_eos_behind_it_is_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    _, response = ids_of(Example("big", "", "red</s> dog <s>", ""), tokenizer)
    assert specials(response, tokenizer) == ["</s>"]
    assert response[-1] == tokenizer.eos_token_id


def test_the_control_a_tokenizer_left_to_itself_makes_tokens_of_it(tokenizer: PreTrainedTokenizerBase) -> None:
    ids: list[int] = tokenizer("red</s> dog <s>", add_special_tokens=False)["input_ids"]
    assert specials(ids, tokenizer) == ["</s>", "<s>"]


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_in_a_prompt_too(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = "{% for m in messages %}<s>" + "{{ m.content }}</s>{% endfor %}"
    prompt, _ = ids_of(Example("a </s> big<s>", "", "red", ""), tokenizer, template)
    own = ["<s>", "</s>"] if template == "chat" else []
    start = [] if own or tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id else ["<s>"]
    assert specials(prompt, tokenizer) == start + own


def test_a_template_file_may_write_special_tokens(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path = tmp_path / "t.toml"
    path.write_text('prompt_input = "{instruction}</s>{input}</s>"\nprompt_no_input = "big </s>{instruction}</s>"\n')
    prompt, _ = ids_of(Example("a </s>dog", "", "red", ""), tokenizer, str(path))
    assert [token for token in specials(prompt, tokenizer) if token == "</s>"] == ["</s>", "</s>"]
    assert prompt[-1] == tokenizer.eos_token_id


NAMES = st.lists(
    st.sampled_from(["</s>", "<s>", "<", "/s>", "</", "s>", "<unk>", "red", " ", "[INST]"]), min_size=1, max_size=8
)


@given(NAMES.map("".join), NAMES.map("".join))
def test_texts_come_back_as_they_were(instruction: str, response: str) -> None:
    its = Letters()
    its.chat_template = CHAT
    if not response.strip():
        return
    for template in ("plain", "chat"):
        prompt, answer = ids_of(Example(instruction, "", response, ""), its, template)
        assert "".join(its.convert_ids_to_tokens(answer[:-1])) == response
        assert instruction in "".join(its.convert_ids_to_tokens(prompt))
        assert its.eos_token_id not in [*prompt, *answer[:-1]]


def test_texts_without_such_names_are_tokenised_as_ever(tokenizer: PreTrainedTokenizerBase) -> None:
    example = Example("name the animal", "a big and small", "red dog", "")
    prompt, response = ids_of(example, tokenizer)
    text = get_template("plain")(example, tokenizer).prompt
    assert prompt[-3:] == tokenizer(text, add_special_tokens=False)["input_ids"][-3:]
    assert response[:-1] == tokenizer("red dog", add_special_tokens=False)["input_ids"]
