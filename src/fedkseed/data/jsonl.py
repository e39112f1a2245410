"""A jsonl file of instruction records: one JSON object a line."""

import json
from collections.abc import Iterator
from pathlib import Path

from fedkseed.data.example import Example
from fedkseed.data.record import COLUMNS, Columns, kind, to_example
from fedkseed.errors import DataError


def read_jsonl(path: str | Path, columns: Columns = COLUMNS) -> list[Example]:
    """The records of a file, in its order; blank lines are ignored. What a record has: see `fedkseed.data.record`.

    Raises:
        DataError: no such file, no records in it, or a line that is not UTF-8, not a JSON object, lacks a field or has
            one that is not a string; the message names the file and the line.
    """
    path = Path(path)
    examples = [_example(line, f"{path}:{number}", columns) for number, line in _lines(path) if line.strip()]
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


def _example(line: bytes, where: str, columns: Columns) -> Example:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); expected one object a line, so mend or delete the line") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {kind(record)}; expected an object with 'instruction' and 'response'")
    return to_example(record, where, columns)
