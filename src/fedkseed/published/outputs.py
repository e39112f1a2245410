"""The files that the published code writes with --log: `config.yaml`, `results.json`, `final_eval.json`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from fedkseed.errors import RunFolderError
from fedkseed.files import write_atomically
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.metrics import for_json
from fedkseed.runs.observer import Observer

CONFIG, RESULTS, FINAL = "config.yaml", "results.json", "final_eval.json"


def write_flags(folder: Path, args: argparse.Namespace) -> None:
    """`config.yaml`: the published flags as they were given."""
    flags = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    _write(folder / CONFIG, yaml.safe_dump(flags))


def read_flags(folder: Path) -> argparse.Namespace:
    """The flags that a run was started with.

    Raises:
        RunFolderError: the folder has no readable `config.yaml`.
    """
    try:
        flags = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        return argparse.Namespace(**flags)
    except (OSError, yaml.YAMLError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise RunFolderError(
            f"{folder} has no readable {CONFIG}; give a folder that main.py made, or use fedkseed simulate --resume"
        ) from error


def write_results(run: RunFolder) -> None:
    """`results.json`: the held-out loss of the base model and after each round, under the published name `eval_avg_acc`."""
    _write(run.path / RESULTS, _json({"eval_avg_acc": list(run.recorded().losses.values())}))


def write_final(folder: Path, metric: str, value: float) -> None:
    """`final_eval.json`: the metric of the tuned model."""
    _write(folder / FINAL, _json({f"final_eval_{metric}": value}))


class ResultsWriter:
    """Another observer, and `results.json` after each evaluation."""

    def __init__(self, inner: Observer, run: RunFolder) -> None:
        self._inner, self._run = inner, run
        self.note, self.progress, self.probe = inner.note, inner.progress, inner.probe

    def event(self, event: dict[str, Any]) -> None:
        """See `fedkseed.runs.observer.Observer`."""
        self._inner.event(event)
        if event["event"] == "evaluation":
            write_results(self._run)


def _json(content: dict[str, Any]) -> str:
    """JSON has no NaN, such as of a divergence: null stands for it, as in `metrics.jsonl`."""
    return json.dumps(for_json(content), allow_nan=False)


def _write(path: Path, text: str) -> None:
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror}); make room, then --resume {path.parent}") from error
