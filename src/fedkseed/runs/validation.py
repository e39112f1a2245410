"""What pydantic found wrong with settings, in a form that an error of one line is made from."""

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError


@dataclass(frozen=True)
class Problem:
    """The first of the things that were wrong.

    Attributes:
        path: where: the setting's name, with more parts inside lists; empty for settings that contradict each other.
        kind: whether it is missing, unknown, or has a value that it cannot have.
        value: that value.
        text: what was expected, without a capital.
    """

    path: tuple[str, ...]
    kind: Literal["missing", "unknown", "value"]
    value: Any
    text: str


def first_problem(error: ValidationError) -> Problem:
    """The first problem of a validation error."""
    found = error.errors()[0]
    kinds: dict[str, Literal["missing", "unknown"]] = {"missing": "missing", "extra_forbidden": "unknown"}
    text = found["msg"].removeprefix("Value error, ")
    path = tuple(str(part) for part in found["loc"])
    # of settings that contradict each other the message begins with a flag's name
    return Problem(path, kinds.get(found["type"], "value"), found["input"], text[0].lower() + text[1:] if path else text)
