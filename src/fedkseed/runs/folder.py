"""A run on disk: `config.toml`, `metrics.jsonl` and a checkpoint, which is `ledger.safetensors` or `tensors.safetensors`.

The last of these plus the config is everything. `ledgers/` keeps the ledger of each evaluation, in its published form.
"""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tomli_w

from fedkseed.errors import ConfigError, RunError, RunFolderError
from fedkseed.federation import Checkpoint
from fedkseed.files import Lock, write_atomically
from fedkseed.kseed.ledger import LEDGER, Ledger
from fedkseed.runs.checkpoints import FILES, file_of, load_checkpoint
from fedkseed.runs.layout import AUDIT, CONFIG, LEDGERS, LOCK, METRICS, read_settings
from fedkseed.runs.ledgers import KeptLedgers
from fedkseed.runs.metrics import Metrics, best_round, event_line, read_metrics
from fedkseed.runs.settings import DRIVER, WORDS, RunConfig, SimulationConfig
from fedkseed.runs.validation import validated
from fedkseed.text import counted

BEST = "best"
"""In place of a round's number: the one with the smallest held-out loss."""


def new_folder(root: Path, prefix: str = "") -> Path:
    """Where a run goes that was given no folder: the time, and random digits, since a grid may start many in one second."""
    return root / f"{prefix}{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


