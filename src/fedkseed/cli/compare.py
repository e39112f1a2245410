"""`fedkseed compare`: do what a comparison's file asks for and show its table."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fedkseed.cli.console import say, show_table
from fedkseed.cli.display import Lines
from fedkseed.comparison import HEADER, carry_out, read_comparison, write_report


def compare(file: Path, output: Path | None, jobs: int, app: Callable[[], None]) -> None:
    """Do the runs that are not done yet, by fedkseed's own command line `app`, then write and print the table.

    Raises:
        FedKSeedError: the file is not valid, a run cannot be done, or the folder cannot be written.
    """
    comparison = read_comparison(file)
    signal.signal(signal.SIGTERM, _interrupt)  # as Ctrl-C, so that no run goes on alone
    folder = output or Path("comparisons") / file.stem
    rows = carry_out(comparison, folder, jobs, app, Lines().note)
    report = write_report(comparison, rows, folder)
    say()
    show_table(HEADER, report.rows)
    say()
    for note in report.notes:
        say(note)
    say(f"{folder}: table.md, comparison.json and the curves as PNG files")


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt
