"""Instruction data: records, readers, templates, token ids, batches, partitions."""

from fedkseed.data.batch import IGNORED, Batch, collate, pad_token_id
from fedkseed.data.encode import EncodedData, EncodedExample, encode
from fedkseed.data.example import Example, Turn
from fedkseed.data.jsonl import read_jsonl
from fedkseed.data.natural_instructions import is_natural_instructions, read_tasks
from fedkseed.data.partition import dirichlet, iid, split_off
from fedkseed.data.record import COLUMNS, Columns, parse_columns, to_example
from fedkseed.data.shuffle import shuffle_responses, shuffle_within_categories
from fedkseed.data.source import is_hub_id, read_examples, read_source
from fedkseed.data.table import read_csv, read_hub, read_parquet
from fedkseed.data.template import TEMPLATES, Template, get_template

__all__ = [
    "COLUMNS",
    "IGNORED",
    "TEMPLATES",
    "Batch",
    "Columns",
    "EncodedData",
    "EncodedExample",
    "Example",
    "Template",
    "Turn",
    "collate",
    "dirichlet",
    "encode",
    "get_template",
    "iid",
    "is_hub_id",
    "is_natural_instructions",
    "pad_token_id",
    "parse_columns",
    "read_csv",
    "read_examples",
    "read_hub",
    "read_jsonl",
    "read_parquet",
    "read_source",
    "read_tasks",
    "shuffle_responses",
    "shuffle_within_categories",
    "split_off",
    "to_example",
]
