"""A run's folder as typed numbers: read once, checked, never written to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fedkseed.kseed.ledger import Ledger
from fedkseed.runs.answers import Answer, kept_answers, of_ledger_or_round
from fedkseed.runs.folder import RunFolder
from fedkseed.runs.layout import METRICS
from fedkseed.runs.settings import RunConfig
from fedkseed.text import one_line

LARGEST_LOSS = 1e30
"""A loss beyond this is divergence like NaN, and more than a chart's arithmetic bears."""


@dataclass(frozen=True)
class Evaluation:
    """The held-out records under the model after a round; round 0 is the base model."""

    server_round: int
    loss: float
    num_examples: int | None
    seconds: float
    reward: float | None = None

    @property
    def finite_reward(self) -> float | None:
        """The mean score, of a run that is tuned on scores or preferences, if it is a number."""
        return self.reward if self.reward is not None and is_finite(self.reward) else None


@dataclass(frozen=True)
class Round:
    """One closed round.

    Bytes are means per client, seconds include the clients' work, steps are of the whole cohort. The last seven are as
    `metrics.jsonl` has them (docs/federation.md), `counted` by client; None or empty in runs of before, and of algorithms and
    rules that have none.
    """

    server_round: int
    train_loss: float | None
    client_losses: Mapping[str, float | None]
    refused: Mapping[str, str]
    missing: tuple[str, ...]
    dropped_steps: int
    bytes_down: float
    bytes_up: float
    seconds: float
    seconds_by: Mapping[str, float]
    num_steps: int | None
    peak_bytes: int | None
    projected_grad_rms: float | None = None
    change_norm: float | None = None
    moved_rms: float | None = None
    clipped_scalars: int | None = None
    counted: Mapping[str, float] = field(default_factory=dict)
    epsilon: float | None = None
    train_reward: float | None = None

    @property
    def num_asked(self) -> int:
        """How many clients were sent a request."""
        return self.num_answered + len(self.missing)

    @property
    def num_answered(self) -> int:
        """How many clients sent a reply, accepted or not."""
        return len(self.client_losses.keys() | self.refused.keys())

    def finite_losses(self) -> list[float]:
        """The clients' own losses, without those that are missing or not finite."""
        return [loss for loss in self.client_losses.values() if loss is not None and is_finite(loss)]


T = TypeVar("T", Evaluation, Round)


@dataclass(frozen=True)
class RunRecord:
    """All that a run's folder says.

    Attributes:
        config: the settings; the data files that they name need not exist any more.
        num_clients: how many there were, as far as is known.
        evaluations: by round, ascending.
        rounds: by round, ascending; none beyond the ledger's.
        ledger: None before the first round is done.
        weight_bytes: size of all float weights in the run's precision; None if the run did not note it.
        damage: what of its events cannot be read and is left out; None if that is nothing.
        answers: a few of the base model and of the checkpoint's, where they were asked for.
    """

    config: RunConfig
    num_clients: int | None
    evaluations: tuple[Evaluation, ...]
    rounds: tuple[Round, ...]
    ledger: Ledger | None
    ledger_size: int
    weight_bytes: int | None
    damage: str | None = None
    answers: tuple[Answer, ...] = ()

    @property
    def rounds_done(self) -> int:
        """How many rounds have been closed."""
        return self.ledger.round if self.ledger else max((r.server_round for r in self.rounds), default=0)

    @property
    def finished(self) -> bool:
        """Whether all rounds that were asked for are done."""
        return self.rounds_done >= self.config.num_rounds

    @property
    def diverged_at(self) -> int | None:
        """The first round with a loss that is not a number; None if there is none."""
        held_out = [e.server_round for e in self.evaluations if not is_finite(e.loss)]
        training = [r.server_round for r in self.rounds if r.train_loss is not None and not is_finite(r.train_loss)]
        return min(held_out + training, default=None)


def is_finite(loss: float) -> bool:
    """Whether a loss is a number that can be drawn."""
    return math.isfinite(loss) and abs(loss) < LARGEST_LOSS


