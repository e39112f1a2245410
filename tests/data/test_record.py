"""A record of any source: what its fields may be called, conversations, and the one line to each thing it may not be."""

from typing import Any

import pytest
from tests.support.tiny import CHAT
from transformers import PreTrainedTokenizerBase

from fedkseed.data import COLUMNS, Example, get_template, parse_columns
from fedkseed.data.record import to_example
from fedkseed.errors import DataError, InvalidValueError

HERE = "data.jsonl:7"
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi."},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Name a fruit."},
    {"role": "assistant", "content": "An apple."},
]


def without(place: int) -> list[dict[str, str]]:
    return TALK[:place] + TALK[place + 1 :]


# --- Fields ---


def test_all_fields() -> None:
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
    assert parse_columns("messages=turns") == {**COLUMNS, "messages": ("turns",)}


def test_a_renamed_field_goes_by_no_other_name() -> None:
    with pytest.raises(
        DataError, match=r"no field 'answer'; found \['instruction', 'output'\], so add it, or say with --columns"
    ):
        to_example({"instruction": "i", "output": "o"}, HERE, parse_columns("output=answer"))


@pytest.mark.parametrize("text", ["", "instruction", "instruction=", "=question", "question=instruction", "output=a,,input=b"])
def test_columns_that_say_nothing_are_refused(text: str) -> None:
    with pytest.raises(
        InvalidValueError, match=r"columns has '.*'; expected field=column, such as .* with fields of: instruction,"
    ):
        parse_columns(text)


# --- Conversations ---


def test_the_assistants_last_message_is_learnt_and_the_users_last_is_the_instruction() -> None:
    example = to_example({"messages": TALK, "category": 4, "client": "a"}, HERE)
    assert (example.instruction, example.output, example.category, example.client) == ("Name a fruit.", "An apple.", "4", "a")
    assert example.history == (("system", "Be brief."), ("user", "Hi."), ("assistant", "Hello."))
    assert example.input == "System: Be brief.\n\nUser: Hi.\n\nAssistant: Hello."


def test_two_messages_are_enough() -> None:
    assert to_example({"messages": TALK[3:]}, HERE) == Example("Name a fruit.", "", "An apple.", "")


def test_a_record_with_an_instruction_is_no_conversation() -> None:
    assert to_example({"messages": TALK, "instruction": "i", "output": "o"}, HERE) == Example("i", "", "o", "")


def test_a_chat_template_gets_the_turns_and_the_others_their_text(own_tokenizer: PreTrainedTokenizerBase) -> None:
    own_tokenizer.chat_template = CHAT
    example = to_example({"messages": TALK}, HERE)
    assert get_template("chat")(example, own_tokenizer) == (
        "[system]Be brief.\n[user]Hi.\n[assistant]Hello.\n[user]Name a fruit.\n[assistant]",
        "An apple.",
    )
    assert get_template("plain")(example, own_tokenizer) == (
        "Instruction:\nName a fruit.\n\nInput:\nSystem: Be brief.\n\nUser: Hi.\n\nAssistant: Hello.\n\nResponse:\n",
        "An apple.",
    )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hi.", "field 'messages' is no list of at least two messages; expected a user's and an assistant's"),
        ([], "field 'messages' is no list of at least two messages"),
        (TALK[4:], "field 'messages' is no list of at least two messages"),
        (TALK[:4], r"the last messages of 'messages' are 'assistant', 'user'; expected 'user', 'assistant'"),
        (without(3), r"the last messages of 'messages' are 'assistant', 'assistant'; expected 'user', 'assistant'"),
        (["Hi.", *TALK], r"message 1 of 'messages' is a string; expected an object with 'role' and 'content'"),
        (
            [*TALK[:1], {"role": "tool", "content": ""}, *TALK[3:]],
            r"message 2 of 'messages' has the role 'tool'; expected one of",
        ),
        (
            [{"content": "Hi."}, *TALK[3:]],
            r"message 1 of 'messages' has the role None; expected one of system, user, assistant",
        ),
        ([{"role": "user"}, *TALK[3:]], r"message 1 of 'messages' has no 'content'; expected an object"),
        ([*TALK[:4], {"role": "assistant", "content": None}], r"message 5 of 'messages': field 'content' is a null"),
        ([*TALK[:4], {"role": "assistant", "content": "\ud800"}], r"message 5 of 'messages': field 'content' has half a surr"),
    ],
)
def test_a_bad_conversation_is_named(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        to_example({"messages": messages}, HERE)
    assert str(caught.value).startswith("data.jsonl:7: ")
    assert "\n" not in str(caught.value)
