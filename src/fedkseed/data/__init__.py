"""Instruction data: records, readers, templates, token ids, batches, partitions."""

from fedkseed.data.batch import IGNORED, Batch, collate, pad_token_id
from fedkseed.data.chat import Chat, arguments_text, parse_arguments
from fedkseed.data.columns import COLUMNS, Columns, columns_text, parse_columns
from fedkseed.data.encode import Dropped, EncodedData, EncodedExample, LongPrompts, encode, why_dropped
from fedkseed.data.example import Example, Turn
from fedkseed.data.natural_instructions import is_natural_instructions, read_tasks
from fedkseed.data.objects import read_records
from fedkseed.data.partition import dirichlet, iid, split_off
from fedkseed.data.rendered import Rendered, Template
from fedkseed.data.shuffle import shuffle_responses, shuffle_within_categories
from fedkseed.data.source import is_hub_id, public_names, read_examples, read_source, resolve_source
from fedkseed.data.template import TEMPLATES, Known, get_template

__all__ = [
    "COLUMNS",
    "IGNORED",
    "TEMPLATES",
    "Batch",
    "Chat",
    "Columns",
    "Dropped",
    "EncodedData",
    "EncodedExample",
    "Example",
    "Known",
    "LongPrompts",
    "Rendered",
    "Template",
    "Turn",
    "arguments_text",
    "collate",
    "columns_text",
    "dirichlet",
    "encode",
    "get_template",
    "iid",
    "is_hub_id",
    "is_natural_instructions",
    "pad_token_id",
    "parse_arguments",
    "parse_columns",
    "public_names",
    "read_examples",
    "read_records",
    "read_source",
    "read_tasks",
    "resolve_source",
    "shuffle_responses",
    "shuffle_within_categories",
    "split_off",
    "why_dropped",
]