def read(path: Path, which: str | int | None = None) -> RunRecord:
    """Read a run's folder.

    Args:
        path: the folder.
        which: as it was after a round, or "best"; None for as it is.

    Raises:
        RunFolderError: there is no run, or it keeps no ledger of that round.
        ConfigError: its settings are not valid (any more).
        RunError: its settings cannot be read.
        LedgerError: its ledger is damaged or of another version.
    """
    run = RunFolder.open(path)
    # the ledger first: a run that goes on meanwhile can then only add events that are left out below
    file = run.ledger_path if which is None else run.tuned_file(which)
    ledger = Ledger.load(file) if file.exists() else None
    found = run.recorded()
    damage, last = found.damage, ledger.round if ledger else math.inf
    evaluations, rounds, sizes = list[Evaluation](), list[Round](), list[int]()
    for event in found.events:
        if event["server_round"] > last:
            continue
        try:
            if "weight_bytes" in event:
                sizes.append(_count(event, "weight_bytes"))
            if event["event"] == "evaluation":
                evaluations.append(_evaluation(event))
            elif event["event"] == "round":
                rounds.append(_round(event))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            where = f"{event['event']} {event['server_round']} of {path / METRICS}"
            damage = damage or f"{where} cannot be read ({_cause(error)})"
    closed = _ascending(rounds)
    done = ledger.round if ledger else max((r.server_round for r in closed), default=0)
    return RunRecord(
        run.config,
        run.num_clients,
        _ascending(evaluations),
        closed,
        ledger,
        file.stat().st_size if ledger else 0,
        sizes[0] if sizes else None,
        damage,
        kept_answers(path, of_ledger_or_round(ledger, done)),
    )


def _evaluation(event: dict[str, Any]) -> Evaluation:
    return Evaluation(
        server_round=_count(event, "server_round"),
        loss=_loss(event["eval_loss"]),
        num_examples=_count(event, "num_examples") if "num_examples" in event else None,
        seconds=_number(event, "seconds") if "seconds" in event else 0.0,
        reward=None if event.get("eval_reward") is None else _loss(event["eval_reward"]),
    )


SIZES = ("projected_grad_rms", "change_norm", "moved_rms", "epsilon")


def _round(event: dict[str, Any]) -> Round:
    by = event.get("seconds_by", {})
    loss = event.get("train_loss")
    clients = {str(name): client.get("loss") for name, client in event.get("clients", {}).items()}
    return Round(
        server_round=_count(event, "server_round"),
        train_loss=None if loss is None else _loss(loss),
        client_losses={name: None if value is None else _loss(value) for name, value in clients.items()},
        refused={str(name): str(reason) for name, reason in event.get("refused", {}).items()},
        missing=tuple(str(name) for name in event.get("missing", [])),
        dropped_steps=_count(event, "dropped_steps"),
        bytes_down=_number(event, "bytes_down"),
        bytes_up=_number(event, "bytes_up"),
        seconds=_number(event, "seconds"),
        seconds_by={str(activity): _number(by, activity) for activity in by},
        num_steps=_count(event, "num_steps") if "num_steps" in event else None,
        peak_bytes=_count(event, "peak_bytes") if "peak_bytes" in event else None,
        clipped_scalars=_count(event, "clipped_scalars") if "clipped_scalars" in event else None,
        counted={
            str(name): _number(client, "counted") for name, client in event.get("clients", {}).items() if "counted" in client
        },
        train_reward=None if event.get("train_reward") is None else _loss(event["train_reward"]),
        **{name: _number(event, name) for name in SIZES if event.get(name) is not None},
    )


def _loss(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a loss is {value!r}")
    return float(value)


def _number(event: Mapping[str, Any], name: str) -> float:
    value = event[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value!r}")
    return float(value)


def _count(event: Mapping[str, Any], name: str) -> int:
    value = _number(event, name)
    if value != int(value):
        raise ValueError(f"{name} is {value!r}")
    return int(value)


def _ascending(events: Iterable[T]) -> tuple[T, ...]:
    """By round; of two events of one round, the later counts."""
    latest = {event.server_round: event for event in events}
    return tuple(latest[server_round] for server_round in sorted(latest))


def _cause(error: Exception) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else one_line(error, 80)
