"""Conversations of any make, as chat templates take them: messages of OpenAI's kind, or ShareGPT's `from` and `value`."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedkseed.data.example import Turn
from fedkseed.data.values import TwiceError, absent, checked, kind, once, plain, texts_in
from fedkseed.errors import DataError

SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""What ShareGPT's speakers are called elsewhere. Any other role goes to the template as it is."""


class UnusableError(Exception):
    """A record that is well formed and yet cannot be learnt; it is dropped and counted, and the rest goes on."""


def read_turns(value: Any, name: str, where: str) -> tuple[Turn, ...]:
    """The messages of a conversation, whichever way they are written.

    Args:
        value: a list of messages, one such list as JSON text (as a CSV file has it), or a table of them (as older versions
            of datasets give it).
        name: the field's, for messages.
        where: file and line, for messages.

    Raises:
        DataError: it is none of these, or a message lacks its role or content.
        UnusableError: a message holds what is no text, such as an image.
    """
    try:
        messages = _listed(value)
    except TwiceError as error:
        raise DataError(f"{where}: field {name!r}: {error}") from None
    if messages is None:
        raise DataError(f"{where}: field {name!r} is {kind(value)}; expected a list of messages with 'role' and 'content'")
    return tuple(
        _turn(message, f"{where}: message {number} of {name!r}", number) for number, message in enumerate(messages, start=1)
    )


def _listed(value: Any) -> Sequence[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value, object_pairs_hook=once)
        except TwiceError:
            raise
        except (ValueError, RecursionError):
            return None
    if isinstance(value, Mapping) and all(isinstance(column, (list, tuple)) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) == 1:
            value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    return value if isinstance(value, (list, tuple)) else None


def _turn(message: Any, where: str, number: int) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is {kind(message)}; expected an object with 'role' and 'content'")
    given = {str(key): plain(value) for key, value in message.items() if not absent(value)}
    speaker = given.pop("from", None)
    role = given.pop("role", SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker)
    if not isinstance(role, str):
        raise DataError(f"{where} has the role {role!r}; expected user, assistant, system, tool or another name")
    for name, item in {"role": role, **given}.items():
        for text in texts_in([name, item] if name not in ("content", "value") else name):  # a part of content may be no text
            checked(text, name, where)
    if "content" not in message and "value" not in message and not given.get("tool_calls"):
        raise DataError(f"{where} has no 'content'; expected an object with 'role' and 'content'")
    value = given.pop("value", None)
    content = given.pop("content", value)
    if isinstance(content, (list, tuple)):
        content = "\n".join(_part(part, where, number) for part in content)
    if calls := given.pop("tool_calls", None):
        if not isinstance(calls, (list, tuple)):
            raise DataError(f"{where} has tool_calls that are {kind(calls)}; expected an array")
        given["tool_calls"] = calls
    return {"role": role, "content": "" if content is None else checked(content, "content", where), **given}


def _part(part: Any, where: str, number: int) -> str:
    if isinstance(part, Mapping):
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            raise UnusableError(f"message {number} has a part of type {part.get('type')!r}, which is no text")
        part = part["text"]
    return checked(part, "content", where)


def text_of(turn: Turn) -> str:
    """What a message says, for templates of plain text; the calls of tools in it as JSON."""
    calls = [json.dumps(call, ensure_ascii=False, default=str) for call in turn.get("tool_calls", ())]
    return "\n".join([*([turn["content"]] if turn["content"] else []), *calls])


def split(turns: Sequence[Turn]) -> tuple[str, str, str]:
    """A conversation as (instruction, input, response): the user's last text, the other messages as text, the last message.

    Raises:
        UnusableError: it does not end with a text of the assistant's that follows something.
    """
    *before, last = turns
    if last["role"] != "assistant":
        raise UnusableError(f"its last message is of the role {last['role']!r}, so that there is no response to learn")
    if not last["content"] and last.get("tool_calls"):
        raise UnusableError("its last message calls a tool and has no text to learn")
    if not before:
        raise UnusableError("it has only a response")
    asked = max((i for i, turn in enumerate(before) if turn["role"] == "user"), default=None)
    others = [turn for i, turn in enumerate(before) if i != asked]
    text = "\n\n".join(f"{turn['role'].capitalize()}: {text_of(turn)}" for turn in others)
    return "" if asked is None else text_of(before[asked]), text, last["content"]