class RunFolder:
    """The folder of one run; made by `create`, opened again by `open`.

    Attributes:
        path: where it is.
        config: the settings: a `SimulationConfig` where the clients were simulated.
        driver: what the driver of the rounds noted beside them; empty for `fedkseed simulate`.
        made_with: what the checkpoints that are saved here say of their settings and records.
    """

    def __init__(self, path: Path, config: RunConfig, driver: Mapping[str, Any] | None = None) -> None:
        self.path, self.config, self.driver = path, config, dict(driver or {})
        self.made_with: Mapping[str, Any] | None = None

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> RunFolder:
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
        for name in (CONFIG, METRICS, AUDIT, LEDGERS, *FILES.values()):
            if exists(path / name):
                remedy = f"go on with --resume {path}" if exists(path / CONFIG) else f"give it its {CONFIG} back"
                raise RunFolderError(f"{path} holds a run already ({name}); {remedy}, or choose another --run")

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """The run in a folder, with the settings that it was started with; files that they name need not exist any more.

        Raises:
            RunFolderError: there is no run.
            RunError: its settings cannot be read.
            ConfigError: its settings are not valid (any more).
        """
        settings, driver = read_settings(path)
        simulated = "data" in settings or not driver
        return cls(path, validated(SimulationConfig if simulated else RunConfig, settings, WORDS, stored=True), driver)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Be the one process that writes to the folder; nested calls are fine.

        Raises:
            RunFolderError: another process is.
            RunError: the folder cannot be written.
        """
        lock = Lock(self.path / LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            holder = lock.acquire()
        except OSError as error:
            raise RunError(f"{self.path}: cannot write the run folder ({error.strerror}); choose another --run") from error
        if holder is not None:
            raise RunFolderError(
                f"{self.path} is being written by process {holder or 'of another user'}; wait until it is done, or end it first"
            )
        try:
            yield
        finally:
            lock.release()

    @property
    def ledger_path(self) -> Path:
        """Where a ledger is, if the algorithm has one."""
        return self.path / LEDGER

    @property
    def checkpoint_path(self) -> Path:
        """Where the algorithm's checkpoint is, whichever it is."""
        return self.path / file_of(self.config.facts)

    @property
    def simulation(self) -> SimulationConfig:
        """The settings, of a run whose clients were simulated.

        Raises:
            RunFolderError: they were not.
        """
        if not isinstance(self.config, SimulationConfig):
            raise RunFolderError(
                f"{self.path} is a run on Flower, whose records are its clients' own: go on with it by starting its app again "
                f"with run = {self.path}; fedkseed evaluate {self.path} takes --data"
            )
        return self.config

    @property
    def num_clients(self) -> int | None:
        """How many clients there were, as far as the settings or the driver say."""
        if "clients" in self.driver:
            return len(self.driver["clients"])
        return self.config.num_clients if isinstance(self.config, SimulationConfig) else None

    def write_config(self, config: RunConfig, driver: Mapping[str, Any] | None = None) -> None:
        """Replace the settings, such as after more rounds were asked for, and what the driver notes unless that is None."""
        if driver is not None:
            self.driver = dict(driver)
        noted = {name: value for name, value in self.driver.items() if value is not None}
        settings = settings_of(config) | ({DRIVER: noted} if noted else {})
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path / CONFIG, tomli_w.dumps(settings).encode())
        except OSError as error:
            raise RunError(f"{self.path}: cannot write the run folder ({error.strerror}); choose another --run") from error
        self.config = config

    def load_ledger(self) -> Ledger | None:
        """The last ledger; None before the first round is done, or where the algorithm has none."""
        return Ledger.load(self.ledger_path) if self.ledger_path.exists() else None

    def load_checkpoint(self) -> Checkpoint | None:
        """Where the run is, whichever its algorithm; None before the first round is done.

        Raises:
            RunFolderError: the folder holds the checkpoint of another kind of algorithm, or has lost its own.
            FedKSeedError: it cannot be read.
        """
        if self.checkpoint_path.exists():
            return load_checkpoint(self.checkpoint_path)
        for file in set(FILES.values()):
            if (self.path / file).exists():
                raise RunFolderError(
                    f"{self.path} holds {file}, which --algorithm {self.config.algorithm} does not make; go on with the run's "
                    "own settings, or choose another --run"
                )
        self._check_not_lost()
        return None

    def _check_not_lost(self) -> None:
        """Refuse to be before the first round where some were done: who goes on would delete what is left of them."""
        events = (event["server_round"] for event in self.recorded().events if event["event"] == "round")
        done = max([*self.ledgers.rounds, *(number - 1 for number in events)], default=0)  # an event is written first
        if done > 0:
            raise RunFolderError(
                f"{self.path} has lost its {self.checkpoint_path.name}: {counted(done, 'round')} or more were done; restore it "
                "from a copy, or choose another --run"
            )

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint.

        Raises:
            FedKSeedError: it cannot be written; the old one is as it was.
        """
        checkpoint.stamped(self.made_with).save(self.checkpoint_path)

    def is_complete(self) -> bool:
        """Whether all rounds are done and written down, so that there is nothing to go on with.

        Raises:
            FedKSeedError: the checkpoint cannot be read, or is of another kind of algorithm.
        """
        checkpoint = self.load_checkpoint()
        if checkpoint is None or checkpoint.round < self.config.num_rounds:
            return False
        found = self.recorded()
        if found.damage is not None or checkpoint.round not in found.losses:
            return False
        return (self.path / METRICS).read_bytes().endswith(b"\n")  # else a kill left a part of a line, which a resume cuts

    @property
    def ledgers(self) -> KeptLedgers:
        """The ledgers of its evaluations."""
        return KeptLedgers(self.path / LEDGERS)

    def tuned_file(self, which: str | int | None = None) -> Path:
        """The file of the tuned model: the checkpoint, or the ledger of a round.

        Args:
            which: the round's number, or "best"; None for the checkpoint.

        Raises:
            ConfigError: it is neither, or the algorithm keeps no ledgers.
            RunFolderError: no round is done yet, the checkpoint is lost, or the ledger of this round is not kept.
        """
        saved = self.checkpoint_path.exists()
        if not saved and (which is None or not self.ledgers.rounds):
            self._check_not_lost()
            raise RunFolderError(f"{self.path} has no {self.checkpoint_path.name} yet: no round is done; --resume it first")
        if which is None:
            return self.checkpoint_path
        if not self.config.facts.has_ledger:
            raise ConfigError(f"--round: {self.path} is the run of a baseline, which keeps its last tensors only; leave it out")
        wanted = best_round(self.recorded().losses) if which == BEST else which
        if wanted is None:
            raise RunFolderError(f"--round best: {self.path} has no held-out loss that is a number; give a round's number")
        if not str(wanted).isdecimal():
            raise ConfigError(f"--round is {str(which)!r}; expected the number of a round, or best")
        server_round = int(wanted)
        if (kept := self.ledgers.path(server_round)).exists():
            return kept
        if saved and Ledger.load(self.checkpoint_path).round == server_round:  # of a run that was begun when none were kept
            return self.checkpoint_path
        rounds = ", ".join(map(str, self.ledgers.rounds)) or "none"
        raise RunFolderError(f"--round {which}: {self.path} keeps no ledger of round {wanted}; those that it keeps: {rounds}")

    def recorded(self) -> Metrics:
        """What `metrics.jsonl` holds, and what of it is damaged."""
        return read_metrics(self.path / METRICS)

    def metrics(self) -> list[dict[str, Any]]:
        """All events so far that can be read."""
        return list(self.recorded().events)

    def append_metrics(self, event: dict[str, Any]) -> None:
        """Add an event, on the disk when this returns.

        Raises:
            RunError: it cannot be written; the ledger is safe.
        """
        try:
            with (self.path / METRICS).open("a", encoding="utf-8") as file:
                file.write(event_line(event))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def cut_metrics(self, server_round: int) -> str | None:
        """Forget the events after a round: what a killed run wrote after its last checkpoint.

        Returns:
            What was damaged, and where that lies now; None if nothing was.

        Raises:
            RunError: the file cannot be written; the checkpoint is safe.
        """
        path, found = self.path / METRICS, self.recorded()
        kept = [event for event in found.events if event["server_round"] <= server_round]
        try:
            aside = _set_aside(path) if found.damage else None
            write_atomically(path, "".join(map(event_line, kept)).encode())
        except OSError as error:
            raise self._cannot_write(error) from error
        return found.damage and f"{found.damage}; all of it is kept as {aside}, and the run goes on from its checkpoint"

    def _cannot_write(self, error: OSError) -> RunError:
        return RunError(f"{self.path / METRICS}: cannot write ({error.strerror}); make room, then --resume {self.path}")


def tuned_file(path: Path, which: str | int | None = None) -> Path:
    """The file of a tuned model: of a run's folder see `RunFolder.tuned_file`; else the path itself.

    Raises:
        RunFolderError: there is nothing, or no run, or see there.
        ConfigError: a round is asked for of what is no run, or see there.
        RunError: the run's settings cannot be read.
    """
    if exists(path / CONFIG):
        return RunFolder.open(path).tuned_file(which)
    if which is not None:
        raise ConfigError(f"--round is of a run's folder, which {path} is not; leave it out")
    if path.is_dir():  # a ledger or tensors that somebody has put there
        kept = [path / file for file in FILES.values() if (path / file).exists()]
        if kept:
            return kept[-1]
        read_settings(path)  # which says what is missing
    if not path.exists():
        raise RunFolderError(f"{path}: no such run or ledger; give a run's folder, or a ledger's file")
    return path


def exists(path: Path) -> bool:
    """Whether there is something of that name.

    Raises:
        RunFolderError: one cannot look there.
    """
    try:
        return path.exists()
    except OSError as error:
        raise RunFolderError(f"{path}: cannot look there ({error.strerror}); give a folder that this user may enter") from error


def _set_aside(path: Path) -> str:
    """Keep a damaged file, or what lies in its place, under another name."""
    aside = next(name for n in itertools.count(1) if not (name := path.with_name(f"{path.name}.damaged-{n}")).exists())
    try:
        write_atomically(aside, path.read_bytes())  # a copy: what can be read of it is there until it is written anew
    except OSError:
        path.rename(aside)
    return aside.name


def settings_of(config: RunConfig) -> dict[str, Any]:
    """The settings that a run's `config.toml` holds: those that its algorithm takes, but not what is None."""
    dumped = config.model_dump(mode="json", include=set(_kind_of(config).model_fields)).items()
    return {name: value for name, value in dumped if value is not None and config.facts.takes(name)}


def _kind_of(config: RunConfig) -> type[RunConfig]:
    """Without what a driver adds."""
    return SimulationConfig if isinstance(config, SimulationConfig) else RunConfig
