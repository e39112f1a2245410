"""A record of any source: what its fields may be called, conversations, and the one line to each thing it may not be."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.tiny import CHAT
from transformers import PreTrainedTokenizerBase

from fedkseed.data import COLUMNS, Example, columns_text, get_template, parse_columns, read_source
from fedkseed.data.record import to_example, to_examples
from fedkseed.errors import ConfigError, DataError, InvalidValueError
from fedkseed.runs.settings import build

HERE = "data.jsonl:7"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "An apple."},
]


# --- Fields ---


def test_a_record_gives_all_fields() -> None:
    record = {"instruction": "i", "input": "x", "output": "o", "category": "c", "client": "hospital", "other": [1]}
    assert to_example(record, HERE) == Example("i", "x", "o", "c", "hospital")


@pytest.mark.parametrize("field", ["input", "category", "client"])
def test_an_optional_field_may_be_null_or_missing(field: str) -> None:
    record = {"instruction": "i", "output": "o"}
    assert getattr(to_example(record | {field: None}, HERE), field) == getattr(to_example(record, HERE), field) == ""


@pytest.mark.parametrize("field", ["category", "client"])
def test_categories_and_clients_may_be_numbers(field: str) -> None:
    record = {"instruction": "i", "output": "o"}
    assert getattr(to_example(record | {field: 0}, HERE), field) == "0"
    assert getattr(to_example(record | {field: 12}, HERE), field) == "12"
    for value, kind in ((True, "boolean"), (1.5, "number")):
        with pytest.raises(DataError, match=rf"data.jsonl:7: field '{field}' is a {kind}; expected a string"):
            to_example(record | {field: value}, HERE)


def test_columns_rename_fields_and_leave_the_others() -> None:
    columns = parse_columns("instruction=question, output = answer ,client=site")
    record = {"question": "q", "answer": "a", "site": 3, "context": "x", "category": "c"}
    assert to_example(record, HERE, columns) == Example("q", "x", "a", "c", "3")
    assert parse_columns("messages=turns").names("messages") == ("turns",)
    assert parse_columns("messages=turns").names("input") == COLUMNS.names("input")


def test_a_renamed_field_goes_by_no_other_name() -> None:
    with pytest.raises(
        DataError, match=r"no field 'answer'; found \['instruction', 'output'\], so add it, or say with --columns"
    ):
        to_example({"instruction": "i", "output": "o"}, HERE, parse_columns("output=answer"))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('output="Answer, in full"', {"output": "Answer, in full"}),
        (' input = "a ""b"", c" ,output=d e', {"input": 'a "b", c', "output": "d e"}),
        ("output=a=b", {"output": "a=b"}),
    ],
)
def test_column_names_with_commas_and_quotes(text: str, told: dict[str, str]) -> None:
    assert (
        dict(parse_columns(text).told) == dict(parse_columns(told).told) == dict(parse_columns(columns_text(told)).told) == told
    )


def test_columns_of_a_table_in_the_settings_file() -> None:
    chosen = build({"model": "m", "lr": 1, "data": "o/n", "columns": {"output": "Answer, in full", "input": "x"}})
    assert chosen.columns == 'output="Answer, in full",input=x'
    with pytest.raises(ConfigError, match=r"^--columns is .*: columns has 'answer = 3'; expected field=column, such as"):
        build({"model": "m", "lr": 1, "data": "o/n", "columns": {"answer": 3}})
    with pytest.raises(InvalidValueError, match=r"columns names input twice, 'a' and 'b'; name one column for it"):
        parse_columns("input=a,input=b")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "instruction",
        "instruction=",
        "=question",
        "question=instruction",
        "output=a,,input=b",
        "output=a,",
        'output="a',
        'output=a"b"',
    ],
)
def test_columns_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(
        InvalidValueError, match=r"columns has '.*'; expected field=column, such as .* with fields of: instruction,"
    ):
        parse_columns(text)


def told(text: str, *records: dict[str, Any]) -> list[Example]:
    return to_examples([(f"d.jsonl:{n}", record) for n, record in enumerate(records, start=1)], "d.jsonl", parse_columns(text))


def test_a_column_that_no_record_has_is_refused_with_the_nearest_name() -> None:
    record = {"instruction": "i", "context": "x", "response": "o", "category": "c"}
    for text, column, hint in (
        ("input=contxt", "contxt", "did you mean 'context'?"),
        ("category=Categry", "Categry", "did you mean 'category'?"),
        ("client=hospital", "hospital", "name one of these"),
    ):
        field = text.partition("=")[0]
        with pytest.raises(DataError) as caught:
            told(text, record, record)
        assert str(caught.value) == (
            f"d.jsonl: no record has the column {column!r}, which --columns names for {field}; "
            f"found ['category', 'context', 'instruction', 'response'], so {hint}"
        )
    with pytest.raises(DataError, match=r"d\.jsonl:1: no field 'respose'; found .*; did you mean 'response'\?$"):
        told("output=respose", record)


def test_a_column_that_one_record_has_is_enough() -> None:
    record = {"instruction": "i", "response": "o"}
    assert [example.input for example in told("input=about", record, record | {"about": "x"})] == ["", "x"]
    with pytest.raises(DataError, match="no record has the column 'about'"):
        told("input=about", record, record)


def test_held_out_records_need_no_client(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"instruction": "i", "output": "o"}\n')
    assert read_source(path, "test", 64, 0, "client=site") == [Example("i", "", "o", "")]
    with pytest.raises(DataError, match="no record has the column 'site'"):
        read_source(path, "train", 64, 0, "client=site")


# --- What counts as absent ---


GAPS = [None, "", " \n", float("nan"), np.float64("nan")]


@pytest.mark.parametrize("gap", GAPS, ids=["null", "empty", "blank", "NaN", "NumPy's NaN"])
def test_of_two_columns_the_first_that_holds_something_is_taken(gap: Any) -> None:
    alpaca = {"instruction": "i", "input": "x", "output": "o", "context": gap, "response": gap, "category": gap, "client": gap}
    dolly = {"instruction": "i", "input": gap, "output": gap, "context": "x", "response": "o", "messages": gap, "prompt": gap}
    assert to_example(alpaca, HERE) == to_example(dolly, HERE) == Example("i", "x", "o", "")
    assert to_example({"instruction": gap, "prompt": "i", "output": gap, "completion": "o"}, HERE) == Example("i", "", "o", "")
    talk = {"messages": TALK[3:], "instruction": gap, "output": gap}
    assert to_example(talk, HERE).output == "An apple."
    assert to_example({"instruction": "i", "output": gap}, HERE).output == ""  # which encoding drops and counts


def test_both_filled_the_first_counts() -> None:
    record = {"instruction": "i", "response": "second", "output": "first", "context": "second", "input": "first"}
    assert to_example(record, HERE) == Example("i", "first", "first", "")


@pytest.mark.parametrize("field", ["category", "client"])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (1.0, "1"),
        (-0.0, "0"),
        (2.0**60, str(2**60)),
        (2**60 + 1, str(2**60 + 1)),
        (np.float64(3), "3"),
        (np.int64(3), "3"),
        (float("nan"), ""),
    ],
)
def test_integers_that_became_floats_are_integers(field: str, value: Any, name: str) -> None:
    assert getattr(to_example({"instruction": "i", "output": "o", field: value}, HERE), field) == name


def test_other_numbers_are_no_names() -> None:
    for value in (1.5, float("inf")):
        with pytest.raises(DataError, match=r"data.jsonl:7: field 'client' is a number; expected a string"):
            to_example({"instruction": "i", "output": "o", "client": value}, HERE)


# --- Texts alone ---


def test_a_text_alone_is_learnt_as_a_whole_when_asked_for() -> None:
    (example,) = told("output=text", {"text": "Once upon a time."})
    assert (example.instruction, example.output, example.alone) == ("", "Once upon a time.", True)
    with pytest.raises(
        DataError, match=r"no field 'instruction' or 'prompt'; found \['text'\], .*; --columns output=text learns"
    ):
        to_example({"text": "Once upon a time."}, HERE)


def test_a_response_beside_anything_else_is_no_text_alone() -> None:
    assert not told("output=text", {"text": "t", "instruction": "i"})[0].alone
    for other in ({"context": "x"}, {"input": ""}):
        with pytest.raises(DataError, match="no field 'instruction' or 'prompt'"):
            told("output=text", {"text": "t", **other})
    with pytest.raises(
        DataError, match=r"d\.jsonl:2: no field 'instruction' or 'prompt', which other records have; add it, or"
    ):
        told("output=text", {"text": "t", "instruction": "i"}, {"text": "t"})


# --- Conversations ---


def test_the_assistants_last_message_is_learnt_and_the_users_last_is_the_instruction() -> None:
    example = to_example({"messages": TALK, "category": 4, "client": "a"}, HERE)
    assert (example.instruction, example.output, example.category, example.client) == ("Name a fruit.", "An apple.", "4", "a")
    assert list(example.history) == TALK[:4]
    assert example.input == "System: Be brief.\n\nUser: Hi.\n\nAssistant: Hello."
    assert hash(example) == hash(to_example({"messages": TALK, "category": 4, "client": "a"}, HERE))


def test_two_messages_are_enough() -> None:
    example = to_example({"messages": TALK[3:]}, HERE)
    assert (example.instruction, example.input, example.output, example.fault) == ("Name a fruit.", "", "An apple.", "")


def test_a_record_with_an_instruction_and_a_response_is_no_conversation() -> None:
    assert to_example({"messages": TALK, "instruction": "i", "output": "o"}, HERE) == Example("i", "", "o", "")
    assert to_example({"messages": TALK, "instruction": "i", "output": ""}, HERE).output == "An apple."


SPELLINGS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TALK},
    "conversations": {"conversations": TALK},
    "ShareGPT": {
        "conversations": [
            {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]), "value": turn["content"]}
            for turn in TALK
        ]
    },
    "prompt and completion": {"prompt": TALK[:4], "completion": TALK[4:]},
    "prompt and text": {"prompt": TALK[:4], "completion": "An apple."},
    "parts": {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TALK]},
    "JSON text": {"messages": json.dumps(TALK)},
    "arrays of NumPy's": {"messages": np.array(TALK, object)},
    "columns": {"messages": {key: [turn[key] for turn in TALK] for key in ("role", "content")}},
    "nulls": {"messages": [{**turn, "name": None, "tool_calls": None} for turn in TALK], "instruction": None, "output": None},
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_conversation_is_the_same_however_it_is_written(name: str) -> None:
    assert to_example(SPELLINGS[name], HERE) == to_example({"messages": TALK}, HERE)


def test_tools_and_developers_turns_are_kept_and_are_text_elsewhere() -> None:
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "assistant", "content": "It is 3."},
    ]
    example = to_example({"messages": turns}, HERE)
    assert list(example.history) == [*turns[:2], {**turns[2], "content": ""}, turns[3]]
    assert (example.instruction, example.output) == ("Add.", "It is 3.")
    assert example.input == f"Developer: Be brief.\n\nAssistant: {json.dumps(call)}\n\nTool: 3"


def test_parts_of_text_are_lines() -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, TALK[4]]
    assert to_example({"messages": turns}, HERE).instruction == "a\nb"


@pytest.mark.parametrize(
    ("messages", "fault"),
    [
        (TALK[4:], "it has only a response"),
        (TALK[:4], "its last message is of the role 'user', so that there is no response to learn"),
        ([*TALK[:4], {"role": "assistant", "content": None, "tool_calls": [{}]}], "its last message calls a tool and has no"),
        ([{"role": "user", "content": [{"type": "image"}]}, TALK[4]], "message 1 has a part of type 'image', which is no text"),
    ],
)
def test_what_cannot_be_learnt_ends_no_run(messages: Any, fault: str) -> None:
    example = to_example({"messages": messages, "category": "c", "client": "a"}, HERE)
    assert example.fault.startswith(fault)
    assert (example.output, example.category, example.client, example.where) == ("", "c", "a", HERE)


def test_a_conversation_without_an_answer_is_dropped_as_any_record_without() -> None:
    for record in ({"messages": []}, {"messages": None}, {"messages": [*TALK[:4], {"role": "assistant", "content": None}]}):
        example = to_example(record, HERE)
        assert (example.output, example.fault) == ("", "")


def test_a_chat_template_gets_the_turns_and_the_others_their_text(own_tokenizer: PreTrainedTokenizerBase) -> None:
    own_tokenizer.chat_template = CHAT
    example = to_example({"messages": TALK}, HERE)
    chat, plain = (get_template(name)(example, own_tokenizer) for name in ("chat", "plain"))
    assert chat.prompt == "[system]Be brief.\n[user]Hi.\n[assistant]Hello.\n[user]Name a fruit.\n[assistant]"
    assert plain.prompt == (
        "Instruction:\nName a fruit.\n\nInput:\nSystem: Be brief.\n\nUser: Hi.\n\nAssistant: Hello.\n\nResponse:\n"
    )
    assert chat.response == plain.response == "An apple."


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi.", "field 'messages' is a string; expected a list of messages with 'role' and 'content'"),
        ({"a": 1}, "field 'messages' is an object; expected a list of messages with 'role' and 'content'"),
        (["Hi.", *TALK], r"message 1 of 'messages' is a string; expected an object with 'role' and 'content'"),
        (
            [{"content": "Hi."}, *TALK[3:]],
            r"message 1 of 'messages' has the role None; expected user, assistant, system, tool or",
        ),
        ([{"role": "user"}, *TALK[3:]], r"message 1 of 'messages' has no 'content'; expected an object"),
        ([*TALK[:4], {"role": "assistant", "content": 3}], r"message 5 of 'messages': field 'content' is a number"),
        ([*TALK[:4], {"role": "assistant", "content": "\ud800"}], r"message 5 of 'messages': field 'content' has half a surr"),
    ],
)
def test_a_bad_conversation_is_named(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        to_example({"messages": messages}, HERE)
    assert str(caught.value).startswith("data.jsonl:7: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Say a word", "chosen": "cat", "rejected": "dog"},
        {
            "instruction": "Say a word",
            "output": "cat",
            "rejected": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "dog"}],
        },
        {
            "prompt": "Say a word",
            "chosen": [{"role": "user", "content": "Say a word"}, {"role": "assistant", "content": "cat"}],
            "rejected": [{"role": "user", "content": "Say a word"}, {"role": "assistant", "content": "dog"}],
        },
    ],
    ids=["texts", "worse conversation", "conversations"],
)
def test_a_pair_has_a_worse_response(record):
    example = to_example(record, "d:1")
    assert (example.instruction, example.output, example.rejected) == ("Say a word", "cat", "dog")
    assert to_example({k: v for k, v in record.items() if k != "rejected"} | {"chosen": "cat"}, "d:1").rejected == ""


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{**TALK[0], "tool_calls": 5}, *TALK[1:]]}, "tool_calls that are a number; expected an array"),
        ({"messages": [{**TALK[0], "tool_calls": {"a": 1}}, *TALK[1:]]}, "tool_calls that are an object; expected an array"),
    ],
)
def test_tool_calls_are_an_array(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        to_example(record, HERE)


def test_a_category_is_a_number_of_any_length() -> None:
    record = {"instruction": "a", "output": "b", "category": 10**400}
    assert to_example(record, HERE).category == str(10**400)
