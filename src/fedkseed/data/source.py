"""Whatever `--data` may name: a jsonl, CSV, TSV or parquet file, or a Hugging Face dataset."""

import re
from pathlib import Path

from fedkseed.data.example import Example
from fedkseed.data.jsonl import read_jsonl
from fedkseed.data.record import COLUMNS, Columns
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
