"""Timing that survives a noisy machine: contenders take turns, medians are compared, everything is written down."""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of a results table: what was measured, its value and unit, the spread, and the budget if there is one."""

    what: str
    value: float
    unit: str
    low: float
    high: float
    must: float | None = None
    aim: float | None = None

    @property
    def verdict(self) -> str:
        if self.must is None:
            return ""
        if self.aim is not None and self.value <= self.aim:
            return "aim met"
        return "met" if self.value <= self.must else "MISSED"


def measure(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round that is not counted; contenders take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            start = clock()
            run()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def ratio(what: str, over: list[float], under: list[float], **budget: float) -> Row:
    """The median of one contender over the median of another, with the spread of the ratio from round to round."""
    turns = sorted(a / b for a, b in zip(over, under, strict=True))
    return Row(what, statistics.median(over) / statistics.median(under), "x", turns[0], turns[-1], **budget)


def absolute(what: str, seconds: list[float], scale: float, unit: str) -> Row:
    """A median time in a unit of its own."""
    return Row(what, statistics.median(seconds) * scale, unit, min(seconds) * scale, max(seconds) * scale)


def environment() -> dict[str, object]:
    """The machine, the versions and the commit that a result belongs to."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "status", "--porcelain", "src"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "numpy", "numba")},
        "commit": commit + (" + changes" if dirty else ""),
    }


def report(title: str, name: str, rows: list[Row], **more: object) -> None:
    """Print a table of results and save it, with more facts of the environment, as benchmarks/results/NAME.json and .md."""
    facts = {**more, **environment()}
    table = Table("what", "median", "lowest to highest", "must", "aim", "", title=title)
    markdown = [f"# {title}", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    markdown += ["| what | median | lowest to highest | must | aim | |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        spread = f"{number(row.low)} to {number(row.high)}"
        budget = ["" if value is None else f"{value:g} {row.unit}" for value in (row.must, row.aim)]
        cells = [row.what, f"{number(row.value)} {row.unit}", spread, *budget, row.verdict]
        table.add_row(*cells)
        markdown.append("| " + " | ".join(cells) + " |")
    Console().print(table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(markdown) + "\n")
    content = {"environment": facts, "rows": [asdict(row) for row in rows]}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def number(value: float) -> str:
    """Three significant digits, and all digits of what is 1,000 or more."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
