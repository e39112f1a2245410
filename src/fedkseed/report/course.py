"""Charts of how a run went: its score, what a lower loss cost, what clients sent, how far the model moved, what was lost."""

from __future__ import annotations

from fedkseed.report import drawing, units
from fedkseed.report.chart import BYTES, CHANGE, GRADIENT, LOSS, MOVED, REWARD, TIME, Chart, absent
from fedkseed.report.drawing import Curve
from fedkseed.report.reading import RunRecord, is_finite
from fedkseed.report.summary import lost_shares, spent


def reward(record: RunRecord) -> Chart | None:
    """The score that is to rise; None of a run that is tuned on the loss."""
    name, title = "reward", "Reward by round"
    if record.config.objective == "loss":
        return None
    held_out = [(e.server_round, e.finite_reward) for e in record.evaluations if e.finite_reward is not None]
    training = [(r.server_round, r.train_reward) for r in record.rounds if r.train_reward is not None]
    named = {"held-out records": held_out, "training": [(n, value) for n, value in training if is_finite(value)]}
    shown = {label: points for label, points in named.items() if points}
    if not shown:
        return absent(name, title, "No answer has been scored yet.")
    draw = drawing.curves([Curve(label, *zip(*points, strict=True)) for label, points in shown.items()], "round", False, REWARD)
    ends = "; ".join(
        f"{label}: {points[0][1]:.4g} at round {points[0][0]}, {points[-1][1]:.4g} at round {points[-1][0]}"
        for label, points in shown.items()
    )
    caption = "Rising while the held-out loss rises too is forgetting, or a score that can be had without answering."
    return Chart(name, title, f"Line chart of the mean score by round. {ends}.", caption, draw)


def loss_by_bytes(record: RunRecord) -> Chart:
    """The held-out loss against the bytes of all clients."""
    name, title = "loss_by_bytes", "Held-out loss by bytes"
    points = spent(record)
    if len(points) < 2:
        return absent(name, title, "There are not two evaluations yet.")
    draw = drawing.curves([Curve("", [p.num_bytes for p in points], [p.loss for p in points])], BYTES, False, LOSS, units.size)
    alt = (
        f"Line chart: {units.loss(points[0].loss)} before anything was sent, {units.loss(points[-1].loss)} after "
        f"{units.size(points[-1].num_bytes)}, down and up together over all clients."
    )
    return Chart(name, title, alt, "What a lower loss costs on the wire; a flat end says that further rounds buy little.", draw)


def loss_by_time(record: RunRecord) -> Chart:
    """The held-out loss against the time of the rounds."""
    name, title = "loss_by_time", "Held-out loss by time"
    points = spent(record)
    if len(points) < 2 or not points[-1].seconds:
        return absent(name, title, "There are not two evaluations yet.")
    unit, each = units.time_unit(points[-1].seconds)
    curve = Curve("", [p.seconds / each for p in points], [p.loss for p in points])
    draw = drawing.curves([curve], f"{TIME} ({unit})", False, LOSS, "{:g}".format)
    took = units.duration(points[-1].seconds)
    alt = f"Line chart: {units.loss(points[0].loss)} at the start, {units.loss(points[-1].loss)} after {took}."
    return Chart(
        name, title, alt, "Time of the rounds, without that of evaluations; simulated clients work one after the other.", draw
    )


def sent(record: RunRecord) -> Chart | None:
    """The scalars or changes that clients send, by size; None of an algorithm that sends tensors."""
    name, title = "sent", "Size of what clients send"
    if not record.config.facts.has_ledger:
        return None
    of_changes = record.config.facts.sends == "changes"
    values = [(r.server_round, r.change_norm if of_changes else r.projected_grad_rms) for r in record.rounds]
    shown = [(n, value) for n, value in values if value is not None]
    if not shown:
        return absent(name, title, "No round has noted it: runs of older versions have not.")
    label = CHANGE if of_changes else GRADIENT
    draw = drawing.curves([Curve("", *zip(*shown, strict=True))], "round", False, label, wide=True)
    (first, begin), (last, end) = shown[0], shown[-1]
    alt = f"Line chart of the {label} by round: {begin:.3g} in round {first}, {end:.3g} in round {last}."
    caption = (
        "The length of a client's change of the K coefficients, mean over the cohort. It falls with the rate's schedule; "
        "growth is the first sign of divergence."
        if of_changes
        else "The one number that a step sends. Far above its neighbours is a bad batch or a rate that is too high; "
        "zero is an eps that the weights do not resolve."
    )
    return Chart(name, title, alt, caption, draw)


def distance(record: RunRecord) -> Chart | None:
    """How far a weight has moved; None where there is no ledger."""
    name, title = "distance", "Distance from the base model"
    if not record.config.facts.has_ledger:
        return None
    shown = [(r.server_round, r.moved_rms) for r in record.rounds if r.moved_rms is not None]
    if not shown:
        return absent(name, title, "No round has noted it: runs of older versions have not.")
    share = " (of itself)" if record.config.facts.has_pages and record.config.movement == "proportional" else ""
    draw = drawing.curves(
        [Curve("", [0, *(n for n, _ in shown)], [0.0, *(v for _, v in shown)])], "round", False, MOVED + share
    )
    last, end = shown[-1]
    alt = f"Line chart: after round {last} a weight has moved by {end:.3g}{share}, root mean square over all tuned weights."
    caption = (
        "From the K numbers alone: directions are orthogonal, so it is the coefficients' length. A straight line is a steady "
        "walk; one that bends up runs away."
    )
    return Chart(name, title, alt, caption, draw)


def lost(record: RunRecord) -> Chart:
    """Replies and steps that came to nothing, in percent."""
    name, title = "lost", "Dropped and refused by round"
    if not record.rounds:
        return absent(name, title, "No round is done yet.")
    shares = {r.server_round: lost_shares(r) for r in record.rounds}
    series = {kind: [share[kind] for share in shares.values()] for kind in next(iter(shares.values()))}
    if not any(any(values) for values in series.values()):
        return absent(name, title, "Nothing was lost: no reply was refused or missing, no step dropped.")
    draw = drawing.curves([Curve(kind, list(shares), values) for kind, values in series.items()], "round", False, "percent")
    means = ", ".join(f"{kind} {sum(values) / len(values):.1f} %" for kind, values in series.items())
    caption = "A few percent are ordinary in the field. A step is dropped whose loss is no number or scalar too large."
    return Chart(name, title, f"Line chart of shares by round, on average: {means}.", caption, draw)
