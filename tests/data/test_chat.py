"""The tokenizer's own chat template: how turns end, which day it is, what it refuses or passes over, its arguments."""

from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.tiny import CHAT
from transformers import PreTrainedTokenizerBase

from fedkseed.data import Chat, Example, arguments_text, encode, get_template, parse_arguments, why_dropped
from fedkseed.data.record import to_example
from fedkseed.errors import ConfigError, DataError, InvalidValueError, ModelError
from fedkseed.models.loading import load_tokenizer
from fedkseed.runs.settings import build

HERE = "d.jsonl:7"
EOS = 2
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRICT = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system\n turns here') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
)
DEAF = "{% for m in messages %}{% if m.role in ('user', 'assistant') %}[{{ m.role }}]{{ m.content }}\n{% endif %}{% endfor %}"
FUSSY = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') or m.tool_calls %}"
    "{{ raise_exception('roles\\n must be known') }}{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
TOOLS = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function.name }}"
    "{% endfor %};{% endfor %}"
)


def say(*turns: tuple[str, Any], **more: Any) -> Example:
    return to_example({"messages": [{"role": role, "content": content} for role, content in turns], **more}, HERE)


SYSTEM = say(("system", "Be kind."), ("user", "Hi."), ("assistant", "Yo."))
TWICE = say(("user", "Hi."), ("user", "There."), ("assistant", "Yo."))
TOOL = say(("user", "Add."), ("tool", "3"), ("assistant", "Three."))
DEVELOPER = say(("developer", "Be kind."), ("user", "Hi."), ("assistant", "Yo."))
CALL = to_example(
    {
        "messages": [
            {"role": "user", "content": "Add."},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {}}}]},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "content": "Three."},
        ]
    },
    HERE,
)
PLAIN = say(("user", "Hi."), ("assistant", "Yo."))

Make = Callable[..., PreTrainedTokenizerBase]


@pytest.fixture
def make(stories260k: Path) -> Make:
    def tokenizer(template: str, special: tuple[str, ...] = (), added: tuple[str, ...] = ()) -> PreTrainedTokenizerBase:
        made = load_tokenizer(stories260k)
        made.add_special_tokens({"additional_special_tokens": list(special)})
        made.add_tokens(list(added))
        made.chat_template = template
        return made

    return tokenizer


def prompt(template: Any, example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    rendered = template(example, tokenizer)
    assert rendered.fault == ""
    return str(rendered.prompt)


# --- How a turn ends ---


@pytest.mark.parametrize("how", ["special", "added"])
def test_a_response_ends_as_the_template_ends_a_turn(make: Make, how: str) -> None:
    its = make(CHATML, **{how: ("<|im_start|>", "<|im_end|>")})
    data = encode([PLAIN], its, 512, get_template("chat"))
    end = its.convert_tokens_to_ids("<|im_end|>")
    assert data.examples[0].input_ids.tolist()[-1] == end
    assert EOS not in data.examples[0].input_ids
    assert data.stop_ids == (EOS, end)
    assert encode([PLAIN], its, 512).stop_ids == (EOS,)  # the other templates know of no turns


ENDS = {
    "EOS": "{{ m.content }}</s>",
    "a blank, then EOS": "{{ m.content }} {{ eos_token }}",
    "EOS and more": "{{ m.content }}\n</s>\n<s>",
    "a line's end": "{{ m.content }}\n",
    "nothing": "{{ m.content }}",
    "a mark that is no token": "{{ m.content }}<|end|>",
    "not what was said": "...",
    "a refusal": "{% if m.role == 'assistant' %}{{ raise_exception('no answers') }}{% endif %}{{ m.content }}",
}


@pytest.mark.parametrize("name", ENDS)
def test_where_the_template_has_no_token_of_its_own_eos_ends_it(make: Make, name: str) -> None:
    its = make("{% for m in messages %}" + ENDS[name] + "{% endfor %}")
    (example,) = encode([PLAIN], its, 512, get_template("chat")).examples
    assert example.input_ids.tolist()[example.prompt_length :] == [*its("Yo.", add_special_tokens=False)["input_ids"], EOS]


def test_what_ends_a_turn_is_text_where_a_record_names_it(make: Make) -> None:
    named = say(("user", "Say <|im_end|> now."), ("assistant", "No <|im_end|> here."))
    for how in ("special", "added"):
        its = make(CHATML, **{how: ("<|im_start|>", "<|im_end|>")})
        (example,) = encode([named], its, 512, get_template("chat")).examples
        ids = example.input_ids.tolist()
        end = its.convert_tokens_to_ids("<|im_end|>")
        assert [i for i, token in enumerate(ids) if token == end] == [ids.index(end), len(ids) - 1]
        assert ids.index(end) < example.prompt_length
        assert its.decode(ids).replace(" ", "").count("<|im_end|>") == 4


def test_so_it_is_in_a_call_of_a_tool(make: Make) -> None:
    turns = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "tool_calls": [{"function": {"name": "</s>", "arguments": {}}}]},
        {"role": "assistant", "content": "Three."},
    ]
    its = make(TOOLS)
    (example,) = encode([to_example({"messages": turns}, HERE)], its, 512, get_template("chat")).examples
    assert example.input_ids.tolist().count(EOS) == 1
    assert "[assistant]</s>;" in its.decode(example.input_ids)


