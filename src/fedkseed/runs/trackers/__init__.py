"""Where a run's numbers go beside `metrics.jsonl`: TensorBoard, trackio, W&B. Each is one file, loaded when it is asked for."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from fedkseed.errors import ConfigError, RunError, installing
from fedkseed.files import write_atomically
from fedkseed.text import named_line

if TYPE_CHECKING:
    from fedkseed.runs.folder import RunFolder


PROJECT = "fedkseed"
"""What trackers that know projects file runs under."""
IDENTITY = ".tracked"


class Tracker(Protocol):
    """What hears a run's events; a class of this kind is all that a new tracker needs, and a row below."""

    def event(self, event: dict[str, Any]) -> None:
        """What was just added to `metrics.jsonl`."""
        ...

    def close(self) -> None:
        """The run is over, or stops here."""
        ...


@dataclass(frozen=True)
class Row:
    """A tracker that can be asked for.

    Attributes:
        package: what must be installed, which is an extra of the same name as the tracker's.
        where: where the numbers go.
    """

    package: str
    where: str


TRACKERS = {
    "tensorboard": Row("tensorboardX", "RUN/tensorboard"),
    "trackio": Row("trackio", "this machine's trackio"),
    "wandb": Row("wandb", "Weights & Biases: numbers and settings leave this machine"),
}
"""By the name that `--log` takes, which is its module's too."""


def check_trackers(names: Iterable[str], said: str = "--log") -> tuple[str, ...]:
    """The names, each once, of trackers that are installed.

    Args:
        names: as a user gave them.
        said: the flag or setting that said them, for errors.

    Raises:
        ConfigError: one is unknown or not installed.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise ConfigError(f"{said} is {names!r:.80}; expected a list of names, such as ['tensorboard']")
    chosen = tuple(dict.fromkeys(names))
    for name in chosen:
        if name not in TRACKERS:
            raise ConfigError(f"{said} is {name!r}; expected one of {', '.join(TRACKERS)}")
        if find_spec(TRACKERS[name].package) is None:
            raise ConfigError(f"{said} {name} needs an extra; install it with: {installing(name)}, or leave {said} out")
    return chosen


@contextmanager
def tracking(
    names: Sequence[str], run: RunFolder, done: int, note: Callable[[str], None]
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What tells trackers of events, while a run goes on.

    One that cannot be opened ends the run before its first round. One that fails later is left out of the rest, with a line.

    Args:
        names: of `TRACKERS`.
        run: the run, whose checkpoint is on the disk when an event comes.
        done: rounds that were done before; what was logged of later ones is repeated.
        note: hears what went wrong.

    Raises:
        ConfigError: see `check_trackers`.
        RunError: a tracker cannot be opened.
    """
    with ExitStack() as stack:
        trackers: dict[str, Tracker] = {}
        for name in check_trackers(names):
            try:
                trackers[name] = import_module(f"{__name__}.{name}").open_tracker(run, done)
            except Exception as error:  # a tracker is somebody else's program and may raise anything
                raise RunError(f"--log {name} cannot be opened ({named_line(error)}); mend that, or leave it out") from error
            stack.callback(_close, name, trackers, note)

        def tell(event: dict[str, Any]) -> None:
            for name in list(trackers):
                try:
                    trackers[name].event(event)
                except Exception as error:  # as above: the run is worth more than its log
                    del trackers[name]
                    note(f"--log {name} failed ({named_line(error)}); the run goes on without it, {run.path} has all numbers")

        yield tell


def _close(name: str, trackers: dict[str, Tracker], note: Callable[[str], None]) -> None:
    try:
        if name in trackers:
            trackers[name].close()
    except Exception as error:  # as above
        note(f"--log {name} could not be closed ({named_line(error)})")


def tracked_id(run: RunFolder) -> str:
    """What a tracker knows a run by, wherever its folder is moved; made at first, and kept in the folder."""
    file = run.path / IDENTITY
    if not file.exists():
        write_atomically(file, secrets.token_hex(4).encode())
    return file.read_text(encoding="utf-8")


def numbers(event: dict[str, Any]) -> dict[str, float]:
    """An event's numbers by names such as `evaluation/eval_loss`; of clients that failed their count."""
    kind, rest = event["event"], {name: value for name, value in event.items() if name not in ("event", "server_round")}
    found = {f"{kind}/{name}": float(value) for name, value in rest.items() if isinstance(value, (int, float))}
    found |= {f"{kind}/seconds_by/{activity}": float(seconds) for activity, seconds in rest.get("seconds_by", {}).items()}
    return found | {f"{kind}/{name}": float(len(rest[name])) for name in ("refused", "missing") if name in rest}
