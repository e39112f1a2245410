"""Several runs over one another: one page with their curves, what each came to, and the settings in which they differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedkseed.report import drawing, units
from fedkseed.report.chart import BYTES, CHANGE, GRADIENT, LOSS, MOVED, REWARD, TIME, Chart, absent
from fedkseed.report.drawing import LINES, Curve
from fedkseed.report.markup import Html, Text, document, figures, quiet, table, tag
from fedkseed.report.reading import Round, RunRecord, is_finite
from fedkseed.report.summary import Spent, before_and_after, change, spent, traffic
from fedkseed.text import counted, visible

LONGEST_NAME = 24
UNLIKE = 20.0
"""Where runs spent amounts that differ by more than this factor, the axis is logarithmic."""
CHARTS = frozenset(
    f"compared_{name}" for name in ("reward", "loss", "loss_by_bytes", "loss_by_time", "gradients", "changes", "distance")
)


def names_of(runs: Sequence[Path]) -> list[str]:
    """What to call each: the end of its path that no other has."""
    parts = [run.resolve().parts for run in runs]
    for length in range(1, 1 + max(map(len, parts))):
        names = [str(Path(*part[-length:])) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(run) for run in runs]


def charts_of(records: Mapping[str, RunRecord]) -> list[Chart]:
    """The charts that runs have in common, in the order of the page."""
    points = {name: spent(record) for name, record in records.items()}
    unit_of_time, each = units.time_unit(max((p.seconds for own in points.values() for p in own), default=0.0))
    losses: dict[str, tuple[str, str, Callable[[float], str] | None, Callable[[Spent], float]]] = {
        "compared_loss": ("Held-out loss by round", "round", None, lambda p: p.server_round),
        "compared_loss_by_bytes": ("Held-out loss by bytes", BYTES, units.size, lambda p: p.num_bytes),
        "compared_loss_by_time": (
            "Held-out loss by time", f"{TIME} ({unit_of_time})", "{:g}".format, lambda p: p.seconds / each,
        ),
    }  # fmt: skip
    made = []
    rewards = {
        run: [(e.server_round, e.finite_reward) for e in record.evaluations if e.finite_reward is not None]
        for run, record in records.items()
    }
    if any(rewards.values()):
        curves = [Curve(_short(run), [n for n, _ in own], [reward for _, reward in own]) for run, own in rewards.items()]
        caption = "Of held-out records; comparable between runs of one objective."
        made.append(_chart("compared_reward", "Held-out reward by round", curves, "round", REWARD, None, caption))
    for name, (title, label, unit, where) in losses.items():
        curves = [Curve(_short(run), [where(p) for p in own], [p.loss for p in own]) for run, own in points.items()]
        caption = "Further down is better, further left is cheaper." if unit else "At equal rounds, whatever a round cost."
        made.append(_chart(name, title, curves, label, LOSS, unit, caption))
    by_round: dict[str, tuple[str, str, Callable[[Round], float | None], str]] = {
        "compared_gradients": (
            "Projected gradients by round", GRADIENT, lambda r: r.projected_grad_rms, "The scalars of two-point steps.",
        ),
        "compared_changes": (
            "Changes by round", CHANGE, lambda r: r.change_norm, "The length of a client's change of the K coefficients.",
        ),
        "compared_distance": (
            "Distance from the base by round", MOVED, lambda r: r.moved_rms,
            "Runs that end at one loss with less distance have kept more of the base model.",
        ),
    }  # fmt: skip
    for name, (title, label, value, caption) in by_round.items():
        curves = []
        for run, record in records.items():
            shown = [(r.server_round, found) for r in record.rounds if (found := value(r)) is not None]
            curves.append(Curve(_short(run), [n for n, _ in shown], [y for _, y in shown]))
        if any(curve.x for curve in curves):
            made.append(_chart(name, title, curves, "round", label, None, caption, wide=True))
    return made


def _chart(
    name: str,
    title: str,
    curves: Sequence[Curve],
    label: str,
    y: str,
    unit: Callable[[float], str] | None,
    caption: str,
    wide: bool = False,
) -> Chart:
    ends = [curve.x[-1] for curve in curves if curve.x and curve.x[-1] > 0]
    if not ends:
        return absent(name, title, "None of the runs has two evaluations yet.")
    logarithmic = unit is not None and max(ends) > UNLIKE * min(ends)
    if logarithmic:
        caption += " The base model, which cost nothing, is not on this logarithmic axis."
    alt = "; ".join(
        f"{curve.name}: {curve.y[-1]:.4g} at {unit(curve.x[-1]) if unit else f'round {curve.x[-1]:.0f}'}"
        for curve in curves
        if curve.x
    )
    draw = drawing.curves(curves, label, logarithmic, y, unit, wide)
    return Chart(name, title, f"Lines of {title.lower()}, at the end of each {alt}.", caption, draw)


def _short(name: str) -> str:
    """A name for a legend, which matplotlib reads as neither mathematics nor a hidden line."""
    shown = visible(name)
    shown = shown if len(shown) <= LONGEST_NAME else f"\N{HORIZONTAL ELLIPSIS}{shown[1 - LONGEST_NAME :]}"
    return shown.replace("$", r"\$").lstrip("_") or "run"


def page(records: Mapping[str, RunRecord], charts: Sequence[Chart], pictures: Mapping[str, str]) -> str:
    """The whole page; `pictures` are the charts' SVG by name."""
    cards = [_card(i, name, record) for i, (name, record) in enumerate(records.items())]
    title = f"{len(records)} runs"
    return document(
        title,
        [
            tag("header", [tag("h1", f"{title} over one another"), tag("div", cards, class_="cards")]),
            tag("main", [*figures(charts, pictures), *_differences(records)]),
        ],
    )


