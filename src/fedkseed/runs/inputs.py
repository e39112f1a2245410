"""What a caller from Python gives as objects where the command line gives names: a loaded model, its tokenizer, records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedkseed.data import COLUMNS, Example, parse_columns, read_records
from fedkseed.errors import ConfigError
from fedkseed.evaluation import Score
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
        score: the objective's function.
    """

    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    data: list[Example] | None = None
    eval_data: list[Example] | None = None
    score: Score | None = None


def separate(settings: Mapping[str, Any]) -> tuple[dict[str, Any], Inputs]:
    """Settings whose values are names and numbers, and the objects that stood among them.

    Args:
        settings: of a simulation, by name; `model` may be a pair of a loaded model and its tokenizer; `data` and
            `eval_data` may be records: a list of dicts, a DataFrame, a dataset; `objective` a function.

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
    if callable(named.get("objective")):
        score = objects["score"] = named["objective"]
        named["objective"] = (
            f"{getattr(score, '__module__', 'function')}:{getattr(score, '__qualname__', type(score).__name__)}"
        )
    given = named.get("columns")
    if given is not None and not isinstance(given, (str, Mapping)):
        raise ConfigError(f"columns is {given!r:.80}; expected a text such as output=answer, or a dict")
    columns = parse_columns(given) if given else COLUMNS
    for key in ("data", "eval_data"):
        if named.get(key) is not None and not _is_named(named[key]):
            records = objects[key] = read_records(named[key], columns, key)
            named[key] = f"{IN_MEMORY}{len(records)} records, {_digest(records)}"
    return named, Inputs(**objects)


def _is_named(source: Any) -> bool:
    """Whether a source is a name, or a list of names, and no records."""
    names = source if isinstance(source, list) and source else [source]
    return all(isinstance(name, (str, Path)) for name in names)


def _digest(records: list[Example]) -> str:
    """The first half of the SHA-256 of the records' fields: which records a run had, without the records."""
    digest = hashlib.sha256()
    for e in records:
        fields = [e.instruction, e.input, e.output, e.category, e.client, e.history, *([e.rejected] if e.rejected else [])]
        digest.update(json.dumps(fields, default=str).encode() + b"\n")
    return digest.hexdigest()[:32]
