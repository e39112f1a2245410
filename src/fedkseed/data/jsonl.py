"""A jsonl file of instruction records: one JSON object a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedkseed.data.example import Example
from fedkseed.errors import DataError

INSTRUCTION = ("instruction",)
INPUT = ("input", "context")
OUTPUT = ("output", "response")
CATEGORY = ("category",)
CLIENT = ("client",)


def read_jsonl(path: str | Path) -> list[Example]:
    """The records of a file, in its order.

    Fields: `instruction`; `input` or `context` (optional); `output` or `response`; `category` and `client` (optional). Of
    two names for one field the first that is present counts. Other fields and blank lines are ignored. An empty response
    is kept: encoding drops the record and counts it.

    Raises:
        DataError: no such file, no records in it, or a line that is not UTF-8, not a JSON object, lacks a field or has
            one that is not a string; the message names the file and the line.
    """
    path = Path(path)
    examples = [_example(line, f"{path}:{number}") for number, line in _lines(path) if line.strip()]
    if not examples:
        raise DataError(f"{path}: no records; expected one JSON object a line with 'instruction' and 'response'")
    return examples


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines and their numbers, from 1. Bytes, because only a line feed ends a record, not U+2028 within a string."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path of the data") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a jsonl file") from None


def _example(line: bytes, where: str) -> Example:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); expected one object a line, so mend or delete the line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {_kind(record)}; expected an object with 'instruction' and 'response'")
    return Example(
        instruction=_field(record, INSTRUCTION, where),
        input=_field(record, INPUT, where, default=""),
        output=_field(record, OUTPUT, where),
        category=_field(record, CATEGORY, where, default=""),
        client=_field(record, CLIENT, where, default=""),
    )


def _field(record: dict[str, Any], names: tuple[str, ...], where: str, default: str | None = None) -> str:
    name = next((name for name in names if name in record), None)
    if name is None:
        if default is None:
            wanted = " or ".join(repr(name) for name in names)
            raise DataError(f"{where}: no field {wanted}; found {sorted(record)}, so add it or rename the field that has it")
        return default
    value = record[name]
    if not isinstance(value, str):
        raise DataError(f'{where}: field {name!r} is a JSON {_kind(value)}; expected a string ("" where there is nothing)')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: field {name!r} has half a surrogate pair, which no text has; delete that escape") from None
    return value


def _kind(value: object) -> str:
    """What JSON calls a value of this type."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