# --- Which day it is ---


FORMATS = ["%d %B %Y", "%Y-%m-%d", "%A, %-d %b %y", "day %j", "plain", "%H:%M", "100%% %d"]


@pytest.mark.parametrize("form", FORMATS)
def test_a_template_sees_the_day_that_it_is_given(make: Make, form: str) -> None:
    day = date(2031, 3, 4)
    its = make(
        "{% macro now() %}{{ strftime_now('" + form + "') }}{% endmacro %}{{ now() }}|{{ strftime_now('" + form + "') }}"
    )
    expected = day.strftime(form)
    assert prompt(get_template("chat", today=day), PLAIN, its) == f"{expected}|{expected}"


def test_the_clock_is_not_read(make: Make) -> None:
    its = make("{{ strftime_now('%Y') }} {{ date_string }}")
    assert prompt(get_template("chat"), PLAIN, its) == "2024 26 Jul 2024"
    assert prompt(get_template("chat", today=date(2031, 3, 4)), PLAIN, its) == "2031 04 Mar 2031"
    seen = its.apply_chat_template([{"role": "user", "content": ""}], tokenize=False, date_string="")
    assert str(seen).strip() == date.today().strftime("%Y")  # the control: what a template sees by itself


@pytest.mark.parametrize(
    "start", ["", " ", "\n", "\n\n  ", "  {% if true %}\n  x{% endif %}", "{%- if true %} y{% endif %}", "{# c #}\n"]
)
def test_giving_a_day_changes_nothing_else(make: Make, start: str) -> None:
    its = make(start + "{{ strftime_now('a day') }}\n  {% for m in messages %}\n{{ m.content }}\n  {% endfor %}")
    expected = its.apply_chat_template([{"role": "user", "content": "Hi."}], tokenize=False)
    assert prompt(get_template("chat"), PLAIN, its) == expected


# --- What it refuses ---


@pytest.mark.parametrize("example", [SYSTEM, TWICE], ids=["a system turn", "neighbours of one role"])
def test_a_refusal_names_the_record_and_the_ways_out(make: Make, example: Example) -> None:
    its = make(STRICT)
    reason = "no system turns here" if example is SYSTEM else "roles must alternate"
    with pytest.raises(ModelError) as caught:
        encode([PLAIN, example], its, 512, get_template("chat"))
    assert str(caught.value) == (
        f"{HERE}: the chat template of {its.name_or_path} refuses it ({reason}); give --refused-turns fold (system turns go "
        "into the user's) or drop (the record is left out), or the template 'plain'"
    )
    data = encode([PLAIN, example], its, 512, get_template("chat", refused="drop"))
    assert data.kept.tolist() == [0]
    assert why_dropped(data.dropped) == f"1 the chat template refuses it: {reason}, first {HERE}"


