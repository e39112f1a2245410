"""A record of any source, seen as field names and values, becomes an `Example`."""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fedkseed.data.columns import COLUMNS, Columns, listed
from fedkseed.data.conversation import UnusableError, read_turns, split
from fedkseed.data.example import Example, Turn
from fedkseed.data.values import checked, filled, named, plain
from fedkseed.errors import DataError
from fedkseed.text import nearest

Row = tuple[str, Mapping[str, Any]]
"""(where, record): file and line, for messages; field names and values."""


def to_examples(rows: Iterable[Row], source: str, columns: Columns = COLUMNS, needless: Collection[str] = ()) -> list[Example]:
    """The examples of a source's records, in their order.

    Args:
        rows: all of its records.
        source: its name, for messages.
        columns: what its fields are called.
        needless: fields that it need not have though `columns` names them.

    Raises:
        DataError: there is no record, a column that `columns` names is in none, or see `to_example`.
    """
    examples: list[Example] = []
    shapes: dict[tuple[Any, ...], None] = {}
    for where, record in rows:
        shapes[tuple(record)] = None
        examples.append(to_example(record, where, columns))
    if not examples:
        raise DataError(f"{source}: no records; expected some with an instruction and a response")
    columns.check((key for shape in shapes for key in shape), source, needless)
    stray = next((example for example in examples if example.alone), None)
    if stray is not None and not all(example.alone for example in examples):
        raise DataError(
            f"{stray.where}: no field {_either(columns, 'instruction')}, which other records have; add it, or delete the record"
        )
    return examples


def to_example(record: Mapping[str, Any], where: str, columns: Columns = COLUMNS) -> Example:
    """An example from a record.

    Null, NaN and blank values count as absent; of several columns that may hold a field the first that holds something is
    taken. A record with `messages` whose instruction or response is absent is a conversation: its last message, the
    assistant's, is to be learnt. So is one whose prompt is a list of messages. A response column that the user named,
    without any instruction or input, is learnt as a whole. `rejected` is a worse response. Other
    fields are ignored. What cannot be learnt, such as an empty
    response, is kept: encoding drops the record and counts it.

    Args:
        record: field names and values.
        where: file and line, for messages.
        columns: what the fields are called.

    Raises:
        DataError: a field is missing or of the wrong type; the message names where and the field.
    """
    fields = _Fields(record, where, columns)
    category, client = fields.name("category"), fields.name("client")
    try:
        turns = fields.turns()
        instruction, text, output = split(turns) if turns else fields.texts()
        rejected = fields.rejected()
    except UnusableError as error:
        return Example("", "", "", category, client, fault=str(error), where=where)
    alone = not turns and fields.alone
    return Example(instruction, text, output, category, client, history=turns[:-1], alone=alone, rejected=rejected, where=where)


class _Fields:
    """A record's values by our names of its fields."""

    def __init__(self, record: Mapping[str, Any], where: str, columns: Columns) -> None:
        self._found, self._where, self._columns = list(map(str, record)), where, columns
        self._keys: dict[str, str] = {}  # of the fields that have a column
        self._values: dict[str, Any] = {}  # of those that hold something
        for field, keys in columns.find(tuple(record)).items():
            for key in keys:
                self._keys.setdefault(field, str(key))
                value = plain(record[key])
                if filled(value):
                    self._keys[field], self._values[field] = str(key), value
                    break

    @property
    def alone(self) -> bool:
        """Whether the response is all that there is, on purpose."""
        told = self._columns.tells("output") and not self._columns.tells("instruction")
        return told and self._keys.keys().isdisjoint(("instruction", "input"))

    def name(self, field: str) -> str:
        """A category or client, blanks at its ends or in a row not counting; "" where there is none."""
        return " ".join(named(self._values[field], self._keys[field], self._where).split()) if field in self._values else ""

    def turns(self) -> tuple[Turn, ...]:
        """The conversation that the record holds; empty if it holds none."""
        asked, answered = self._values.get("instruction"), self._values.get("output")
        if isinstance(answered, (list, tuple)) and "rejected" in self._keys:  # pairs of whole conversations
            return self._turns("output")
        if isinstance(asked, (list, tuple)) and answered is not None:
            last: tuple[Turn, ...] = (
                ({"role": "assistant", "content": self._text("output")},) if isinstance(answered, str) else ()
            )
            return (*self._turns("instruction"), *(last or self._turns("output")))
        wholly = asked is not None or (self._columns.tells("output") and not self._columns.tells("messages"))
        if "messages" not in self._values or (answered is not None and wholly):
            return ()
        return self._turns("messages")

    def rejected(self) -> str:
        """The worse response, alone or as the last message of a conversation; "" where there is none."""
        value = self._values.get("rejected")
        return split(self._turns("rejected"))[2] if isinstance(value, (list, tuple)) else self._text("rejected")

    def texts(self) -> tuple[str, str, str]:
        """Instruction, input and output of a record that is no conversation."""
        for field in ("output",) if self.alone else ("instruction", "output"):
            if field not in self._keys and "messages" not in self._keys:
                hint = nearest(self._columns.names(field), self._found)
                if not hint and "output" not in self._keys and "text" in self._found:
                    hint = "--columns output=text learns texts as a whole"
                elif not hint and re.search(r"\.[ct]sv\b", self._where):
                    hint = "the first line of such a file names its columns"
                raise DataError(
                    f"{self._where}: no field {_either(self._columns, field)}; found {listed(self._found)}, so add it, or say "
                    f"with --columns what it is called, such as {field}=NAME{hint and '; '}{hint}"
                )
        return self._text("instruction"), self._text("input"), self._text("output")

    def _text(self, field: str) -> str:
        return checked(self._values[field], self._keys[field], self._where) if field in self._values else ""

    def _turns(self, field: str) -> tuple[Turn, ...]:
        return read_turns(self._values[field], self._keys[field], self._where)


def _either(columns: Columns, field: str) -> str:
    return " or ".join(map(repr, columns.names(field)))
