"""What a record's fields may be called in a source, and how a user says so."""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fedkseed.errors import DataError, InvalidValueError
from fedkseed.text import nearest

USUAL: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "prompt"),
    "input": ("input", "context"),
    "output": ("output", "response", "completion", "chosen"),
    "rejected": ("rejected",),
    "category": ("category",),
    "client": ("client",),
    "messages": ("messages", "conversations"),
}
"""What each of our fields is called unless told otherwise; of those that hold something the first counts."""

PART = re.compile(r'\s*([^=,"]*?)\s*=\s*("(?:[^"]|"")*"|[^,"]*?)\s*(?:,|$)')


@dataclass(frozen=True)
class Columns:
    """The names that fields may have in a source.

    Attributes:
        told: (field, column) for those that the user named; the others go by their usual names.
    """

    told: tuple[tuple[str, str], ...] = ()

    def names(self, field: str) -> tuple[str, ...]:
        """What a field may be called."""
        told = dict(self.told)
        return (told[field],) if field in told else USUAL[field]

    def tells(self, field: str) -> bool:
        """Whether the user said what this field is called."""
        return field in dict(self.told)

    def find(self, keys: tuple[Any, ...]) -> Mapping[str, tuple[Any, ...]]:
        """For each field the keys of a record that may hold it, the first first.

        Blanks around a key do not count, nor does the case of the usual names.
        """
        return _find(self, keys)

    def check(self, found: Iterable[Any], source: str, needless: Collection[str] = ()) -> None:
        """Refuse columns that the user named and that no record has.

        Args:
            found: the keys of all records.
            source: for the message.
            needless: fields that this source need not have.

        Raises:
            DataError: there is one; the message gives the nearest name.
        """
        known = sorted({str(key).strip() for key in found})
        for field, column in self.told:
            if column not in known and field not in needless:
                raise DataError(
                    f"{source}: no record has the column {column!r}, which --columns names for {field}; found {listed(known)}, "
                    f"so {nearest([column], known) or 'name one of these'}"
                )


COLUMNS = Columns()
"""The usual names."""


def listed(known: Iterable[str]) -> str:
    """Names for a message, which stays a line."""
    names = sorted({name.strip() for name in known})
    return repr(names) if len(names) <= 20 else f"{names[:20]} and {len(names) - 20} more"


@lru_cache(maxsize=1024)
def _find(columns: Columns, keys: tuple[Any, ...]) -> Mapping[str, tuple[Any, ...]]:
    exact = {str(key).strip(): key for key in reversed(keys)}
    folded = {name.casefold(): key for name, key in exact.items()}
    places: dict[str, tuple[Any, ...]] = {}
    for field in USUAL:
        names = columns.names(field)
        places[field] = tuple(exact[name] for name in names if name in exact)
        if not places[field] and not columns.tells(field):
            places[field] = tuple(folded[name] for name in names if name in folded)
    return places


def parse_columns(given: str | Mapping[str, Any]) -> Columns:
    """The columns that `instruction=question,output=answer` says; fields that it leaves out keep their usual names.

    A column whose name has a comma or a quote stands in double quotes, with quotes in it doubled:
    `output="Answer, in full"`. A mapping of fields to columns, such as a table of a TOML file, says the same.

    Raises:
        InvalidValueError: a part that is not field=column, an unknown field, or one field twice.
    """
    pairs = [(field, column) for field, column in given.items()] if isinstance(given, Mapping) else _pairs(given)
    told: dict[str, str] = {}
    for field, column in pairs:
        if field not in USUAL or not isinstance(column, str) or not column.strip():
            raise _no_columns(f"{field} = {column!r}" if isinstance(given, Mapping) else f"{field}={column}")
        if field in told:
            raise InvalidValueError(
                f"columns names {field} twice, {told[field]!r} and {column.strip()!r}; name one column for it"
            )
        told[field] = column.strip()
    if not told:
        raise _no_columns("")
    return Columns(tuple(told.items()))


def _pairs(text: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    place = 0
    while place < len(text) or not pairs:
        match = PART.match(text, place)
        if match is None or not match[2]:
            raise _no_columns(text[place:].partition(",")[0].strip())
        column = match[2]
        pairs.append((match[1], column[1:-1].replace('""', '"') if column.startswith('"') else column))
        place = match.end()
    if text.rstrip().endswith(","):
        raise _no_columns("")
    return pairs


def _no_columns(part: str) -> InvalidValueError:
    return InvalidValueError(
        f"columns has {part!r}; expected field=column, such as instruction=question,output=answer (a name with a comma in "
        f'it in double quotes: output="Answer, in full"), with fields of: {", ".join(USUAL)}'
    )


def columns_text(given: Mapping[str, Any]) -> str:
    """A table of fields and columns as the text that `parse_columns` takes.

    Raises:
        InvalidValueError: see `parse_columns`.
    """
    told = parse_columns(given).told
    return ",".join(f"{field}={_quoted(column)}" for field, column in told)


def _quoted(column: str) -> str:
    doubled = column.replace('"', '""')
    return f'"{doubled}"' if "," in column or '"' in column else column