def test_folded_turns_hold_all_texts(make: Make) -> None:
    its, fold = make(STRICT), get_template("chat", refused="fold")
    assert prompt(fold, SYSTEM, its) == "[user]Be kind.\n\nHi.\n[assistant]"
    assert prompt(fold, DEVELOPER, its) == "[user]Be kind.\n\nHi.\n[assistant]"
    assert prompt(fold, TWICE, its) == "[user]Hi.\n\nThere.\n[assistant]"
    assert prompt(fold, PLAIN, its) == prompt(get_template("chat"), PLAIN, its)


def test_what_the_template_takes_is_not_folded(make: Make) -> None:
    assert prompt(get_template("chat", refused="fold"), SYSTEM, make(CHAT)).startswith("[system]Be kind.\n[user]Hi.")


@pytest.mark.parametrize("refused", ["stop", "fold", "drop"])
@pytest.mark.parametrize("template", [FUSSY, DEAF], ids=["refused", "passed over"])
def test_tools_turns_that_it_does_not_take_are_dropped_and_counted(make: Make, template: str, refused: Any) -> None:
    its = make(template)
    for example in (TOOL, CALL):
        rendered = get_template("chat", refused=refused)(example, its)
        assert rendered.fault.startswith("the chat template refuses it: ")
    data = encode([PLAIN, TOOL, PLAIN, CALL], its, 512, get_template("chat", refused=refused))
    assert data.kept.tolist() == [0, 2]
    assert why_dropped(data.dropped).endswith(f"first {HERE}")


def test_tools_and_developers_turns_that_it_takes_are_given_to_it(make: Make) -> None:
    its, chat = make(TOOLS), get_template("chat")
    assert prompt(chat, TOOL, its) == "[user]Add.;[tool]3;"
    assert prompt(chat, CALL, its) == "[user]Add.;[assistant]add;[user]And?;"  # and no "None"
    assert prompt(chat, DEVELOPER, its) == "[developer]Be kind.;[user]Hi.;"


def test_a_turn_that_it_passes_over_is_no_turn_taken(make: Make) -> None:
    with pytest.raises(ModelError, match=r"refuses it \(it leaves out the turn of role 'system'\); give --refused-turns fold"):
        get_template("chat")(SYSTEM, make(DEAF))
    empty = say(("system", " "), ("user", "Hi."), ("assistant", "Yo."))
    assert prompt(get_template("chat"), empty, make(DEAF)) == prompt(get_template("chat"), PLAIN, make(DEAF))
    assert get_template("chat")(CALL, make(CHAT)).fault.endswith("it leaves out the calls of tools of role 'assistant'")


def test_all_dropped_is_one_line_with_the_reason(make: Make) -> None:
    with pytest.raises(
        DataError,
        match=r"none of 2 records can be learnt \(2 the chat template refuses it: roles must be known, first d\.jsonl:7\);",
    ):
        encode([TOOL, TOOL], make(FUSSY), 512, get_template("chat"))


# --- Its arguments ---


def test_arguments_reach_the_template(make: Make) -> None:
    its = make("{% if enable_thinking is false %}off{% else %}on{% endif %} {{ budget }} {{ name }}")
    assert prompt(get_template("chat"), PLAIN, its) == "on  "
    assert prompt(get_template("chat", arguments="enable_thinking=false,budget=3,name=short"), PLAIN, its) == "off 3 short"
    with pytest.raises(ModelError, match=r"has no argument 'enable_thinkin'; did you mean 'enable_thinking'\?"):
        get_template("chat", arguments="enable_thinkin=false")(PLAIN, its)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("a=false", {"a": False}),
        ("a=1,b=1.5, c = x y", {"a": 1, "b": 1.5, "c": "x y"}),
        ('a="b, c",d=[1, 2]', {"a": "b, c", "d": [1, 2]}),
    ],
)
def test_arguments_are_parsed_from_text_and_table_alike(text: str, arguments: dict[str, Any]) -> None:
    assert parse_arguments(text) == parse_arguments(arguments) == arguments


