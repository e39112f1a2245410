"""Whatever `--data` may name: a jsonl, CSV, TSV or parquet file, a Natural Instructions folder, or a Hugging Face dataset."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from fedkseed.data.example import Example
from fedkseed.data.jsonl import read_jsonl
from fedkseed.data.natural_instructions import is_natural_instructions, read_tasks
from fedkseed.data.record import COLUMNS, Columns, parse_columns
from fedkseed.data.table import read_csv, read_hub, read_parquet

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
READERS = {".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet}
FILES = (*READERS, ".jsonl", ".json", ".txt")
"""What files of records are called; a hub id may have a dot in its name too, such as owner/name-2.5."""


def is_hub_id(source: str) -> bool:
    """Whether a text can be a dataset's id on the Hugging Face hub: owner/name, perhaps with :split, and no file's name."""
    return HUB_ID.fullmatch(source) is not None and not source.lower().endswith(FILES)


def read_examples(source: str | Path, columns: Columns = COLUMNS) -> list[Example]:
    """The records of a source: of a file by how its name ends (a jsonl file, if by nothing known), else of a hub id.

    Raises:
        DataError: see the readers.
    """
    path = Path(source)
    if not path.exists() and is_hub_id(str(source)):
        return read_hub(str(source), columns)
    return READERS.get(path.suffix.lower(), read_jsonl)(path, columns)


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
        source: a file, a Natural Instructions folder or a hub id.
        split: of Natural Instructions: which of the tasks.
        max_length: of Natural Instructions: inputs have fewer characters, as the published code has it.
        seed: of Natural Instructions: draws the instances.
        columns: see `parse_columns`; None for the usual names.
        heard: hears what is being done, and how far it is.

    Raises:
        DataError: the source cannot be read or used.
    """
    path = Path(source)
    if is_natural_instructions(path):
        return read_tasks(path, split, max_length, seed, partial(heard, f"reading {split} tasks") if heard else None)
    return read_examples(source, parse_columns(columns) if columns else COLUMNS)
