"""What the files of a run's folder are called, beside its checkpoint, and the settings that one of them holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedkseed.errors import RunError, RunFolderError
from fedkseed.federation.algorithms import ALGORITHMS
from fedkseed.files import read_toml
from fedkseed.runs.settings import BEFORE, DEALING, DRIVER, without_void

CONFIG, METRICS, LOCK, LEDGERS, AUDIT = "config.toml", "metrics.jsonl", ".lock", "ledgers", "audit.jsonl"


def read_settings(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run's `config.toml` says, or an old one leaves unsaid: the settings, and the driver's notes.

    Raises:
        RunFolderError: there is no run.
        RunError: the file cannot be read, or is not TOML.
    """
    file = path / CONFIG
    try:
        settings = read_toml(file)
    except FileNotFoundError as error:
        raise RunFolderError(f"{path} holds no run (no {CONFIG}); start one with fedkseed simulate --run {path}") from error
    except OSError as error:
        raise RunFolderError(f"{file}: cannot read the run's settings ({error.strerror}); give a run's folder") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise RunError(f"{file} is not TOML ({error}); restore it from a copy") from error
    driver = settings.pop(DRIVER, {})
    if driver and "data" not in settings:  # runs on Flower once noted how records are dealt out, which none were
        settings = {name: value for name, value in settings.items() if name not in DEALING}
    algorithm = ALGORITHMS.get(str(settings.get("algorithm")))
    before = {name: value for name, value in BEFORE.items() if algorithm is None or algorithm.takes(name)}
    return before | without_void(settings), driver if isinstance(driver, dict) else {}
