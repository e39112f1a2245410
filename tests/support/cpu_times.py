"""How many CPU seconds each folder of tests takes, in all processes, told at the end; CONTRIBUTING.md has their budgets."""

import contextlib
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import psutil
import pytest


def cpu_seconds() -> float:
    """Of this process and of all that it has started, living or ended."""
    this, total = psutil.Process(), 0.0
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def folder(item: pytest.Item) -> str:
    return Path(item.nodeid.partition("::")[0]).parent.name


class CpuTimes:
    """A plugin. What several folders need is counted where it is needed first."""

    def __init__(self) -> None:
        self._last, self._spent = 0.0, Counter[str]()

    def _count(self, name: str) -> None:
        now = cpu_seconds()
        self._spent[name] += now - self._last  # type: ignore[assignment]
        self._last = now

    def pytest_collection_finish(self) -> None:
        self._count("collection")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
        result = yield
        if nextitem is None or folder(nextitem) != folder(item):
            self._count(folder(item))
        return result

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if len(self._spent) < 2:  # nothing but collected
            return
        terminalreporter.section(f"{sum(self._spent.values()):.0f} CPU seconds")
        terminalreporter.line(", ".join(f"{name} {seconds:.0f}" for name, seconds in self._spent.most_common()))
