"""A simulation in this process, who watches it, and what it has written."""

import json
from pathlib import Path
from typing import Any

from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.observer import Probe
from fedkseed.runs.records import prepare
from fedkseed.runs.settings import build
from fedkseed.runs.simulation import Simulation


class Watcher:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.probes: list[Probe] = []
        self.events: list[dict[str, Any]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, activity: str, done: int, total: int) -> None:
        assert 0 < done <= total

    def probe(self, probe: Probe) -> None:
        self.probes.append(probe)

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)


def simulation(path: Path, settings: dict[str, Any]) -> tuple[Simulation, Watcher]:
    config, watcher = build(settings), Watcher()
    return Simulation(RunFolder.create(path, config), prepare(config, watcher), watcher), watcher


def trained(path: Path, settings: dict[str, Any]) -> tuple[Ledger, list[dict[str, Any]]]:
    ledger = simulation(path, settings)[0].train()
    return ledger, read_metrics(path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def held_out(metrics: list[dict[str, Any]]) -> list[float]:
    return [event["eval_loss"] for event in metrics if event["event"] == "evaluation"]
