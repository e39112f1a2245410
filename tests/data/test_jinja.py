"""A run's template as a chat template: `apply_chat_template` gives the very text and ids that the run trains on."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from tests.support.tiny import CHAT
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from fedkseed.data import TEMPLATES, Chat, Example, Template, encode, get_template
from fedkseed.data.chat import FIXED_DAY
from fedkseed.data.jinja import literal
from fedkseed.data.record import to_example
from fedkseed.demo import model_folder
from fedkseed.models.loading import load_tokenizer

ODD = "a \"quoted\" \\n {{ x }} {% endif %} \\ back\nnew\tline é 🌱 'single' {instruction}"
RECORDS = [
    Example("name the animal", "", "dog", ""),
    Example("name the animal", "a big one", "dog", ""),
    Example(ODD, " \t\n ", "cat", ""),
    Example(f" {ODD}", f"{ODD} ", "cat", ""),
]
CONVERSATIONS = [
    [("user", "name the animal"), ("assistant", "dog")],
    [("system", "small and red"), ("user", "name the fruit"), ("assistant", "apple")],
    [("user", "name the fruit"), ("assistant", "apple"), ("user", "and a big one"), ("assistant", "pear")],
    [("system", "a blue dog"), ("assistant", "cat")],
]


def with_bos(tokenizer: Any) -> Any:
    """It puts BOS before any text, as Llama's do."""
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture(params=["tiny", "tiny with BOS", "demo"])
def tokenizer(request: pytest.FixtureRequest, tiny: Path) -> PreTrainedTokenizerBase:
    if request.param == "demo":
        return load_tokenizer(model_folder())
    own = load_tokenizer(tiny / "model")
    return with_bos(own) if "BOS" in request.param else own


@pytest.fixture(params=[*(name for name in TEMPLATES if name != "chat"), "own"])
def worded(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param != "own":
        return get_template(request.param)
    texts = {"prompt_input": f"<s>{ODD} {{input}}\n{{instruction}}", "prompt_no_input": '{{% "{instruction}'}
    (tmp_path / "own.toml").write_text(tomli_w.dumps(texts))
    return get_template(str(tmp_path / "own.toml"))


def asked(tokenizer: PreTrainedTokenizerBase, turns: Any, **options: Any) -> tuple[str, list[int]]:
    """As vLLM asks: the text, and its ids without any more special tokens."""
    text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    assert isinstance(text, str)
    ids: list[int] = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False, **options)
    return text, ids


def trained_on(template: Template, example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids of the prompt, and all of them."""
    (found,) = encode([example], tokenizer, 4096, template).examples
    ids = found.input_ids.tolist()
    return ids[: found.prompt_length], ids


@pytest.mark.parametrize("example", RECORDS, ids=range(len(RECORDS)))
def test_a_record_is_asked_as_it_was_taught(worded: Any, tokenizer: PreTrainedTokenizerBase, example: Example) -> None:
    tokenizer.chat_template = worded.chat_template(tokenizer)
    text, ids = asked(
        tokenizer, [{"role": "user", "content": example.instruction}], input=example.input, add_generation_prompt=True
    )
    start = tokenizer.decode(tokenizer("")["input_ids"])
    own = worded(example, tokenizer).prompt
    assert text in (start + own, own)
    assert ids == trained_on(worded, example, tokenizer)[0]


@pytest.mark.parametrize("turns", CONVERSATIONS, ids=range(len(CONVERSATIONS)))
def test_so_is_a_conversation_and_its_end_is_the_responses(
    worded: Any, tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]]
) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    example = to_example({"messages": messages}, "d.jsonl:1")
    tokenizer.chat_template = worded.chat_template(tokenizer)
    prompt, _ = trained_on(worded, example, tokenizer)
    assert asked(tokenizer, messages[:-1], add_generation_prompt=True)[1] == prompt
    whole = asked(tokenizer, messages)[0]
    assert whole == asked(tokenizer, messages[:-1], add_generation_prompt=True)[0] + turns[-1][1] + str(tokenizer.eos_token)


def test_the_text_of_a_template_is_a_file_that_is_the_same_template(worded: Any, tokenizer: Any, tmp_path: Path) -> None:
    text, language = worded.text(tokenizer)
    (tmp_path / "again.toml").write_text(text, encoding="utf-8")
    assert language == "toml"
    assert get_template(str(tmp_path / "again.toml")) == worded


@pytest.mark.parametrize("value", [ODD, "", True, None, 3, -2.5, [1, "a"], {"a": {"b": [False]}}], ids=str)
def test_values_are_written_as_jinja_reads_them(tiny: Path, value: Any) -> None:
    tokenizer = load_tokenizer(tiny / "model")
    tokenizer.chat_template = "{{ (" + literal(value) + ") | tojson }}"
    assert json.loads(asked(tokenizer, [{"role": "user", "content": ""}])[0]) == value


# --- The tokenizer's own ---

DATED = "{{ strftime_now('%d %b %Y') }} {{ date_string }}|" + CHAT
THINKING = "{% if not enable_thinking %}[quick]{% endif %}" + CHAT


@pytest.mark.parametrize(
    ("jinja", "arguments"),
    [
        (CHAT, {}),
        ("<s>" + CHAT, {}),
        (DATED, {}),
        (THINKING, {"enable_thinking": False}),
        (THINKING, {"enable_thinking": True}),
    ],
    ids=range(5),
)
def test_a_tokenizers_own_is_asked_as_it_was_taught(tiny: Path, jinja: str, arguments: dict[str, Any]) -> None:
    """With BOS, on the run's date and with its arguments, unless the caller has others."""
    tokenizer, example = with_bos(load_tokenizer(tiny / "model")), Example("name the animal", "a big one", "dog", "")
    tokenizer.chat_template = jinja
    template = Chat(arguments)
    expected = trained_on(template, example, tokenizer)[0]
    tokenizer.chat_template = template.chat_template(tokenizer)
    turns = [{"role": "user", "content": "name the animal\n\na big one"}]
    text, ids = asked(tokenizer, turns, add_generation_prompt=True)
    assert ids == expected
    assert text.startswith("<s>")
    assert (FIXED_DAY.strftime("%d %b %Y") in text) == (jinja == DATED)
    other = asked(tokenizer, turns, add_generation_prompt=True, enable_thinking=not arguments.get("enable_thinking"))[0]
    assert (other != text) == bool(arguments)
