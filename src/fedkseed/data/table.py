"""Records in tables: CSV files, parquet files, Hugging Face datasets. Parquet and datasets need the extra `datasets`."""

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fedkseed.data.example import Example
from fedkseed.data.record import COLUMNS, Columns, to_example
from fedkseed.errors import DataError


def read_csv(path: str | Path, columns: Columns = COLUMNS) -> list[Example]:
    """The records of a CSV file (or TSV, by its name) whose first row names the columns.

    Raises:
        DataError: no such file, not UTF-8, no records, a row of another length than the first, a missing column; the
            message names the file and the line.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
            rows = [(f"{path}:{reader.line_num}", row) for row in reader]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a CSV file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8") from None
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: not CSV ({error}); mend the row's quotes") from None
    for where, row in rows:
        if None in row or None in row.values():
            raise DataError(f"{where}: the row has other columns than the first row names; mend its commas and quotes")
    return _examples(rows, str(path), columns)


def read_parquet(path: str | Path, columns: Columns = COLUMNS) -> list[Example]:
    """The records of a parquet file.

    Raises:
        DataError: the extra is not installed, the file cannot be read, no records, a missing column.
    """

    def load() -> list[dict[str, Any]]:
        from pyarrow import parquet

        rows: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
        return rows

    return _examples(_numbered(_load(load, str(path), "a parquet file"), str(path)), str(path), columns)


def read_hub(source: str, columns: Columns = COLUMNS) -> list[Example]:
    """The records of a Hugging Face dataset: `owner/name`, or `owner/name:split` for another split than `train`.

    It comes from the local cache where it is there, else from the hub.

    Raises:
        DataError: the extra is not installed, the dataset is out of reach, no records, a missing column.
    """
    name, _, split = source.partition(":")

    def load() -> Any:
        from datasets import load_dataset

        return load_dataset(name, split=split or "train")

    return _examples(_numbered(_load(load, source, "a dataset's hub id, and the network"), source), source, columns)


def _load(load: Callable[[], Any], source: str, expected: str) -> Any:
    try:
        return load()
    except ImportError as error:
        raise DataError(f"{source} needs an extra; install it with: pip install 'fedkseed[datasets]'") from error
    except Exception as error:  # of pyarrow, datasets, the hub's library or whichever HTTP library these use
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= 160 else reason[:157] + "..."
        raise DataError(
            f"{source}: cannot be read ({reason}); expected {expected}, so check the name or give a jsonl file"
        ) from None


def _numbered(rows: Iterable[Mapping[str, Any]], source: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    return ((f"{source}, record {number}", row) for number, row in enumerate(rows, start=1))


def _examples(rows: Iterable[tuple[str, Mapping[str, Any]]], source: str, columns: Columns) -> list[Example]:
    examples = [to_example(row, where, columns) for where, row in rows]
    if not examples:
        raise DataError(f"{source}: no records; expected rows with an instruction and a response")
    return examples
