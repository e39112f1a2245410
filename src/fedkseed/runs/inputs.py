"""What a caller from Python gives as objects where the command line gives names: a loaded model, its tokenizer, records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkseed.data import COLUMNS, Example, parse_columns, to_example
from fedkseed.errors import ConfigError, DataError
from fedkseed.runs.settings import IN_MEMORY

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Inputs:
    """Objects in place of what settings name; None where the settings name it.

    Attributes:
        model: a loaded causal LM.
        tokenizer: its tokenizer.
        data: training records.
        eval_data: held-out records.
    """

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    data: list[Example] | None = None
    eval_data: list[Example] | None = None


def separate(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Inputs]:
    """Settings whose values are names and numbers, and the objects that stood among them.

    Args:
        settings: of a simulation, by name; `model` may be a pair of a loaded model and its tokenizer; `data` and
            `eval_data` may be records: a list of dicts, a DataFrame, a dataset.

    Raises:
        ConfigError: the model is something else.
        DataError: records are empty or lack a field.
    """
    named, objects = dict(settings), dict[str, Any]()
    model = named.get("model")
    if model is not None and not isinstance(model, (str, Path)):
        if not (isinstance(model, tuple) and len(model) == 2 and callable(getattr(model[0], "named_parameters", None))):
            raise ConfigError(
                f"model is of type {type(model).__name__}; expected a folder, a hub id, or a pair (model, tokenizer)"
            )
        objects["model"], objects["tokenizer"] = model
        named["model"] = f"{IN_MEMORY}{type(model[0]).__name__}"
    columns = parse_columns(named["columns"]) if named.get("columns") else COLUMNS
    for key in ("data", "eval_data"):
        if named.get(key) is not None and not isinstance(named[key], (str, Path)):
            records = objects[key] = [
                to_example(row, f"{key}, record {number}", columns)
                for number, row in enumerate(_rows(named[key], key), start=1)
            ]
            if not records:
                raise DataError(f"{key} has no records; expected dicts with an instruction and a response")
            named[key] = f"{IN_MEMORY}{len(records)} records, {_digest(records)}"
    return named, Inputs(**objects)


def _rows(records: Any, key: str) -> Iterable[Mapping[str, Any]]:
    """A list of dicts, the rows of a DataFrame, those of a dataset."""
    if hasattr(records, "to_dict") and hasattr(records, "columns"):
        # a cell of a table that holds nothing is NaN; of a record it is None
        records = records.astype(object).where(records.notna(), None).to_dict("records")
    if isinstance(records, Mapping) or not isinstance(records, Iterable):
        raise DataError(f"{key} is of type {type(records).__name__}; expected a file, a hub id, or a list of dicts")
    rows = list(records)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{key}, record {number} is of type {type(row).__name__}; expected a dict")
    return rows


def _digest(records: list[Example]) -> str:
    """The first half of the SHA-256 of the records' fields: which records a run had, without the records."""
    digest = hashlib.sha256()
    for e in records:
        digest.update(json.dumps([e.instruction, e.input, e.output, e.category, e.client, e.history]).encode() + b"\n")
    return digest.hexdigest()[:32]
