"""Records in tables: CSV files, parquet files, Hugging Face datasets. Parquet and datasets need the extra `datasets`."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
        content = path.read_bytes()
        text = content.decode("utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); expected a CSV file") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    reader = csv.DictReader(
        io.StringIO(text, newline=""), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
    )
    try:
        rows = [(f"{path}:{reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num + 1}: not CSV ({error}); mend the row's quotes") from None
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

    It comes from the hub, or from the local cache where the hub is out of reach.

    Raises:
        DataError: the extra is not installed, the dataset is out of reach, no records, a missing column.
    """
    name, _, split = source.partition(":")

    def load() -> Any:
        import datasets
        from huggingface_hub import dataset_info

        try:
            dataset_info(name, timeout=10)  # asks once, where datasets would try for half a minute
        except Exception as refusal:
            with _offline(datasets.config):
                try:
                    return datasets.load_dataset(name, split=split or "train")
                except ConnectionError:  # nor does the cache have it
                    raise refusal from None
        return datasets.load_dataset(name, split=split or "train")

    return _examples(_numbered(_load(load, source, "a dataset's hub id, and the network"), source), source, columns)


@contextmanager
def _offline(config: Any) -> Iterator[None]:
    """datasets as if HF_HUB_OFFLINE were set: only its cache counts."""
    before, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


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
