"""A run on disk: `config.toml`, `metrics.jsonl` and `ledger.safetensors` (of a baseline `tensors.safetensors`).

The last of these plus the config is everything.
"""

from __future__ import annotations

import json
import os
import secrets
import time
import tomllib
from pathlib import Path
from typing import Any

import tomli_w

from fedkseed.baselines import TunedTensors
from fedkseed.errors import RunError, RunFolderError
from fedkseed.federation import Checkpoint
from fedkseed.federation.algorithms import SEEDS, takes
from fedkseed.files import write_atomically
from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.settings import SimulationConfig, build

CONFIG, METRICS, LEDGER, TENSORS = "config.toml", "metrics.jsonl", "ledger.safetensors", "tensors.safetensors"
DRIVER = "driver"
"""The table of the settings that only the driver of the rounds knows, such as Flower's deadline."""


def new_folder(root: Path, prefix: str = "") -> Path:
    """Where a run goes that was given no folder: the time, and random digits, since a grid may start many in one second."""
    return root / f"{prefix}{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class RunFolder:
    """The folder of one run; made by `create`, opened again by `open`."""

    def __init__(self, path: Path, config: SimulationConfig) -> None:
        self.path, self.config = path, config

    @classmethod
    def create(cls, path: Path, config: SimulationConfig) -> RunFolder:
        """Make the folder and write the resolved settings.

        Raises:
            RunError: the folder holds a run already, or cannot be written.
        """
        cls.check_free(path)
        run = cls(path, config)
        run.write_config(config)
        return run

    @staticmethod
    def check_free(path: Path) -> None:
        """Refuse a folder that holds a run.

        Raises:
            RunFolderError: it does.
        """
        for name in (CONFIG, METRICS, LEDGER, TENSORS):
            if (path / name).exists():
                raise RunFolderError(
                    f"{path} holds a run already ({name}); go on with --resume {path}, or choose another --run"
                )

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run in a folder, with the settings that it was started with.

        Raises:
            RunError: there is no run, or its settings cannot be read.
            ConfigError: its settings are not valid (any more).
        """
        try:
            raw = (path / CONFIG).read_bytes()
        except OSError as error:
            raise RunFolderError(f"{path} holds no run (no {CONFIG}); start one with fedkseed simulate --run {path}") from error
        try:
            settings = tomllib.loads(raw.decode())
            settings.pop(DRIVER, None)
            return cls(path, build(settings))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RunError(f"{path / CONFIG} is not TOML ({error}); restore it from a copy") from error

    @property
    def ledger_path(self) -> Path:
        """Where the ledger is."""
        return self.path / LEDGER

    @property
    def tensors_path(self) -> Path:
        """Where a baseline's tensors are."""
        return self.path / TENSORS

    @property
    def checkpoint_path(self) -> Path:
        """Where the algorithm's checkpoint is, whichever it is."""
        return self.ledger_path if self.config.algorithm in SEEDS else self.tensors_path

    def write_config(self, config: SimulationConfig) -> None:
        """Replace the settings, such as after more rounds were asked for."""
        dumped = config.model_dump(mode="json").items()
        settings = {name: value for name, value in dumped if value is not None and takes(config.algorithm, name)}
        driver = {name: settings.pop(name) for name in sorted(settings.keys() - SimulationConfig.model_fields.keys())}
        if driver:
            settings[DRIVER] = driver
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / CONFIG, tomli_w.dumps(settings).encode())
        except OSError as error:
            raise RunError(f"{self.path}: cannot write the run folder ({error.strerror}); choose another --run") from error
        self.config = config

    def load_ledger(self) -> Ledger | None:
        """The last ledger; None before the first round is done."""
        return Ledger.load(self.ledger_path) if self.ledger_path.exists() else None

    def load_tensors(self) -> TunedTensors | None:
        """A baseline's last tensors; None before the first round is done."""
        return TunedTensors.load(self.tensors_path) if self.tensors_path.exists() else None

    def load_checkpoint(self) -> Checkpoint | None:
        """Where the run is, whichever its algorithm; None before the first round is done."""
        return self.load_ledger() if self.config.algorithm in SEEDS else self.load_tensors()

    def metrics(self) -> list[dict[str, Any]]:
        """All events so far; a line that a kill left unfinished is left out."""
        try:
            lines = (self.path / METRICS).read_text(encoding="utf-8").split("\n")[:-1]
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def append_metrics(self, event: dict[str, Any]) -> None:
        """Add an event, on the disk when this returns.

        Raises:
            RunError: it cannot be written; the ledger is safe.
        """
        try:
            with (self.path / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(event) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def cut_metrics(self, server_round: int) -> None:
        """Forget the events after a round: what a killed run wrote after its last ledger."""
        kept = [event for event in self.metrics() if event["server_round"] <= server_round]
        try:
            write_atomically(self.path / METRICS, "".join(json.dumps(event) + "\n" for event in kept).encode())
        except OSError as error:
            raise self._cannot_write(error) from error

    def _cannot_write(self, error: OSError) -> RunError:
        return RunError(f"{self.path / METRICS}: cannot write ({error.strerror}); make room, then --resume {self.path}")
