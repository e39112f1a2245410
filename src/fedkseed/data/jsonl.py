"""Records as JSON: one object a line, or an array of objects, which may be a value of an object such as {"data": [...]}."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedkseed.data.columns import COLUMNS, Columns
from fedkseed.data.compression import read_bytes
from fedkseed.data.record import Row
from fedkseed.data.values import kind, once
from fedkseed.errors import DataError

EXPECTED = "expected one object a line, so mend or delete the line"


def json_rows(path: Path, columns: Columns = COLUMNS) -> Iterator[Row]:
    """The records of a file, in its order; blank lines are ignored.

    A file that begins with [ is an array. One that is a single object is an array's, if a value of it is a list of objects
    and no key of it is a record's (of several such lists the one called data counts); else it is a record.

    Args:
        path: of a file, maybe a compressed one.
        columns: what the fields are called, which tells a record from an object that holds records.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8, not JSON or no object; the message names the file and
            the line.
    """
    content = read_bytes(path).removeprefix(b"\xef\xbb\xbf")
    start = content[:4096].lstrip()[:1]
    if start == b"[":
        yield from _array(_whole(content, path), str(path))
        return
    # only a line feed ends a record, not U+2028 within a string
    lines = ((f"{path}:{number}", line) for number, line in enumerate(io.BytesIO(content), start=1) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    try:
        record = _record(*first)
    except DataError as error:
        yield from _spread(content, path, columns, error)
        return
    second = next(lines, None)
    if second is None:
        yield from _array_in(record, str(path), columns) or [(first[0], record)]
        return
    yield first[0], record
    yield second[0], _record(*second)
    for where, line in lines:
        yield where, _record(where, line)


def _record(where: str, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); {EXPECTED}") from None
    return _checked(record, where)


def _checked(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: {kind(record)}; expected an object with 'instruction' and 'response'")
    return record


def _whole(content: bytes, path: Path) -> Any:
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON ({error.msg}); expected an array of objects, so mend it") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error}); expected an array of objects, so mend it") from None


def _array(values: Any, where: str) -> Iterator[Row]:
    for number, value in enumerate(values, start=1):
        yield f"{where}, record {number}", _checked(value, f"{where}, record {number}")


def _spread(content: bytes, path: Path, columns: Columns, error: DataError) -> Iterator[Row]:
    """The records of a file that is one JSON object over several lines; raises what is wrong with its first line if it is
    not even that."""
    try:
        value = _whole(content, path)
    except DataError:
        raise error from None
    if not isinstance(value, dict):
        raise error
    yield from _array_in(value, str(path), columns) or [(str(path), value)]


def _array_in(value: Mapping[str, Any], where: str, columns: Columns) -> list[Row]:
    """The records in a value of an object; none if the object is a record itself."""
    if any(columns.find(tuple(value)).values()):
        return []
    lists = {key: items for key, items in value.items() if isinstance(items, list) and items and isinstance(items[0], dict)}
    if len(lists) > 1 and "data" not in lists:
        raise DataError(f"{where}: has several lists of objects, {sorted(lists)}; keep one, or call it 'data'")
    name = "data" if "data" in lists else next(iter(lists), None)
    return [] if name is None else list(_array(lists[name], f"{where}, {name}"))
