"""`fedkseed report`: a page about a run."""

from pathlib import Path

from fedkseed.cli.console import complain, say
from fedkseed.report import report
from fedkseed.report.reading import read


def report_command(run: Path, which: str | None = None) -> None:
    """Make the page and say where it lies.

    Raises:
        FedKSeedError: there is no run, it cannot be read, or the page cannot be written.
    """
    page = report(run, which)
    if damage := read(run, which).damage:
        complain(f"{damage}; it is left out")
    say(f"report: {page}")
