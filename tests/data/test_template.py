"""The wording of each template, word for word; what a record holds is never read as a placeholder; template files."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkseed.data import TEMPLATES, Example, Rendered, get_template
from fedkseed.errors import ConfigError, InvalidValueError
from fedkseed.runs.settings import build

NONE: Any = None
"""In place of the tokenizer, which only `chat` asks for anything."""
WITH, WITHOUT = Example("Do it.", "This.", "Done.", "c"), Example("Do it.", "", "Done.", "c")
ALPACA_WITH = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Do it.

### Input:
This.

### Response:"""
ALPACA_WITHOUT = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
Do it.

### Response:"""
DOLLY = "Write a response for the task request."
ALPACA = "Write a response that appropriately completes the request."
TEXTS = {
    "alpaca": (ALPACA_WITH, ALPACA_WITHOUT),
    "dolly": (ALPACA_WITH.replace(ALPACA, DOLLY), ALPACA_WITHOUT.replace(ALPACA, DOLLY)),
    "bare": ("Do it.\n\nInput: This.\n\nOutput:", "Do it.\n\nOutput:"),
    "plain": ("Instruction:\nDo it.\n\nInput:\nThis.\n\nResponse:\n", "Instruction:\nDo it.\n\nResponse:\n"),
}
GOOD = 'prompt_input = "{instruction} / {input} ="\nprompt_no_input = "{instruction} ="\n'


def texts(rendered: Rendered) -> tuple[str, str]:
    return rendered.prompt, rendered.response


def write(folder: Path, text: str | bytes) -> str:
    path = folder / "template.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_templates_give_their_exact_texts(name: str) -> None:
    assert texts(get_template(name)(WITH, NONE)) == (TEXTS[name][0], "Done.")
    assert texts(get_template(name)(WITHOUT, NONE)) == (TEXTS[name][1], "Done.")


def test_every_template_is_tested() -> None:
    assert set(TEMPLATES) == {*TEXTS, "chat"}  # chat has its tests in test_chat.py


PIECES = st.sampled_from(["{instruction}", "{input}", "{output}", "{}", "{{", "}}", "{", "}", "\\1", "%s", "$input", "a", "\n"])
TEXT = st.lists(PIECES, min_size=1, max_size=6).map("".join)


@given(TEXT, TEXT, st.sampled_from(sorted(TEXTS)))
def test_what_a_record_holds_is_never_substituted(instruction: str, text: str, name: str) -> None:
    template = get_template(name)
    marked = template(Example("\x01", "\x02", "", ""), NONE).prompt
    before, between, after = re.split("[\x01\x02]", marked)
    if text.strip():
        rendered = template(Example(instruction, text, text, ""), NONE)
        assert texts(rendered) == (before + instruction + between + text + after, text)
        assert [part for part, own in rendered.parts if own] == [instruction, text]


def test_substituting_one_after_the_other_would_show() -> None:
    """The control: what the test above is there to catch."""
    careless = TEXTS["plain"][0].replace("Do it.", "{instruction}").replace("This.", "{input}")
    assert (
        careless.replace("{instruction}", "{input}").replace("{input}", "x")
        != get_template("plain")(Example("{input}", "x", "", ""), NONE).prompt
    )


# --- Files ---


def test_a_template_can_be_a_file(tmp_path: Path) -> None:
    template = get_template(write(tmp_path, GOOD))
    assert texts(template(WITH, NONE)) == ("Do it. / This. =", "Done.")
    assert texts(template(WITHOUT, NONE)) == ("Do it. =", "Done.")


def test_a_file_may_repeat_a_placeholder_and_have_other_braces(tmp_path: Path) -> None:
    text = GOOD.replace("{instruction} =", "{instruction} { a } {instruction}")
    assert get_template(write(tmp_path, text))(WITHOUT, NONE).prompt == "Do it. { a } Do it."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not TOML", r"not a TOML file \(.*\); expected the texts prompt_input and prompt_no_input"),
        (b"a = '\xff'", r"not a TOML file \(.*\); expected the texts"),
        ("", r"has the keys \[\]; expected prompt_input and prompt_no_input"),
        (
            'prompt_input = "{instruction}{input}"',
            r"has the keys \['prompt_input'\]; expected prompt_input and prompt_no_input",
        ),
        (GOOD + "a = 1\n", r"has the keys \['a', 'prompt_input', 'prompt_no_input'\]; expected"),
        (GOOD.replace("{input}", ""), r"prompt_input lacks {input}; put it where the record's input shall stand"),
        (
            GOOD.replace("{instruction} /", "/"),
            r"prompt_input lacks {instruction}; put it where the record's instruction shall",
        ),
        (GOOD.replace("{instruction} =", "="), r"prompt_no_input lacks {instruction}; put it where"),
        (GOOD.replace("{instruction} =", "{instruction}{input}"), r"prompt_no_input has {input}; expected only {instruction}$"),
        (GOOD.replace("/", "{output}"), r"prompt_input has {output}; expected only {instruction} and {input}$"),
        (GOOD.replace("/", "{}"), r"prompt_input has {}; expected only {instruction} and {input}$"),
        (GOOD.replace('"{instruction} ="', "3"), r"prompt_no_input is no text; expected one with {instruction} in it"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(InvalidValueError, match=message) as caught:
        get_template(write(tmp_path, text))
    assert str(caught.value).startswith(f"template {tmp_path / 'template.toml'}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["", "Alpaca", "nowhere.toml", "Answer.\n{instruction}", "Below is an instruction. " * 20])
def test_what_is_neither_a_name_nor_a_file(name: str) -> None:
    with pytest.raises(
        InvalidValueError, match="is unknown; expected one of plain, alpaca, dolly, bare, chat, or a TOML file"
    ) as e:
        get_template(name)
    assert "\n" not in str(e.value)


def test_a_name_that_is_nearly_one_leads_to_it() -> None:
    with pytest.raises(InvalidValueError, match=r"a TOML file; did you mean 'chat'\?$"):
        get_template("chatt")
    with pytest.raises(InvalidValueError, match=r"a TOML file$"):
        get_template("nonsense")


def test_a_folder_is_no_template(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="is unknown"):
        get_template(str(tmp_path))


def test_settings_name_the_flag_and_keep_the_files_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, settings = write(tmp_path, GOOD), {"model": "m", "data": "o/n", "lr": 1}
    monkeypatch.chdir(tmp_path)
    assert build(settings | {"template": "template.toml"}).template == path
    with pytest.raises(ConfigError, match=r"^--template is 'a\.toml': unknown; expected one of plain,"):
        build(settings | {"template": "a.toml"})
