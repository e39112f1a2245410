"""`fedkseed report`: a page about a run, or about several over one another."""

from collections.abc import Sequence
from pathlib import Path

from fedkseed.cli.console import complain, say
from fedkseed.errors import ConfigError
from fedkseed.report import report, report_several
from fedkseed.report.reading import read


def report_command(runs: Sequence[Path], which: str | None = None, output: Path | None = None) -> None:
    """Make the page and say where it lies.

    Raises:
        FedKSeedError: there is no run, it cannot be read, or the page cannot be written.
    """
    if len(runs) > 1 and which is not None:
        raise ConfigError("--round is of one run; leave it out, or give one run")
    page = report(runs[0], which, output) if len(runs) == 1 else report_several(runs, output)
    for run in runs:
        if damage := read(run, which).damage:
            complain(f"{damage}; it is left out")
    say(f"report: {page}")
