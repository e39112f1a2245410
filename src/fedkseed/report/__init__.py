"""`fedkseed report`: a run's folder, or several of them, as one page and its pictures."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fedkseed.errors import ConfigError, RunError
from fedkseed.files import write_atomically
from fedkseed.report import several
from fedkseed.report.chart import Chart
from fedkseed.report.charts import CHARTS, charts
from fedkseed.report.drawing import LINES
from fedkseed.report.markup import TITLE
from fedkseed.report.page import page
from fedkseed.report.picture import Picture, render
from fedkseed.report.reading import read

__all__ = ["report", "report_several"]

FOLDER, PAGE, COMPARED = "report", "index.html", "compared.html"


def report(run: Path, which: str | int | None = None, folder: Path | None = None) -> Path:
    """Write index.html and its charts as PNG files beside it; an older report is replaced.

    The run may be going on, be a single round, or have diverged; its own files are only read.

    Args:
        run: a run's folder.
        which: as it was after a round, or after the "best" one; None for as it is.
        folder: where to write; None: RUN/report.

    Returns:
        The page's path.

    Raises:
        RunFolderError: there is no run, or it keeps no ledger of that round.
        RunError: a file of the run is damaged, or the report cannot be written.
        ConfigError: the run's settings are not valid (any more), or the folder holds a page that is no report.
        LedgerError: the run's ledger is damaged or of another version.
    """
    record, where = read(run, which), _made(folder or run / FOLDER, PAGE if folder else None, CHARTS)
    shown = charts(record)
    pictures = _drawn(shown)
    content = page(run, record, shown, {name: picture.svg for name, picture in pictures.items()})
    return _written(where, PAGE, content, pictures, CHARTS)


def report_several(runs: Sequence[Path], folder: Path | None = None) -> Path:
    """Write compared.html, with the curves of several runs over one another, and its charts as PNG files beside it.

    Args:
        runs: their folders, two or more.
        folder: where to write; None: the report's folder of the first run.

    Returns:
        The page's path.

    Raises:
        ConfigError: a run is named twice, or there are more than can be told apart.
        FedKSeedError: see `report`.
    """
    if len({run.resolve() for run in runs}) < len(runs):
        raise ConfigError("a run is named twice; name each once")
    if len(runs) > len(LINES):
        raise ConfigError(f"{len(runs)} runs; the lines of more than {len(LINES)} cannot be told apart")
    records = {name: read(run) for name, run in zip(several.names_of(runs), runs, strict=True)}
    where = _made(folder or runs[0] / FOLDER, COMPARED if folder else None, several.CHARTS)
    shown = several.charts_of(records)
    pictures = _drawn(shown)
    content = several.page(records, shown, {name: picture.svg for name, picture in pictures.items()})
    return _written(where, COMPARED, content, pictures, several.CHARTS)


def _drawn(shown: Sequence[Chart]) -> dict[str, Picture]:
    return {chart.name: render(chart.name, chart.title, chart.draw) for chart in shown if chart.draw is not None}


def _made(folder: Path, page: str | None, pictures: Iterable[str]) -> Path:
    """The folder to write into, before anything is drawn, which takes seconds; with a `page` what is there must be ours."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if page is not None and (found := _somebodys(folder, page, pictures)) is not None:
            raise ConfigError(f"{found} is no report of fedkseed; give another --output")
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return folder


def _somebodys(folder: Path, page: str, pictures: Iterable[str]) -> Path | None:
    """What a report would write anew that is of none; pictures are known by a page of ours beside them."""
    there = [one for one in (PAGE, COMPARED) if (folder / one).exists()]
    ours = [one for one in there if TITLE.encode() in (folder / one).read_bytes()[:4096]]
    others = [] if page in ours else [page]
    others += [] if ours else [f"{picture}.png" for picture in pictures]
    return next((folder / name for name in others if (folder / name).exists()), None)


def _cannot_write(folder: Path, error: OSError) -> RunError:
    return RunError(f"{folder}: cannot write the report ({error.strerror}); make room there, or give another --output")


def _written(folder: Path, name: str, content: str, pictures: dict[str, Picture], every: Iterable[str]) -> Path:
    """The page's path; pictures of an older report that there are no more are taken away."""
    try:
        for chart in set(every) - pictures.keys():
            (folder / f"{chart}.png").unlink(missing_ok=True)
        for chart, picture in pictures.items():
            write_atomically(folder / f"{chart}.png", picture.png)
        write_atomically(folder / name, content.encode())
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return folder / name