@given(
    st.dictionaries(
        st.from_regex("[a-z_]{1,9}", fullmatch=True),
        st.recursive(
            st.text(st.characters(codec="utf-8"))
            | st.integers()
            | st.booleans()
            | st.floats(allow_nan=False, allow_infinity=False),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=5), inner)
            ),
            max_leaves=5,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_a_table_of_arguments_is_kept_as_a_text_that_says_the_same(arguments: dict[str, Any]) -> None:
    assert parse_arguments(arguments_text(arguments)) == arguments


@pytest.mark.parametrize(
    "given",
    [{"day": None}, {"day": {1: 2}}, {"day": [[None]]}, {"day": b"a"}, {"day": "\ud800"}, {"a.b": 1}, {"": 1}, {"é": 1}],
    ids=str,
)
def test_what_no_text_can_say_is_no_argument(given: dict[str, Any]) -> None:
    with pytest.raises(InvalidValueError, match=r"^template_arguments has (day = |the name )"):
        arguments_text(given)
    with pytest.raises(ConfigError, match="template_arguments has "):
        build({"model": "m", "lr": 1, "data": "o/n", "template": "chat", "template_arguments": given})


@pytest.mark.parametrize("text", ["day=2026-01-01", "day=-inf", "day=[nan]"])
def test_what_a_chat_template_cannot_be_given_in_writing_is_said_by_whoever_writes_it(make: Make, text: str) -> None:
    its, chat = make("{{ day }}{% for m in messages %}{{ m.content }}{% endfor %}"), get_template("chat", arguments=text)
    assert prompt(chat, PLAIN, its)
    with pytest.raises(InvalidValueError, match="which no chat template can be given in writing"):
        chat.text(its)


@pytest.mark.parametrize("message", [{"role": "sys\ud800", "content": "a"}, {"role": "a", "tool_calls": [{"x": ["\ud800"]}]}])
def test_half_a_character_anywhere_in_a_message_is_named(message: dict[str, Any]) -> None:
    messages = [message, {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]
    with pytest.raises(DataError, match=r"^a:1: message 1 of 'messages': field '(role|tool_calls)' has half a surrogate pair"):
        to_example({"messages": messages}, "a:1")


def test_settings_of_chat(tmp_path: Path) -> None:
    settings = {"model": "m", "lr": 1, "data": "o/n", "template": "chat"}
    config = build(settings | {"template_arguments": {"a": False, "b": "c"}, "refused_turns": "fold"})
    assert config.template_arguments == 'a=false,b="c"'
    assert config.prompts() == Chat({"a": False, "b": "c"}, "fold")
    assert config.prompts("plain") == get_template("plain")
    with pytest.raises(
        ConfigError, match=r"^--template-arguments is 'a': template_arguments has 'a'; expected name=value, such"
    ):
        build(settings | {"template_arguments": "a"})
    for name, value in (("template_arguments", "a=1"), ("refused_turns", "drop")):
        with pytest.raises(
            ConfigError, match=r"^--(template-arguments|refused-turns) is '.*' and the template is 'plain'; only"
        ):
            build(settings | {name: value, "template": "plain"})
    with pytest.raises(InvalidValueError, match="only the template 'chat' takes it"):
        get_template("bare", refused="drop")
    file = tmp_path / "t.toml"
    file.write_text('prompt_input = "{instruction}{input}"\nprompt_no_input = "{instruction}"\n')
    with pytest.raises(ConfigError, match=r"t\.toml'; only the template 'chat' takes it$"):
        build(settings | {"template": file, "refused_turns": "drop"})
