"""What follows from a run's numbers: traffic, participation, time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedkseed.privacy import DELTA
from fedkseed.report.reading import Evaluation, Round, RunRecord, is_finite

PAPER_BYTES = 17_988
"""Bytes per client and round, down and up together, of the paper (K = 4096, 200 steps), by this project's count."""

ACTIVITIES = ("forward", "noise", "rebuild", "other", "evaluation")


@dataclass(frozen=True)
class Promise:
    """What the rounds so far promise of each record or client, in words.

    Attributes:
        epsilon: what was spent; "none" where next to no noise bounds nothing.
        about: at which delta, and of whom.
        budget: what may be spent; empty without a budget.
    """

    epsilon: str
    about: str
    budget: str


def promise(record: RunRecord) -> Promise | None:
    """See `Promise`; None of a run without differential privacy."""
    config = record.config
    if config.dp is None:
        return None
    epsilon = record.rounds[-1].epsilon if record.rounds else 0.0
    budget = "" if config.epsilon is None else f"the budget is {config.epsilon:g}"
    if epsilon is None:
        return Promise("none", "next to no noise was added: nothing is promised", budget)
    delta = DELTA if config.delta is None else config.delta
    return Promise(f"epsilon {epsilon:.3g}", f"at delta {delta:g}, of each {config.dp}", budget)


def noted_promise(made_with: Mapping[str, Any] | None) -> str | None:
    """What a checkpoint promises, as whoever made it noted it; None where nothing is."""
    said = (made_with or {}).get("privacy")
    if not isinstance(said, dict):
        return None
    if not isinstance(said.get("epsilon"), (int, float)):
        return f"none: next to no noise was added to what each {said.get('unit')} sent"
    return (
        f"epsilon {said['epsilon']:.3g} at delta {said.get('delta')}, of each {said.get('unit')} added or taken away "
        f"(clip norm {said.get('clip_norm')}, noise multiplier {said.get('noise_multiplier')})"
    )


@dataclass(frozen=True)
class Traffic:
    """Bytes as they were encoded: mean per client and round, and in total over all clients and rounds."""

    down: float
    up: float
    total_down: float
    total_up: float
    exchanges: int

    @property
    def both(self) -> float:
        """Mean per client and round, down and up together."""
        return self.down + self.up

    @property
    def total(self) -> float:
        """Over the whole run, down and up together."""
        return self.total_down + self.total_up


def traffic(rounds: Sequence[Round]) -> Traffic | None:
    """The bytes of some rounds; None without any."""
    asked = sum(r.num_asked for r in rounds)
    if not asked:
        return None
    answered = sum(r.num_answered for r in rounds)
    down = sum(r.bytes_down * r.num_asked for r in rounds)
    up = sum(r.bytes_up * r.num_answered for r in rounds)
    return Traffic(down / asked, up / answered if answered else 0.0, down, up, asked)


@dataclass(frozen=True)
class Participation:
    """How often a client's reply was accepted, was refused, or did not come; what share of the accepted ones counted.

    The share is the mean over its rounds; None where the rule tells none.
    """

    client: str
    accepted: int
    refused: int
    missing: int
    counted: float | None = None

    @property
    def asked(self) -> int:
        """How often the client was in a cohort."""
        return self.accepted + self.refused + self.missing


def participation(rounds: Sequence[Round]) -> list[Participation]:
    """Every client that was ever asked, those asked most often first."""
    accepted = Counter(name for r in rounds for name in r.client_losses)
    refused = Counter(name for r in rounds for name in r.refused)
    missing = Counter(name for r in rounds for name in r.missing)
    counted: dict[str, list[float]] = {}
    for r in rounds:
        for name, share in r.counted.items():
            counted.setdefault(name, []).append(share)
    clients = [
        Participation(
            name,
            accepted[name],
            refused[name],
            missing[name],
            sum(counted[name]) / len(counted[name]) if name in counted else None,
        )
        for name in accepted | refused | missing
    ]
    return sorted(clients, key=lambda p: (-p.asked, -p.accepted, p.client))


def refusals(rounds: Sequence[Round]) -> list[tuple[str, list[str]]]:
    """Why replies were not used, most frequent reason first, with the clients it befell (one entry each time)."""
    reasons: dict[str, list[str]] = {}
    for r in rounds:
        for name, reason in r.refused.items():
            reasons.setdefault(reason, []).append(name)
        for name in r.missing:
            reasons.setdefault("no reply came", []).append(name)
    return sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))


@dataclass(frozen=True)
class Spent:
    """What had been spent when the held-out loss was measured: bytes over all clients, both ways, and seconds of rounds."""

    server_round: int
    loss: float
    num_bytes: float
    seconds: float


def spent(record: RunRecord) -> list[Spent]:
    """Every evaluation whose loss is a number, with what all rounds up to it had cost."""
    points = []
    for evaluation in record.evaluations:
        before = [r for r in record.rounds if r.server_round <= evaluation.server_round]
        moved = traffic(before)
        if is_finite(evaluation.loss):
            seconds = sum(r.seconds for r in before)
            points.append(Spent(evaluation.server_round, evaluation.loss, moved.total if moved else 0.0, seconds))
    return points


def lost_shares(r: Round) -> dict[str, float]:
    """What of a round was lost, in percent: replies that were refused or did not come, steps of the others."""
    asked, steps = max(r.num_asked, 1), max(r.num_steps or 0, 1)
    return {
        "replies refused": 100 * len(r.refused) / asked,
        "no reply": 100 * len(r.missing) / asked,
        "steps dropped": 100 * min(r.dropped_steps / steps, 1.0) if r.num_steps else 0.0,
    }


def seconds_by_round(record: RunRecord) -> dict[int, dict[str, float]]:
    """Seconds of each activity, by round; round 0 is the evaluation of the base model."""
    table: dict[int, dict[str, float]] = {}
    for r in record.rounds:
        by = {activity: r.seconds_by.get(activity, 0.0) for activity in ("forward", "noise", "rebuild")}
        table[r.server_round] = by | {"other": max(0.0, r.seconds - sum(by.values()))}
    for e in record.evaluations:
        table.setdefault(e.server_round, {})["evaluation"] = e.seconds
    return {n: {activity: table[n].get(activity, 0.0) for activity in ACTIVITIES} for n in sorted(table)}


def before_and_after(record: RunRecord) -> tuple[Evaluation | None, Evaluation | None]:
    """The evaluation of the base model and the last one since; None where there is none."""
    before = next((e for e in record.evaluations if e.server_round == 0), None)
    after = record.evaluations[-1] if record.evaluations and record.evaluations[-1].server_round > 0 else None
    return before, after


def change(before: float, after: float) -> float | None:
    """Relative change in percent; None where it means nothing."""
    if not (is_finite(before) and is_finite(after)) or before == 0:
        return None
    return (after - before) / abs(before) * 100
