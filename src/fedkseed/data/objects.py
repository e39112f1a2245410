"""Records that are Python objects already: lists of dicts, data frames, datasets."""

from collections.abc import Iterable, Mapping
from typing import Any

from fedkseed.data.columns import COLUMNS, Columns
from fedkseed.data.example import Example
from fedkseed.data.record import to_examples
from fedkseed.errors import DataError


def read_records(source: Any, columns: Columns = COLUMNS, name: str = "data") -> list[Example]:
    """The examples of records that are objects.

    Args:
        source: dicts in a list or anything else to iterate over, such as a `datasets.Dataset`; or a DataFrame of pandas or
            polars; or a table of pyarrow. Examples stay as they are.
        columns: what the fields are called.
        name: what messages call the source.

    Raises:
        DataError: it is none of these, has no record, or a record cannot be used; the message names its number.
    """
    rows = list(_rows(source, name))
    if rows and all(isinstance(row, Example) for row in rows):
        return rows
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}, record {number} is of type {type(row).__name__}; expected a dict")
    return to_examples(((f"{name}, record {number}", row) for number, row in enumerate(rows, start=1)), name, columns)


def _rows(source: Any, name: str) -> Iterable[Any]:
    rows: Any = source
    if hasattr(source, "notna") and hasattr(source, "to_dict"):  # pandas, whose own kinds of gaps become None
        frame = source.astype(object)
        rows = frame.where(frame.notna(), None).to_dict("records")
    for method in ("to_dicts", "to_pylist"):  # polars, pyarrow
        if hasattr(source, method):
            rows = getattr(source, method)()
    if isinstance(rows, (Mapping, str, bytes)) or not isinstance(rows, Iterable):
        parts = list(rows)[:5] if isinstance(rows, Mapping) else []
        hint = f"; choose one of its parts, such as {parts[0]!r}" if parts else ""
        raise DataError(f"{name} is of type {type(source).__name__}; expected a list of dicts, a DataFrame or a dataset{hint}")
    return rows
