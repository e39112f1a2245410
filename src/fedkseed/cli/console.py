"""What every command prints passes through here: visible text, lines that break between words, tables without markup."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedkseed.text import VisibleFormatter, visible

PROGRAM = "fedkseed"
LOG = logging.getLogger(PROGRAM)
"""Its level is how much commands say: WARNING with --quiet, DEBUG with --verbose, else unset."""
FIRST_COLUMN = 30
"""Columns that the names in front of a table's rows take at most."""
UNLIMITED = 10_000
"""Columns of what is no terminal: a log's lines and tables are not broken."""
_DRAWN_ON: ContextVar[Console | None] = ContextVar("drawn_on", default=None)


def is_quiet() -> bool:
    """Whether only warnings and results are to be shown."""
    return LOG.level >= logging.WARNING


def is_verbose() -> bool:
    """Whether everything is to be shown."""
    return 0 < LOG.level <= logging.DEBUG


@contextmanager
def drawing_on(console: Console) -> Iterator[None]:
    """While a live display draws on a console all lines go there; another's would leave a stale bar behind."""
    token = _DRAWN_ON.set(console)
    try:
        yield
    finally:
        _DRAWN_ON.reset(token)


def new_console() -> Console:
    """Standard output, as it is now."""
    if (drawn_on := _DRAWN_ON.get()) is not None:
        return drawn_on
    console = Console()
    return console if console.is_terminal else Console(width=UNLIMITED)


def say(text: object = "", console: Console | None = None, style: str = "") -> None:
    """Print a line; on a terminal it is broken between words only, so that numbers and paths stay whole."""
    to = console or new_console()
    line = visible(text)
    if to.is_terminal:
        line = "\n".join(
            textwrap.wrap(line, to.width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) or [""]
        )
    to.print(Text(line, style), soft_wrap=True)


def say_rows(rows: Mapping[str, str] | Iterable[tuple[str, str]]) -> None:
    """Print names and what is known of them, each on a line."""
    for name, value in rows.items() if isinstance(rows, Mapping) else rows:
        say(f"{name:<14}{value}")


def say_command(words: Sequence[object], console: Console | None = None) -> None:
    """Print a command on a line of its own, which can be pasted into a shell."""
    known = [program() if word == PROGRAM and i == 0 else str(word) for i, word in enumerate(words)]
    (console or new_console()).print(Text("  " + " ".join(map(shell_word, known))), soft_wrap=True)


def program() -> str:
    """What a shell knows fedkseed as: its name, or the path of the one that runs where no environment is active."""
    here = Path(sys.executable).with_name(PROGRAM)
    if shutil.which(PROGRAM) or not here.is_file():
        return PROGRAM
    return str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else str(here)


def complain(text: object) -> None:
    """A line on standard error."""
    say(f"fedkseed: {text}", Console(stderr=True))


def shell_word(word: str) -> str:
    """A word as a shell reads it back: quoted where need be, control characters as escapes."""
    if visible(word) == word:
        return shlex.quote(word)
    data = word.encode(errors="surrogateescape")
    return "$'" + "".join(chr(b) if 32 <= b < 127 and chr(b) not in "\\'" else f"\\x{b:02x}" for b in data) + "'"


def show_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; columns that a terminal has no room for come in further tables, below each other, with the first again."""
    console = new_console()
    cells = [[Text(visible(cell)) for cell in row] for row in (header, *rows)]
    for columns in _shared_out(cells, console.width):
        table = Table(box=None, pad_edge=False)
        for i in columns:
            table.add_column(cells[0][i], overflow="fold", max_width=None if i else FIRST_COLUMN)
        for row in cells[1:]:
            table.add_row(*(row[i] for i in columns))
        if columns[0:2] != (0, 1):
            console.print()
        console.print(table)


def _shared_out(cells: Sequence[Sequence[Text]], room: int) -> list[tuple[int, ...]]:
    """Which columns stand together: as many as fit, the first in front of each lot."""

    def width(column: int) -> int:
        head = max((cell_len(word) for word in cells[0][column].plain.split()), default=0)
        widest = max(head, *(row[column].cell_len for row in cells[1:]), 0)
        return widest if column else min(widest, FIRST_COLUMN)

    lots: list[tuple[int, ...]] = [(0,)]
    for column in range(1, len(cells[0])):
        if len(lots[-1]) > 1 and sum(width(i) + 2 for i in (*lots[-1], column)) > room:
            lots.append((0,))
        lots[-1] = (*lots[-1], column)
    return lots


class StandardError(logging.Handler):
    """The log of the package, on whatever standard error is when a line comes: a live display puts its own there."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(VisibleFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        print(self.format(record), file=sys.stderr)


def log_to_standard_error() -> None:
    """Show the package's log, once."""
    if not any(isinstance(handler, StandardError) for handler in LOG.handlers):
        LOG.addHandler(StandardError())
