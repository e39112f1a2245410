"""Text that others wrote, made fit for a line that a person reads, and small words for such lines."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches

JOINERS = "\u200c\u200d"
"""Format characters that scripts and emoji need inside words."""


def visible(text: object) -> str:
    """A text as one line that shows what is in it: nothing in it moves a cursor, ends the line or turns its direction.

    Control and format characters, line separators and lone surrogates become escapes such as `\\n` and `\\x1b`; whatever goes
    to a terminal, a log, a page or a card passes through here.

    Args:
        text: whatever can be a text: a client's name or reason, a file's name, an error.
    """
    return "".join(_escaped(character) for character in str(text))


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") or character in JOINERS:
        return character
    return character.encode("unicode_escape").decode()


def one_line(error: object, most: int = 160) -> str:
    """What an error says on one line, cut to so many characters; its kind where it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[: most - 3] + "..."


def named_line(error: BaseException, most: int = 160) -> str:
    """The same behind the error's kind, for what somebody else's program raised."""
    return f"{type(error).__name__}: {one_line(error, most)}"


def counted(number: int, one: str, more: str | None = None) -> str:
    """A number of things, such as `1 round` and `1,200 rounds`; `more` where that is not `one` with an s."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"


def joined(names: Iterable[str]) -> str:
    """Names as a sentence has them: `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def nearest(names: Iterable[str], known: Iterable[str]) -> str:
    """ "did you mean ...?" of the known name that is most like one of these; "" if none is like them."""
    folded = {name.strip().casefold(): name.strip() for name in known}
    near = [match for name in names for match in get_close_matches(name.casefold(), folded, 1)]
    return f"did you mean {folded[near[0]]!r}?" if near else ""


class VisibleFormatter(logging.Formatter):
    """Records of a log, each a line of visible text, whatever its arguments hold."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's message, then a traceback if there is one, whose lines are kept."""
        message = visible(record.getMessage())
        return f"{message}\n{self.formatException(record.exc_info)}" if record.exc_info else message
