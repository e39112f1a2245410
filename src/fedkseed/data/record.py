"""A record of any source, seen as field names and values, becomes an `Example`."""

from collections.abc import Mapping
from typing import Any

from fedkseed.data.example import Example, Turn
from fedkseed.errors import DataError, InvalidValueError

Columns = Mapping[str, tuple[str, ...]]
"""For each of our fields the names that it may have in a source; of those present the first counts."""

COLUMNS: Columns = {
    "instruction": ("instruction",),
    "input": ("input", "context"),
    "output": ("output", "response"),
    "category": ("category",),
    "client": ("client",),
    "messages": ("messages",),
}
"""What the fields are called unless told otherwise."""

ROLES = ("system", "user", "assistant")


def parse_columns(text: str) -> Columns:
    """The columns that `instruction=question,output=answer` says; fields that it leaves out keep their usual names.

    Raises:
        InvalidValueError: a part that is not field=column, or an unknown field.
    """
    chosen = dict(COLUMNS)
    for part in text.split(","):
        field, equals, column = (piece.strip() for piece in part.partition("="))
        if not (equals and column) or field not in COLUMNS:
            raise InvalidValueError(
                f"columns has {part.strip()!r}; expected field=column, such as instruction=question,output=answer, "
                f"with fields of: {', '.join(COLUMNS)}"
            )
        chosen[field] = (column,)
    return chosen


def to_example(record: Mapping[str, Any], where: str, columns: Columns = COLUMNS) -> Example:
    """An example from a record.

    `instruction` and `output` are needed, unless the record has `messages`: a conversation whose last message, the
    assistant's, is what is to be learnt, and whose last but one is the instruction. An input, category or client that is
    missing or null is "". Other fields are ignored. An empty response is kept: encoding drops the record and counts it.

    Args:
        record: field names and values.
        where: file and line, for messages.
        columns: see `Columns`.

    Raises:
        DataError: a field is missing or of the wrong type; the message names where and the field.
    """
    if _present(record, columns["messages"]) and not _present(record, columns["instruction"]):
        return _conversation(record, where, columns)
    return Example(
        instruction=_text(record, columns["instruction"], where),
        input=_optional(record, columns["input"], where),
        output=_text(record, columns["output"], where),
        category=_name(record, columns["category"], where),
        client=_name(record, columns["client"], where),
    )


def _conversation(record: Mapping[str, Any], where: str, columns: Columns) -> Example:
    name = _present(record, columns["messages"])
    messages = record[name]
    if not isinstance(messages, (list, tuple)) or len(messages) < 2:
        raise DataError(f"{where}: field {name!r} is no list of at least two messages; expected a user's and an assistant's")
    turns = [_turn(message, f"{where}: message {number} of {name!r}") for number, message in enumerate(messages, start=1)]
    for place, expected in ((-1, "assistant"), (-2, "user")):
        if turns[place][0] != expected:
            raise DataError(
                f"{where}: the last messages of {name!r} are {turns[-2][0]!r}, {turns[-1][0]!r}; expected 'user', 'assistant': "
                "the assistant's last text is what is learnt"
            )
    history = tuple(turns[:-2])
    return Example(
        instruction=turns[-2][1],
        input="\n\n".join(f"{role.capitalize()}: {text}" for role, text in history),
        output=turns[-1][1],
        category=_name(record, columns["category"], where),
        client=_name(record, columns["client"], where),
        history=history,
    )


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is a {kind(message)}; expected an object with 'role' and 'content'")
    role = message.get("role")
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; expected one of {', '.join(ROLES)}")
    if "content" not in message:
        raise DataError(f"{where} has no 'content'; expected an object with 'role' and 'content'")
    return role, checked(message["content"], "content", where)


def _present(record: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((name for name in names if name in record), "")


def _text(record: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    name = _present(record, names)
    if not name:
        wanted = " or ".join(repr(name) for name in names)
        raise DataError(
            f"{where}: no field {wanted}; found {sorted(record)}, so add it, or say with --columns what it is called"
        )
    return checked(record[name], name, where)


def _optional(record: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    name = _present(record, names)
    return "" if not name or record[name] is None else checked(record[name], name, where)


def _name(record: Mapping[str, Any], names: tuple[str, ...], where: str) -> str:
    """As `_optional`, but many datasets number their categories."""
    name = _present(record, names)
    if name and isinstance(record[name], int) and not isinstance(record[name], bool):
        return str(record[name])
    return _optional(record, names, where)


def checked(value: Any, name: str, where: str) -> str:
    """A field's value, once it is known to be a text.

    Raises:
        DataError: it is none; the message names where and the field.
    """
    if not isinstance(value, str):
        raise DataError(f'{where}: field {name!r} is a {kind(value)}; expected a string ("" where there is nothing)')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: field {name!r} has half a surrogate pair, which no text has; delete that escape") from None
    return value


def kind(value: object) -> str:
    """What a value's type is called in JSON."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
