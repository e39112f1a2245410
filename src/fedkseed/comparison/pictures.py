"""Curves of the held-out loss of a comparison's methods, against what they had spent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from fedkseed.comparison.measured import Measured, Point
from fedkseed.report.drawing import Curve, curves
from fedkseed.report.picture import render

AXES: dict[str, tuple[str, Callable[[Point], float], bool]] = {
    "loss_by_examples": ("examples seen, all clients", lambda point: point.examples, False),
    "loss_by_passes": (
        "forward passes of a record, all clients (backward: 2)",
        lambda point: point.passes,
        False,
    ),
    "loss_by_bytes": ("bytes moved, all clients, both ways", lambda point: point.num_bytes, True),
}


def pictures(runs: dict[str, list[Measured]]) -> dict[str, bytes]:
    """PNG files by name, of the runs of each method."""
    found = {}
    for name, (label, spent, logarithmic) in AXES.items():
        drawn = [_curve(method, ms, spent) for method, ms in runs.items() if ms]
        found[name] = render(name, "Held-out loss by method", curves(drawn, label, logarithmic)).png
    return found


def _curve(name: str, measured: Sequence[Measured], spent: Callable[[Point], float]) -> Curve:
    """The mean over seeds, point by point."""
    columns = list(zip(*(m.points for m in measured), strict=False))
    return Curve(name, [mean(map(spent, column)) for column in columns], [mean(p.loss for p in column) for column in columns])
