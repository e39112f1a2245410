"""Single values of a record: which count as absent, which are texts, which are names."""

from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

from fedkseed.errors import DataError


def absent(value: Any) -> bool:
    """Whether a value says that there is none: null, or the NaN that data frames put in gaps."""
    return value is None or (isinstance(value, Real) and value != value)


def plain(value: Any) -> Any:
    """A value without NumPy's types, which pandas puts into records: lists for arrays, Python's numbers for scalars."""
    return value.tolist() if hasattr(value, "tolist") else value


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a value of lists and tables, however deep, keys among them; in no order."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, Mapping):
            waiting += [*item, *item.values()]
        elif isinstance(item, (list, tuple)):
            waiting += item


def is_whole(text: str) -> bool:
    """Whether a text has no half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


class TwiceError(ValueError):
    """A field stands twice in an object."""


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For JSON's readers: an object whose fields have one value each; of two, whoever reads takes another one.

    Raises:
        TwiceError: a field stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise TwiceError(f"field {next(name for name in names if names.count(name) > 1)!r:.40} stands twice in an object")
    return found


def filled(value: Any) -> bool:
    """Whether a value holds something: it is not absent, nor an empty or blank text, nor an empty list."""
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    return not absent(value) and value not in ([], (), {})


def checked(value: Any, name: str, where: str) -> str:
    """A field's value, once it is known to be a text.

    Raises:
        DataError: it is none; the message names where and the field.
    """
    if not isinstance(value, str):
        raise DataError(f'{where}: field {name!r} is {kind(value)}; expected a string ("" where there is nothing)')
    if not is_whole(value):
        raise DataError(f"{where}: field {name!r} has half a surrogate pair, which no text has; delete that escape")
    return value


def named(value: Any, name: str, where: str) -> str:
    """The same of a category or client, which many datasets number; data frames make floats of such numbers, so 1.0 is 1.

    Raises:
        DataError: it is neither a text nor a whole number.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Real) and not isinstance(value, bool) and float(value).is_integer():
        return str(int(float(value)))
    return checked(value, name, where)


def kind(value: object) -> str:
    """What a value is called in JSON, with its article."""
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")
