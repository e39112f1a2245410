"""What pydantic found wrong with settings, as an error of one line in the words of whoever gave them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from fedkseed.errors import ConfigError
from fedkseed.text import nearest

M = TypeVar("M", bound=BaseModel)
Path = tuple[str, ...]
"""Where a value stands: the setting's name, with more parts inside lists and tables."""


@dataclass(frozen=True)
class Words:
    """How errors speak of settings: those who read them gave flags, lines of a file, or keys of Flower's.

    Attributes:
        value: what the setting at a path is called where its value is wrong.
        missing: the whole message for a setting that is missing, by its name.
        unknown: what one that does not exist is called, by its name.
        key: how names are spelled in the list of those that do exist.
        contradiction: what stands before the text on settings that contradict each other.
        shown: a wrong value as it was given: flags are texts.
        advice: what to do about a wrong value, by the setting's name.
    """

    value: Callable[[Path], str]
    missing: Callable[[str], str]
    unknown: Callable[[str], str]
    key: Callable[[str], str] = str
    contradiction: str = ""
    shown: Callable[[Any], str] = lambda value: _shown(value)
    advice: Mapping[str, str] = field(default_factory=dict)


def _shown(value: Any) -> str:
    """A value as it was given, cut to a readable length."""
    try:
        text = str(value)
    except RecursionError:
        return "a table of tables, nested too deeply"
    return repr(text if len(text) <= 200 else text[:197] + "...")


def validated(kind: type[M], settings: Mapping[str, Any], words: Words, stored: bool = False) -> M:
    """Settings of a kind, checked.

    Args:
        kind: the model.
        settings: its fields by name.
        words: how errors speak of them.
        stored: they were checked before, maybe on another machine: files that they name need not exist.

    Raises:
        ConfigError: one is unknown, missing or out of its range, or two contradict each other; the message names it, its
            value and what was expected.
    """
    try:
        return kind.model_validate(dict(settings), context={"stored": stored})
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: cannot look there ({error.strerror}); give files that this user may read"
        ) from error
    except ValidationError as error:
        found = error.errors()[0]
        path: Path = tuple(str(part) for part in found["loc"])
        text = found["msg"].removeprefix("Value error, ")
        if not path:  # begins with a flag's name
            raise ConfigError(words.contradiction + text) from error
        if found["type"] == "missing":
            raise ConfigError(words.missing(path[-1])) from error
        advice = words.advice.get(path[0], "")
        if found["type"] == "extra_forbidden":
            known = ", ".join(sorted(map(words.key, kind.model_fields)))
            raise ConfigError(f"{words.unknown(path[-1])} is unknown; expected one of: {known}") from error
        bounds = [bound for bound in found.get("ctx", {}).values() if isinstance(bound, float)]
        if bounds:  # which pydantic writes out with all of its zeros
            text = f"{text.rpartition(' ')[0]} {bounds[0]:g}"
        if found["type"] == "literal_error" and isinstance(found["input"], str):
            near = nearest([found["input"]], re.findall(r"'([^']*)'", found["ctx"]["expected"]))
            advice = (near and f"; {near}") + advice
        wrong = f"{words.value(path)} is {words.shown(found['input'])}: {text[0].lower()}{text[1:]}"
        raise ConfigError(wrong + advice) from error
