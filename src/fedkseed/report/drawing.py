"""What a run's pictures show: functions that make drawings of numbers, for `fedkseed.report.picture`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from fedkseed.report.picture import Draw, Palette
from fedkseed.report.units import power_of_ten, size

Array = NDArray[np.float64]

LINES = tuple((role, style) for style in ("-", "--", ":") for role in ("blue", "orange", "green", "purple", "grey"))
"""Colour and style of lines over one another; more cannot be told apart."""
DECADES = 30.0
"""Numbers that span more than this factor are drawn on a logarithmic axis."""


def _axes(figure: FigureBase, x: str, y: str) -> Axes:
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.set_axisbelow(True)
    axes.grid(axis="y", linewidth=0.8)
    axes.tick_params(length=3)
    return axes


def _round_axis(axes: Axes, first: int, last: int) -> None:
    pad = max(0.5, 0.02 * (last - first))
    axes.set_xlim(first - pad, last + pad)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))


def _whole_numbers(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_ylim(bottom=0)


def _legend(figure: Any, columns: int) -> None:
    """Above the axes, in as many columns as the labels leave room for."""
    legend = figure.legend(loc="outside upper left", ncols=columns)
    while columns > 1 and legend.get_window_extent().width > figure.bbox.width:
        legend.remove()
        columns -= 1
        legend = figure.legend(loc="outside upper left", ncols=columns)


def _markers(number: int) -> str | None:
    return "o" if number <= 60 else None


def _diverged(axes: Axes, palette: Palette, rounds: Sequence[int]) -> None:
    if rounds:
        where = axes.get_xaxis_transform()
        marks = [1.02] * len(rounds)
        axes.plot(rounds, marks, "x", color=palette.orange, transform=where, label="not finite: diverged", clip_on=False)


def _stack(axes: Axes, places: Sequence[int], parts: Sequence[tuple[str, Sequence[float], str]]) -> None:
    """Columns of parts on top of each other: (label, heights, colour) each."""
    bottom = np.zeros(len(places))
    close = len(places) > 60 and places[-1] - places[0] == len(places) - 1
    for label, heights, colour in parts:
        top = bottom + np.array(heights)
        if close:  # one shape each: hundreds of columns would take seconds, and show seams
            edges = np.arange(places[0], places[-1] + 2) - 0.5
            axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, label=label, linewidth=0)
        else:
            axes.bar(places, heights, 0.8, bottom=bottom, color=colour, label=label, linewidth=0)
        bottom = top


def held_out_loss(rounds: Sequence[int], losses: Sequence[float], diverged: Sequence[int]) -> Draw:
    """Loss by round; a line at the first one. Rounds of losses that are not finite are crosses."""

    def draw(figure: FigureBase, palette: Palette) -> None:
        axes = _axes(figure, "round", "held-out loss (nats per token)")
        if losses:
            axes.axhline(losses[0], color=palette.grey, linestyle=(0, (4, 3)), linewidth=1.2, label=f"at round {rounds[0]}")
            axes.plot(rounds, losses, color=palette.blue, marker=_markers(len(rounds)), label="held-out loss")
        _diverged(axes, palette, diverged)
        _round_axis(axes, min([*rounds, *diverged]), max([*rounds, *diverged]))
        _legend(figure, 3)

    return draw


def training_loss(
    rounds: Sequence[int], means: Sequence[float], clients: Sequence[Sequence[float]], diverged: Sequence[int]
) -> Draw:
    """The mean over the cohort by round, each client as a dot (up to 600 of them), and the band that holds them all."""

    def draw(figure: FigureBase, palette: Palette) -> None:
        axes = _axes(figure, "round", "training loss (nats per token)")
        spread = [(n, min(own), max(own)) for n, own in zip(rounds, clients, strict=True) if own]
        if spread:
            at, low, high = zip(*spread, strict=True)
            axes.fill_between(at, low, high, color=palette.blue, alpha=0.15, linewidth=0, label="least to greatest")
        dots = [(n, loss) for n, own in zip(rounds, clients, strict=True) for loss in own]
        if 0 < len(dots) <= 600:
            axes.plot(*zip(*dots, strict=True), ".", color=palette.blue, alpha=0.7, markersize=5, label="a client")
        if means:
            axes.plot(rounds, means, color=palette.blue, marker=_markers(len(rounds)), label="mean")
        _diverged(axes, palette, diverged)
        _round_axis(axes, min([*rounds, *diverged]), max([*rounds, *diverged]))
        _legend(figure, 3 if not diverged else 2)

    return draw


def bytes_by_round(rounds: Sequence[int], down: Sequence[float], up: Sequence[float], references: Mapping[str, float]) -> Draw:
    """Bytes per client on a log scale, and lines at the references."""

    def draw(figure: FigureBase, palette: Palette) -> None:
        axes = _axes(figure, "round", "bytes per client and round")
        axes.set_yscale("log")
        both = [d + u for d, u in zip(down, up, strict=True)]
        series = [("both ways", both, palette.blue, None), ("down", down, palette.green, "v"), ("up", up, palette.purple, "^")]
        for label, values, colour, marker in series:
            shown = [(n, v) for n, v in zip(rounds, values, strict=True) if v > 0]
            if shown:
                # the sum is wide, so that it shows behind whichever direction it is nearly equal to
                look = {"linewidth": 7, "alpha": 0.4} if marker is None else {"marker": marker if len(rounds) <= 60 else None}
                axes.plot(*zip(*shown, strict=True), color=colour, label=label, **look)
        for label, value in references.items():
            axes.axhline(value, color=palette.orange, linestyle=(0, (4, 3)), linewidth=1.4)
            axes.annotate(
                label, (1, value), (0, 3), xycoords=axes.get_yaxis_transform(), textcoords="offset points", ha="right"
            )
        values = [v for v in (*both, *down, *up, *references.values()) if v > 0]
        axes.set_ylim(10 ** math.floor(math.log10(min(values)) - 0.1), max(values) * 6)
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
        _round_axis(axes, min(rounds), max(rounds))
        _legend(figure, 3)

    return draw


def seed_use(counts: NDArray[np.int64]) -> Draw:
    """How many seeds were used how often, and what drawing each alike would give on average."""

    def draw(figure: FigureBase, palette: Palette) -> None:
        axes = _axes(figure, "times used", "number of seeds")
        least, most = int(counts.min()), int(counts.max())
        width = max(1, math.ceil((most - least + 1) / 40))
        first = max(0, least - 2 * width)
        edges = np.arange(first, most + width + 1, width) - 0.5
        axes.hist(counts, bins=edges.tolist(), color=palette.blue, alpha=0.75, rwidth=0.9, label="this run")
        expected = counts.size * _binomial(int(counts.sum()), 1 / counts.size, first, int(edges[-1] + 0.5))
        grouped = np.add.reduceat(expected, np.arange(0, expected.size, width))
        centres = (edges[:-1] + edges[1:]) / 2
        axes.plot(centres, grouped, "o", color=palette.orange, markersize=4, label="drawn uniformly (expected)")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        _whole_numbers(axes)
        _legend(figure, 2)

    return draw


def _binomial(number: int, p: float, first: int, stop: int) -> Array:
    """P(X = first .. stop - 1) of `number` draws that each hit with probability p."""
    if p >= 1:
        return np.array([float(k == number) for k in range(first, stop)])
    total = math.lgamma(number + 1)
    logs = [
        total - math.lgamma(k + 1) - math.lgamma(number - k + 1) + k * math.log(p) + (number - k) * math.log1p(-p)
        for k in range(first, min(stop, number + 1))
    ]
    return np.concatenate([np.exp(logs), np.zeros(stop - first - len(logs))])


def seed_probabilities(probabilities: Array) -> Draw:
    """Probabilities, largest first, as multiples of the uniform one; on the right as they are."""

    def draw(figure: FigureBase, palette: Palette) -> None:
        axes = _axes(figure, "seeds, most probable first", "probability ÷ uniform")
        number = probabilities.size
        ratios = np.sort(probabilities)[::-1] * number
        steps = np.arange(number + 1)
        axes.stairs(ratios, steps, baseline=1, fill=True, color=palette.blue, alpha=0.18)
        axes.stairs(ratios, steps, baseline=None, color=palette.blue, linewidth=2, label="FedKSeed-Pro")
        axes.axhline(1, color=palette.orange, linestyle=(0, (4, 3)), linewidth=1.4, label=f"uniform, 1 ÷ {number:,}")
        low, high = min(0.5, float(ratios.min()) * 0.9), max(1.6, float(ratios.max()) * 1.08)
        axes.set(xlim=(0, number), ylim=(low, high))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
        right = axes.secondary_yaxis("right", functions=(_scaled(100 / number), _scaled(number / 100)))
        right.set_ylabel("probability (%)")
        right.tick_params(length=3)
        right.yaxis.set_major_locator(MaxNLocator(nbins=5))
        _legend(figure, 2)

    return draw


def _scaled(factor: float) -> Callable[[Any], Any]:
    return lambda values: values * factor


def participation(accepted: Sequence[int], refused: Sequence[int], missing: Sequence[int]) -> Draw:
    """One column per client: rounds with an accepted reply, a refused one, none."""

    def draw(figure: FigureBase, palette: Palette) -> None:
        axes = _axes(figure, "clients, most often asked first", "rounds")
        parts = [
            ("accepted", accepted, palette.blue),
            ("refused", refused, palette.orange),
            ("no reply", missing, palette.grey),
        ]
        _stack(axes, range(1, len(accepted) + 1), [part for part in parts if any(part[1]) or part[0] == "accepted"])
        axes.set_xlim(0.4, len(accepted) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        _whole_numbers(axes)
        _legend(figure, 3)

    return draw


def coefficients(values: Array) -> Draw:
    """How the coefficients that are not zero are spread."""

    def draw(figure: FigureBase, palette: Palette) -> None:
        exponent = math.floor(math.log10(float(np.abs(values).max())))
        scaled = values / 10.0**exponent
        axes = _axes(figure, f"coefficient (in units of {power_of_ten(exponent)})", "number of seeds")
        bins = min(60, max(10, round(2 * math.sqrt(values.size))))
        axes.hist(scaled, bins=bins, color=palette.blue, alpha=0.75)
        axes.axvline(0, color=palette.orange, linestyle=(0, (4, 3)), linewidth=1.4)
        reach = float(np.abs(scaled).max()) * 1.05
        axes.set_xlim(-reach, reach)
        _whole_numbers(axes)

    return draw


def time_split(rounds: Sequence[int], seconds: Mapping[str, Sequence[float]]) -> Draw:
    """Seconds of each round, stacked by activity."""

    def draw(figure: FigureBase, palette: Palette) -> None:
        axes = _axes(figure, "round", "seconds")
        colours = [palette.blue, palette.orange, palette.green, palette.grey, palette.purple]
        parts = zip(seconds, seconds.values(), colours, strict=True)
        _stack(axes, rounds, list(parts))
        _round_axis(axes, min(rounds), max(rounds))
        axes.set_ylim(bottom=0)
        _legend(figure, 3)

    return draw


@dataclass(frozen=True)
class Curve:
    """A named line."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def curves(
    shown: Sequence[Curve],
    label: str,
    logarithmic: bool,
    y: str = "held-out loss",
    unit: Callable[[float], str] | None = None,
    wide: bool = False,
) -> Draw:
    """Lines over one another, such as losses of several methods against what they spent.

    Args:
        shown: the lines, in the order of `LINES`.
        label: of what is to the right.
        logarithmic: whether that is on a logarithmic axis, on which what cost nothing is left out.
        y: what is upwards.
        unit: how a number to the right is written; None for as it is.
        wide: whether what is upwards may span decades, and is on a logarithmic axis where it does.
    """

    def draw(figure: FigureBase, palette: Palette) -> None:
        axes = _axes(figure, label, y)
        for i, curve in enumerate(shown):
            points = [(x, value) for x, value in zip(curve.x, curve.y, strict=True) if x > 0 or not logarithmic]
            role, style = LINES[i % len(LINES)]
            if points:
                look = {"color": getattr(palette, role), "marker": _markers(len(points))}
                axes.plot(*zip(*points, strict=True), style, label=curve.name, **look)
        values = [value for curve in shown for value in curve.y if value > 0]
        if wide and values and max(values) > DECADES * min(values):
            axes.set_yscale("log")
        elif wide:
            axes.set_ylim(0, 1.08 * max(values, default=1.0))
        if logarithmic:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_xlim(left=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=unit is None))
        if unit is not None:
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: unit(value)))
        if len(shown) > 1:
            _legend(figure, 3)

    return draw
