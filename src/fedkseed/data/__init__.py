"""Instruction data: records, readers, templates, token ids, batches, partitions."""

from fedkseed.data.batch import IGNORED, Batch, collate, pad_token_id
from fedkseed.data.encode import EncodedData, EncodedExample, encode
from fedkseed.data.example import Example
from fedkseed.data.jsonl import read_jsonl
from fedkseed.data.partition import dirichlet, iid, split_off
from fedkseed.data.shuffle import shuffle_responses
from fedkseed.data.template import TEMPLATES, Template, get_template

__all__ = [
    "IGNORED",
    "TEMPLATES",
    "Batch",
    "EncodedData",
    "EncodedExample",
    "Example",
    "Template",
    "collate",
    "dirichlet",
    "encode",
    "get_template",
    "iid",
    "pad_token_id",
    "read_jsonl",
    "shuffle_responses",
    "split_off",
]