def _card(place: int, name: str, record: RunRecord) -> Html:
    role, style = LINES[place % len(LINES)]
    dash = {"-": "solid", "--": "dashed", ":": "dotted"}[style]
    line = tag("span", "", class_="line", style=f"border-top-color: var(--{role}); border-top-style: {dash}")
    config, (before, after) = record.config, before_and_after(record)
    figure = units.NONE
    told = ["not evaluated after a round yet"]
    if after is not None:
        figure = units.loss(after.loss)
        percent = change(before.loss, after.loss) if before else None
        start = f" from {units.loss(before.loss)}" if before else ""
        told = [f"held-out loss after round {after.server_round}{start}" + (f", {units.percent(percent)}" if percent else "")]
        finite = [e for e in record.evaluations if is_finite(e.loss) and e.server_round]
        best = min(finite, key=lambda e: e.loss, default=None)
        if best is not None and best.server_round != after.server_round:
            told.append(f"best: {units.loss(best.loss)} after round {best.server_round}")
    if after is not None and after.finite_reward is not None:
        start = f" from {before.finite_reward:.3f}" if before and before.finite_reward is not None else ""
        told.append(f"held-out reward ({config.objective}) {after.finite_reward:.3f}{start}")
    moved = traffic(record.rounds)
    if moved is not None:
        told.append(f"{units.amount(moved.both)} per client and round, {units.size(moved.total)} in all")
    seconds = sum(r.seconds for r in record.rounds)
    told.append(
        f"{record.rounds_done} of {counted(config.num_rounds, 'round')}" + (f" in {units.duration(seconds)}" if seconds else "")
    )
    refused, missing = (sum(len(getattr(r, kind)) for r in record.rounds) for kind in ("refused", "missing"))
    dropped = sum(r.dropped_steps for r in record.rounds)
    lost = {"refused": refused, "not come": missing}
    told += [f"{counted(count, 'reply', 'replies')} {how}" for how, count in lost.items() if count]
    told += [f"{counted(dropped, 'step')} dropped"] if dropped else []
    lines = [tag("dd", text, class_="quiet") for text in [f"{config.facts.title} on {Path(config.model).name}", *told]]
    return tag("dl", [tag("dt", [line, name]), tag("dd", figure, class_="figure"), *lines], class_="card")


def _differences(records: Mapping[str, RunRecord]) -> list[Html]:
    """The settings that are not the same in all runs, as far as each run's algorithm takes them."""
    settings = {name: _settings(record) for name, record in records.items()}
    fields = dict.fromkeys(field for own in settings.values() for field in own)
    rows: list[list[Text]] = []
    for field in fields:
        values = [own.get(field) for own in settings.values()]
        if len(set(values)) > 1:
            rows.append([tag("code", field), *(quiet(units.NONE) if value is None else tag("code", value) for value in values)])
    if not rows:
        return [tag("h2", "Settings"), tag("div", tag("p", "All settings are the same."), class_="panel")]
    caption = "The settings in which they differ; a dash where an algorithm takes no such setting, or it is not set."
    shown = table(caption, ["setting", *records], rows, 1 + len(records))
    return [tag("h2", "Settings"), tag("div", shown, class_="panel scroll")]


def _settings(record: RunRecord) -> dict[str, str]:
    config = record.config
    return {
        name: str(getattr(config, name))
        for name in type(config).model_fields
        if config.facts.takes(name) and getattr(config, name) is not None
    }
