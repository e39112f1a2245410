"""The events of a run's `metrics.jsonl`, as far as they can be read: a run needs none of them to go on."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkseed.text import one_line

NEEDED = {"evaluation": ("eval_loss",), "round": ("dropped_steps", "bytes_down", "bytes_up", "seconds")}
"""The numbers without which an event of a kind tells nothing."""
MOST = 2.0**63
"""There are no more rounds, and none takes more replies, bytes or seconds."""
KINDS = {"refused": dict, "missing": list, "num_replies": int, "seconds_by": dict}
"""What else an event may hold, and as what."""


@dataclass(frozen=True)
class Metrics:
    """What a file of events holds.

    Attributes:
        events: those that can be read, in order.
        damage: what cannot be read, in a few words; None if that is nothing.
    """

    events: tuple[dict[str, Any], ...] = ()
    damage: str | None = None

    @property
    def losses(self) -> dict[int, float]:
        """The held-out loss by round, in the order of the evaluations."""
        return {e["server_round"]: e["eval_loss"] for e in self.events if e["event"] == "evaluation"}

    @property
    def rewards(self) -> dict[int, float]:
        """The held-out reward by round, of a run that is tuned on scores."""
        return {e["server_round"]: e["eval_reward"] for e in self.events if type(e.get("eval_reward")) in (int, float)}


def event_line(event: dict[str, Any]) -> str:
    """An event as a line of the file: JSON, which has no NaN and no infinity; null stands for both."""
    return json.dumps(for_json(event), allow_nan=False) + "\n"


def for_json(value: Any) -> Any:
    """What JSON can hold of a value: null in place of each number that is none."""
    if isinstance(value, dict):
        return {name: for_json(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [for_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> Metrics:
    """Read a file of events; a last line that a kill left unfinished is no damage, and no file is no event."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return Metrics()
    except OSError as error:
        return Metrics(damage=f"{path} cannot be read ({error.strerror})")
    events, wrong = [], []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(_event(line))
        except (ValueError, RecursionError) as error:
            wrong.append(f"line {number}: {one_line(error, 80)}")
    if not wrong:
        return Metrics(tuple(events))
    count = "1 line" if len(wrong) == 1 else f"{len(wrong)} lines"
    return Metrics(tuple(events), f"{count} of {path} cannot be read ({wrong[0]})")


def best_round(losses: dict[int, float]) -> int | None:
    """The round with the smallest held-out loss, the first of several; None if no loss is a number."""
    finite = {server_round: loss for server_round, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=lambda server_round: (finite[server_round], server_round), default=None)


def _event(line: bytes) -> dict[str, Any]:
    event = json.loads(line.decode("utf-8"))
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError("no event")
    if type(event.get("server_round")) is not int or event["server_round"] < 0:
        raise ValueError(f"server_round is {event.get('server_round')!r:.40}")
    if event.get("eval_loss", 0) is None:
        event["eval_loss"] = math.nan
    for name in NEEDED.get(event["event"], ()):
        if name not in event:
            raise ValueError(f"{name} is missing")
        if type(event[name]) not in (int, float) or (name != "eval_loss" and not abs(event[name]) <= MOST):
            raise ValueError(f"{name} is {event[name]!r:.40}")
    for name, kind in KINDS.items():
        if not isinstance(event.get(name), (kind, type(None))):
            raise ValueError(f"{name} is {event[name]!r:.40}")
    if not all(isinstance(client, str) for client in event.get("missing") or ()):
        raise ValueError(f"missing is {event['missing']!r:.40}")
    for name in ("server_round", "num_replies", "eval_loss"):
        if type(event.get(name)) is int and abs(event[name]) > MOST:  # of any length; a float has its own bounds
            raise ValueError(f"{name} is {event[name]!r:.40}")
    return event
