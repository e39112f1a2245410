"""Which pictures a report has, what each says in words, and what stands there while there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedkseed.kseed.importance import seed_probabilities
from fedkseed.report import drawing, units
from fedkseed.report.chart import Chart, absent
from fedkseed.report.course import distance, loss_by_bytes, loss_by_time, lost, reward, sent
from fedkseed.report.reading import RunRecord, is_finite
from fedkseed.report.summary import (
    ACTIVITIES,
    PAPER_BYTES,
    before_and_after,
    change,
    participation,
    seconds_by_round,
    traffic,
)
from fedkseed.text import counted


def charts(record: RunRecord) -> list[Chart]:
    """All charts of a run, in the order of the page."""
    made = [make(record) for make in CHARTS.values()]
    return [chart for chart in made if chart is not None]


def _held_out_loss(record: RunRecord) -> Chart:
    name, title = "held_out_loss", "Held-out loss by round"
    if not record.evaluations:
        return absent(name, title, "The held-out records have not been evaluated yet.")
    shown = [e for e in record.evaluations if is_finite(e.loss)]
    diverged = [e.server_round for e in record.evaluations if not is_finite(e.loss)]
    draw = drawing.held_out_loss([e.server_round for e in shown], [e.loss for e in shown], diverged)
    before, after = before_and_after(record)
    alt = "Line chart of the held-out loss by round"
    if before and after:
        percent = change(before.loss, after.loss)
        moved = f" ({units.percent(percent)})" if percent is not None else ""
        alt += f": {units.loss(before.loss)} at round 0, {units.loss(after.loss)} at round {after.server_round}{moved}"
    elif shown:
        alt += f": {units.loss(shown[0].loss)} at round {shown[0].server_round}, the only one so far"
    if diverged:
        alt += f"; not finite at {counted(len(diverged), 'evaluation')}, first at round {diverged[0]}"
        return Chart(name, title, f"{alt}.", "Crosses mark rounds whose loss is not a number: the run diverged there.", draw)
    return Chart(name, title, f"{alt}.", "The solid line should fall below the dashed one, which is the first value.", draw)


def _training_loss(record: RunRecord) -> Chart | None:
    name, title = "training_loss", "Training loss by round, over the cohort"
    if not record.config.goal.smooth:
        return None
    rounds = [r for r in record.rounds if r.train_loss is not None]
    if not rounds:
        why = "No client has reported a training loss: every step was dropped." if record.rounds else "No round is done yet."
        return absent(name, title, why)
    shown = [(r, r.train_loss) for r in rounds if r.train_loss is not None and is_finite(r.train_loss)]
    diverged = [r.server_round for r in rounds if r.train_loss is not None and not is_finite(r.train_loss)]
    draw = drawing.training_loss(
        [r.server_round for r, _ in shown], [mean for _, mean in shown], [r.finite_losses() for r, _ in shown], diverged
    )
    alt = "Line chart of the clients' mean training loss by round, in the band from the least to the greatest client's"
    if shown:
        (first, start), (last, end) = shown[0], shown[-1]
        alt += f": {units.loss(start)} at round {first.server_round}, {units.loss(end)} at round {last.server_round}"
    if diverged:
        alt += f"; not finite at {counted(len(diverged), 'round')}, first at round {diverged[0]}"
    caption = "Each round asks other clients with other records: the wider the band, the less one round's mean says."
    return Chart(name, title, f"{alt}.", caption, draw)


def _bytes(record: RunRecord) -> Chart:
    name, title = "bytes", "Bytes per client by round"
    moved = traffic(record.rounds)
    if moved is None:
        return absent(name, title, "Nothing has been sent yet.")
    references = {f"the paper's {PAPER_BYTES:,} B": float(PAPER_BYTES)}
    if record.weight_bytes:
        references[f"float weights both ways, {units.size(2 * record.weight_bytes)}"] = 2.0 * record.weight_bytes
    rounds = record.rounds
    draw = drawing.bytes_by_round(
        [r.server_round for r in rounds], [r.bytes_down for r in rounds], [r.bytes_up for r in rounds], references
    )
    alt = (
        f"Line chart on a logarithmic scale: on average {moved.down:,.0f} bytes down and {moved.up:,.0f} up "
        f"per client and round, beside {' and '.join(references)}."
    )
    caption = "How many decades lie between the solid lines and the dashed ones; every step of the axis is a factor of ten."
    return Chart(name, title, alt, caption, draw)


def _seed_use(record: RunRecord) -> Chart | None:
    name, title = "seed_use", "How often seeds were used"
    if record.config.facts.sends != "scalars":
        return None
    history = record.ledger.history if record.ledger else None
    if history is None:
        return absent(name, title, "There is no ledger that remembers its steps yet.")
    counts = history.grad_counts
    if not counts.any():
        return absent(name, title, "The ledger holds no step: none was taken, or all were dropped.")
    unused = int((counts == 0).sum())
    alt = (
        f"Histogram: {counted(int(counts.sum()), 'step')} over {counted(counts.size, 'seed')}, "
        f"each used {counts.min()} to {counts.max()} times; {unused:,} were never used."
    )
    pro = record.config.facts.draws == "importance"
    caption = (
        "Where columns on the right stand above the dots, FedKSeed-Pro came back to seeds that it prefers."
        if pro
        else "Columns should follow the dots: seeds are drawn uniformly."
    )
    return Chart(name, title, alt, caption, drawing.seed_use(counts))


def _seed_probabilities(record: RunRecord) -> Chart | None:
    name, title = "seed_probabilities", "Seed probabilities for the next round"
    if record.config.facts.draws != "importance":
        return None
    history = record.ledger.history if record.ledger else None
    if history is None or not history.grad_counts.any():
        return absent(name, title, "All seeds are equally likely until steps have been taken.")
    share = seed_probabilities(record.config, history.grad_sums, history.grad_counts)
    ratios = share * share.size
    alt = (
        f"Probabilities of {counted(share.size, 'seed')}, largest first: from {ratios.max():.2f} to {ratios.min():.2f} "
        f"times the uniform probability of {1 / share.size:.3g}."
    )
    caption = (
        "The steeper the curve, the more FedKSeed-Pro prefers some seeds; by its rule no seed is over e = 2.72 times another."
    )
    return Chart(name, title, alt, caption, drawing.seed_probabilities(share))


def _participation(record: RunRecord) -> Chart:
    name, title = "participation", "Participation of the clients"
    seen = participation(record.rounds)
    if not seen:
        return absent(name, title, "No client has been asked yet.")
    never = max(0, (record.num_clients or 0) - len(seen))
    rest = [0] * never
    draw = drawing.participation(
        [p.accepted for p in seen] + rest, [p.refused for p in seen] + rest, [p.missing for p in seen] + rest
    )
    alt = (
        f"Columns of {counted(len(seen) + never, 'client')}: {len(seen):,} were asked, at most {seen[0].asked} times; "
        f"{never:,} never. Replies refused: {sum(p.refused for p in seen):,}; "
        f"not come: {sum(p.missing for p in seen):,}."
    )
    caption = "Clients without a column have not been asked yet, so nothing of their records is in the model."
    return Chart(name, title, alt, caption, draw)


def _coefficients(record: RunRecord) -> Chart | None:
    name, title = "coefficients", "Distribution of the coefficients"
    if not record.config.facts.has_ledger:
        return None
    if record.ledger is None:
        return absent(name, title, "There is no ledger yet.")
    values = record.ledger.coefficients.astype(np.float64)
    moved = values[(values != 0) & np.isfinite(values)]
    if not moved.size:
        return absent(name, title, "All coefficients are zero: the model is the base model.")
    alt = (
        f"Histogram of the {moved.size:,} of {values.size:,} coefficients that are not zero: from {moved.min():.3g} "
        f"to {moved.max():.3g}, standard deviation {moved.std():.3g}."
    )
    caption = (
        "A heap around zero without far outliers; one outlying seed would be one step, or one client, that moved the model."
    )
    return Chart(name, title, alt, caption, drawing.coefficients(moved))


def _time(record: RunRecord) -> Chart:
    name, title = "time", "Where the time went"
    table = seconds_by_round(record)
    if not any(sum(row.values()) for row in table.values()):
        return absent(name, title, "No time has been noted yet.")
    split = {activity: [row[activity] for row in table.values()] for activity in ACTIVITIES}
    total = sum(map(sum, split.values()))
    shares = ", ".join(f"{activity} {sum(values) / total:.0%}" for activity, values in split.items())
    alt = f"Stacked columns of seconds by round, {units.duration(total)} in all: {shares}."
    caption = (
        "Forward passes should dominate: noise and rebuild are what FedKSeed adds to them."
        if record.config.facts.measures == "two-point"
        else 'Backpropagation, folding and the optimiser\'s steps are in "other".'
    )
    return Chart(name, title, alt, caption, drawing.time_split(list(table), split))


CHARTS: dict[str, Callable[[RunRecord], Chart | None]] = {
    "reward": reward,
    "held_out_loss": _held_out_loss,
    "training_loss": _training_loss,
    "loss_by_bytes": loss_by_bytes,
    "loss_by_time": loss_by_time,
    "sent": sent,
    "distance": distance,
    "bytes": _bytes,
    "lost": lost,
    "participation": _participation,
    "seed_use": _seed_use,
    "seed_probabilities": _seed_probabilities,
    "coefficients": _coefficients,
    "time": _time,
}
