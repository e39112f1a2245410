"""`fedkseed status`: where a run is, for a person, a script or Prometheus."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from fedkseed.cli.console import complain, say
from fedkseed.runs.status import Status, prometheus, status_of


def status_command(run: Path, as_json: bool, as_prometheus: bool) -> None:
    """Print it.

    Raises:
        RunFolderError: there is no run.
    """
    status = status_of(run)
    if as_json:
        print(json.dumps({"state": status.state, **asdict(status)}))
    elif as_prometheus:
        print(prometheus(status), end="")
    else:
        _show(status)


def _show(status: Status) -> None:
    by = f" by process {status.process}" if status.process else ""
    rows = {"state": f"{status.state}{by}", "rounds": f"{status.round} of {status.num_rounds}, {status.algorithm}"}
    if status.last_event is not None:
        rows["last event"] = f"{max(0, time.time() - status.last_event):,.0f} s ago"
    if status.eval_loss is not None:
        rows["held-out loss"] = f"{status.eval_loss:.4f}; smallest {status.best_loss:.4f}, after round {status.best_round}"
    if status.num_replies is not None:
        named = {"refused": status.refused or [], "missing": status.missing or []}
        others = "".join(f"; {word}: {', '.join(names)}" for word, names in named.items() if names)
        rows["last round"] = f"{status.num_replies} replies in {status.seconds:,.1f} s{others}"
        rows["bytes"] = f"{status.bytes_down:,.0f} down and {status.bytes_up:,.0f} up, per client and round"
    for name, value in rows.items():
        say(f"{name:<16}{value}")
    if status.damage:
        complain(f"{status.damage}; it is left out")
