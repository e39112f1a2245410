"""`fedkseed report`: a run's folder as one page and its pictures."""

from pathlib import Path

from fedkseed.errors import RunError
from fedkseed.files import write_atomically
from fedkseed.report.charts import CHARTS, charts
from fedkseed.report.drawing import render
from fedkseed.report.page import page
from fedkseed.report.reading import read

__all__ = ["report"]

FOLDER, PAGE = "report", "index.html"


def report(run: Path, which: str | int | None = None) -> Path:
    """Write RUN/report/index.html and its charts as PNG files beside it; an older report is replaced.

    The run may be going on, be a single round, or have diverged; its own files are only read.

    Args:
        run: a run's folder.
        which: as it was after a round, or after the "best" one; None for as it is.

    Returns:
        The page's path.

    Raises:
        RunFolderError: there is no run, or it keeps no ledger of that round.
        RunError: a file of the run is damaged, or the report cannot be written.
        ConfigError: the run's settings are not valid (any more).
        LedgerError: the run's ledger is damaged or of another version.
    """
    record = read(run, which)
    shown = charts(record)
    pictures = {chart.name: render(chart.name, chart.title, chart.draw) for chart in shown if chart.draw is not None}
    content = page(run, record, shown, {name: picture.svg for name, picture in pictures.items()})
    folder = run / FOLDER
    try:
        folder.mkdir(exist_ok=True)
        for name in CHARTS.keys() - pictures.keys():
            (folder / f"{name}.png").unlink(missing_ok=True)
        for name, picture in pictures.items():
            write_atomically(folder / f"{name}.png", picture.png)
        write_atomically(folder / PAGE, content.encode())
    except OSError as error:
        raise RunError(
            f"{folder}: cannot write the report ({error.strerror}); make room there, or copy the run to a folder of yours"
        ) from error
    return folder / PAGE
