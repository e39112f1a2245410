"""`fedkseed report`: a page about a run."""

from pathlib import Path

from fedkseed.report import report


def report_command(run: Path) -> None:
    """Make the page and say where it lies.

    Raises:
        FedKSeedError: there is no run, it cannot be read, or the page cannot be written.
    """
    print(f"report: {report(run)}")
