"""The objectives that have no gradient: scores of answers by a function, the user's own too."""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np

from fedkseed.data import Example
from fedkseed.errors import ConfigError, DataError
from fedkseed.evaluation.rouge import rouge_l
from fedkseed.text import named_line, one_line

Score = Callable[[Example, str], Any]
"""Of a record and an answer to it, a number that is to rise."""
log = logging.getLogger(__name__)

SCORES: dict[str, Score] = {
    "exact-match": lambda record, answer: float(answer.strip() == record.output.strip()),
    "rouge-l": lambda record, answer: rouge_l(answer, record.output),
}
"""Those that have a name."""


def find_score(name: str, where: str = "--objective") -> Score:
    """The function that a name stands for.

    Args:
        name: one of `SCORES`, or PACKAGE:FUNCTION, which is imported here; modules in the working folder are found too.
        where: what messages call the setting.

    Raises:
        ConfigError: there is no such module or function.
    """
    if name in SCORES:
        return SCORES[name]
    module, _, function = name.partition(":")
    if not module or not function:
        raise ConfigError(f"{where} is {name!r}; expected {', '.join(SCORES)}, or a function as PACKAGE:FUNCTION")
    if "" not in sys.path:  # as `python -m` has it, and a command's own script has not
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except Exception as error:  # a user's module raises anything
        raise ConfigError(
            f"{where} is {name!r}: {one_line(error)}; give PACKAGE:FUNCTION, with the module in this folder or "
            "installed beside fedkseed"
        ) from error
    if not callable(found):
        raise ConfigError(f"{where} is {name!r}, which is of type {type(found).__name__}; expected a function")
    score: Score = found
    return score


def check_score(score: Score, record: Example, name: str) -> None:
    """Refuse a function that has no number for a record's own response.

    Raises:
        DataError: it raises, or gives something else; what it says may quote the record.
    """
    value, reason = scored(score, record, record.output)
    if not math.isfinite(value):
        raise DataError(
            f"--objective {name}: of a record and its own response the function {reason}; expected score(record, answer), "
            "which gives a finite number"
        )


def scored(score: Score, record: Example, answer: str) -> tuple[float, str]:
    """A function's number for an answer, or NaN and what it did in place of giving one."""
    try:
        value = score(record, answer)
    except Exception as error:  # a user's function raises anything; a step is worth less than the run
        return math.nan, f"raised {named_line(error, 120)}"
    if not isinstance(value, (Real, np.bool_)):
        return math.nan, f"gave something of type {type(value).__name__}"
    number = float(value)
    return (number, "") if math.isfinite(number) else (math.nan, f"gave {number}")
