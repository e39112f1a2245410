"""Records in tables: CSV files, parquet and Arrow files, what datasets saved, datasets of the hub. All but CSV need the
extra `datasets`."""

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedkseed.data.compression import kind_of, read_bytes
from fedkseed.data.record import Row
from fedkseed.errors import DataError, installing
from fedkseed.text import one_line

LONGEST_FIELD = 2**31 - 1
"""In characters, of a CSV file: as many as the csv module can be told on every machine; by itself it takes 131,072."""


def csv_rows(path: Path) -> Iterator[Row]:
    """The records of a CSV file (or TSV, by its name) whose first row names the columns.

    Raises:
        DataError: the file cannot be read, is not UTF-8, names a column twice, or has a row of another length than the
            first; the message names the file and the line.
    """
    content = read_bytes(path)
    try:
        text = content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)
    rows: list[tuple[str, list[str]]] = []
    done = 0
    try:
        with _long_fields():
            for row in reader:
                done = reader.line_num
                if row:  # else it is a blank line
                    rows.append((f"{path}:{done}", row))
    except csv.Error as error:
        raise DataError(f"{path}:{done + 1}: not CSV ({error}); mend the row's quotes") from None
    head, columns = rows.pop(0) if rows else (f"{path}", [])
    _check_once([name.strip() for name in columns], head)
    for where, row in rows:
        if len(row) != len(columns):
            raise DataError(f"{where}: the row has other columns than the first row names; mend its commas and quotes")
    yield from ((where, dict(zip(columns, row, strict=True))) for where, row in rows)


@contextmanager
def _long_fields() -> Iterator[None]:
    """The csv module takes fields of any length; what it took before is put back."""
    before = csv.field_size_limit(LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def parquet_rows(path: Path) -> Iterator[Row]:
    """The records of a parquet file.

    Raises:
        DataError: the extra is not installed, or the file cannot be read.
    """
    content = read_bytes(path)

    def load() -> list[dict[str, Any]]:
        from pyarrow import BufferReader, parquet

        rows: list[dict[str, Any]] = parquet.read_table(BufferReader(content)).to_pylist()
        return rows

    return _numbered(_load(load, str(path), "a parquet file"), str(path))


def arrow_rows(path: Path) -> Iterator[Row]:
    """The records of an Arrow file: a stream, as datasets keeps its tables, or a file with an index, as Feather has it.

    Raises:
        DataError: the extra is not installed, or the file cannot be read.
    """
    content = read_bytes(path)

    def load() -> list[dict[str, Any]]:
        from pyarrow import BufferReader, ipc

        open_table = ipc.open_file if content.startswith(b"ARROW1") else ipc.open_stream
        table = open_table(BufferReader(content)).read_all()
        names.extend(table.column_names)
        rows: list[dict[str, Any]] = table.to_pylist()
        return rows

    names: list[str] = []
    rows = _load(load, str(path), "an Arrow file")
    _check_once(names, str(path))
    return _numbered(rows, str(path))


def _check_once(names: list[str], where: str) -> None:
    """Refuse columns of one name: nobody knows which of them is meant."""
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(f"{where}: two columns are called {twice[0]!r}; give each its own name")


def is_saved(folder: Path) -> bool:
    """Whether datasets saved a dataset, or several splits of one, into a folder."""
    return (folder / "dataset_dict.json").is_file() or ((folder / "state.json").is_file() and _has_arrow(folder))


def _has_arrow(folder: Path) -> bool:
    return next(folder.glob("*.arrow"), None) is not None


def saved_rows(folder: Path) -> Iterator[Row]:
    """The records of what `datasets.save_to_disk` wrote; of several splits those of `train`, or of the only one.

    Raises:
        DataError: the extra is not installed, the folder cannot be read, or which split is not clear.
    """

    def load() -> Any:
        import datasets

        return datasets.load_from_disk(str(folder))

    data = _load(load, str(folder), "what datasets saved")
    if isinstance(data, dict):
        name = "train" if "train" in data else next(iter(data)) if len(data) == 1 else None
        if name is None:
            raise DataError(
                f"{folder}: has the splits {sorted(data)} and no 'train'; give the folder of one, such as {folder / min(data)}"
            )
        data = data[name]
    return _numbered(data, str(folder))


def hub_rows(source: str) -> Iterator[Row]:
    """The records of a Hugging Face dataset: `owner/name`, or `owner/name:split` for another split than `train`.

    It comes from the hub, or from the local cache where the hub is out of reach.

    Raises:
        DataError: the extra is not installed, or the dataset is out of reach.
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

    return _numbered(_load(load, source, "a dataset's hub id, and the network"), source)


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
        raise DataError(f"{source} needs an extra; install it with: {installing('datasets')}") from error
    except Exception as error:  # of pyarrow, datasets, the hub's library or whichever HTTP library these use
        raise DataError(
            f"{source}: cannot be read ({one_line(error)}); expected {expected}, so check the name or give a jsonl file"
        ) from None


def _numbered(rows: Iterable[Mapping[str, Any]], source: str) -> Iterator[Row]:
    return ((f"{source}, record {number}", row) for number, row in enumerate(rows, start=1))
