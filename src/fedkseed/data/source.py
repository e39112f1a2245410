"""Whatever `--data` may name: files of records, a glob or folder of them, Natural Instructions, a Hugging Face dataset."""

import glob
import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

from fedkseed.data.columns import COLUMNS, Columns, parse_columns
from fedkseed.data.compression import SUFFIXES, kind_of
from fedkseed.data.example import Example
from fedkseed.data.jsonl import json_rows
from fedkseed.data.natural_instructions import is_natural_instructions, read_tasks
from fedkseed.data.record import Row, to_examples
from fedkseed.data.table import arrow_rows, csv_rows, hub_rows, is_saved, parquet_rows, saved_rows
from fedkseed.errors import DataError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
GLOB = re.compile(r"[*?\[]")
TABLES: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".csv": csv_rows,
    ".tsv": csv_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".feather": arrow_rows,
}
KINDS = (*TABLES, ".jsonl", ".ndjson", ".json")
"""What files of records are called, perhaps with .gz and the like behind it: those that a folder of files is read for."""
FILES = (*KINDS, ".txt", *SUFFIXES)
"""Ends of a name that no hub id has, which may have a dot in its name too, such as owner/name-2.5."""


def is_hub_id(source: str) -> bool:
    """Whether a text can be a dataset's id on the Hugging Face hub: owner/name, perhaps with :split, and no file's name."""
    return HUB_ID.fullmatch(source) is not None and not source.lower().endswith(FILES)


def source_digest(source: str) -> str:
    """SHA-256 (hex) of what local files of a source hold and are called; of a hub's dataset of its name alone.

    Raises:
        DataError: there is nothing of that name, or it cannot be read.
    """
    digest = hashlib.sha256()
    with _enterable(source):
        parts = [source] if is_natural_instructions(Path(source)) else _parts(source)
        for part in parts:
            folder = Path(part)
            files = sorted(folder.rglob("*")) if folder.is_dir() else _paths(part)
            digest.update(f"{len(files)} {'' if files else part}\n".encode())
            for file in files:
                if file.is_file():
                    digest.update(file.name.encode(errors="surrogateescape") + b"\n")
                    with file.open("rb") as opened:
                        digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def resolve_source(source: str) -> str:
    """The same source by absolute paths, so that it can be read from any folder.

    Raises:
        DataError: there is nothing of that name.
    """
    with _enterable(source):
        if is_natural_instructions(Path(source)):
            return str(Path(source).resolve())
        parts = [_absolute(part) if _paths(part) else part for part in _parts(source)]
    if len(parts) > 1 and (odd := next((part for part in parts if "," in part), None)) is not None:
        raise DataError(f"{odd}: of several sources none may have a comma in its path; give a folder, or a link to it")
    return ",".join(parts)


@contextmanager
def _enterable(source: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{source}: cannot look there ({error.strerror}); give a file that this user may read") from error


def _absolute(part: str) -> str:
    path = Path(part)
    return str(path.resolve() if path.exists() else _whole(part))


def _whole(pattern: str) -> Path:
    """A pattern from the root; the current folder's own name is none."""
    return Path(pattern) if Path(pattern).is_absolute() else Path(glob.escape(str(Path.cwd()))) / pattern


def public_names(source: str) -> list[str]:
    """What the parts of a source may be called elsewhere: hub ids as they are, files and folders without their paths."""
    return [part if is_hub_id(part) else Path(part).name for part in _parts(source)]


def _parts(source: str) -> list[str]:
    """Several sources may stand with commas between them, where there is none whose own name has them."""
    if not source.strip():
        raise DataError("the name of the data is empty; give a file, a folder or a dataset's hub id")
    if "," not in source or Path(source).exists() or _matches(source):
        return [source]
    parts = [part.strip() for part in source.split(",")]
    if not all(parts):
        raise DataError(f"{source}: a comma without a name beside it; give sources with commas between")
    return parts


def _paths(part: str) -> list[Path]:
    """The files and saved datasets that a part names, in the order of their names; none for a hub id.

    Raises:
        DataError: there are none, and it can be no hub id.
    """
    path = Path(part)
    if path.is_dir() and not is_saved(path):
        files = sorted(file for file in path.iterdir() if kind_of(file) in KINDS and _is_source(file))
        if not files:
            raise DataError(
                f"{part}: a folder without files of records ({', '.join(KINDS)}), and not of Natural Instructions; "
                "give a file, or a pattern such as 'FOLDER/*/*.jsonl'"
            )
        return files
    if path.exists():
        return [path]
    found = _matches(part)
    if not found and GLOB.search(part):
        raise DataError(f"{part}: no file has such a name; check the pattern of the data")
    if not found and not is_hub_id(part):
        raise DataError(f"{part}: no such file; check the path of the data")
    return found


def _matches(pattern: str) -> list[Path]:
    """What a glob finds, in the order of the names; nothing for a text that is no glob."""
    if not GLOB.search(pattern):
        return []
    whole = _whole(pattern)
    return sorted(file for file in Path(whole.anchor).glob(str(whole.relative_to(whole.anchor))) if _is_source(file))


def _is_source(path: Path) -> bool:
    return not path.name.startswith(".") and (path.is_file() or is_saved(path))


def _rows(source: str, columns: Columns) -> Iterator[Row]:
    for part in _parts(source):
        paths = _paths(part)
        if not paths:
            yield from hub_rows(part)
        for path in paths:
            if path.is_dir():
                yield from saved_rows(path)
            elif kind_of(path) in TABLES:
                yield from TABLES[kind_of(path)](path)
            else:
                yield from json_rows(path, columns)


def read_examples(source: str | Path, columns: Columns = COLUMNS, needless: Collection[str] = ()) -> list[Example]:
    """The records of a source: of files by how their names end (JSON, if by nothing known), else of a hub id.

    Args:
        source: a file, a glob, a folder of files or of a saved dataset, a hub id, or several of these with commas between.
        columns: what the fields are called.
        needless: fields that `columns` may name though no record has them.

    Raises:
        DataError: see the readers and `to_examples`.
    """
    return to_examples(_rows(str(source), columns), str(source), columns, needless)


def read_source(
    source: str | Path,
    split: Literal["train", "test"],
    max_length: int,
    seed: int,
    columns: str | None,
    heard: Callable[[str, int, int], None] | None = None,
) -> list[Example]:
    """The records that `--data` or `--eval-data` names.

    Args:
        source: a Natural Instructions folder, or what `read_examples` takes.
        split: of Natural Instructions: which of the tasks. Other records that are held out need no client.
        max_length: of Natural Instructions: inputs have fewer characters, as the published code has it.
        seed: of Natural Instructions: draws the instances.
        columns: see `parse_columns`; None for the usual names.
        heard: hears what is being done, and how far it is.

    Raises:
        DataError: the source cannot be read or used.
    """
    path = Path(source)
    with _enterable(source):
        natural = is_natural_instructions(path)
        _parts(str(source))
    if natural:
        return read_tasks(path, split, max_length, seed, partial(heard, f"reading {split} tasks") if heard else None)
    return read_examples(source, parse_columns(columns) if columns else COLUMNS, ("client",) if split == "test" else ())
