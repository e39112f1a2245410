"""The lines of `metrics.jsonl`, whoever drives the rounds, and the same for a person; the driver adds bytes and seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedkseed.federation.outcome import CHANGE_NORM, CLIPPED_SCALARS, COUNTED, PROJECTED_GRAD_RMS, Contribution, Outcome

if TYPE_CHECKING:  # torch comes with it, and who shows events need not wait for that
    from fedkseed.evaluation import EvalLoss


def round_event(outcome: Outcome, lr: float, rewards: bool = False) -> dict[str, Any]:
    """What became of a round; with `rewards` the clients' losses are scores' negatives, and told as scores."""
    losses = [c.loss for c in outcome.contributions if c.loss is not None]
    if outcome.summed is not None and outcome.summed.loss is not None:
        losses = [outcome.summed.loss]
    mean = sum(losses) / len(losses) if losses else None
    return {
        "event": "round",
        "server_round": outcome.server_round,
        "lr": lr,
        "num_replies": len(outcome.contributions),
        "num_steps": sum(c.num_steps for c in outcome.contributions),
        "dropped_steps": outcome.dropped_steps,
        "train_loss": None if rewards else mean,
        **({"train_reward": _negative(mean)} if rewards else {}),
        **_sizes(outcome.contributions),
        "clients": {c.client: {"weight": c.weight, **_told(c.loss, rewards), **c.sizes} for c in outcome.contributions},
        "refused": {refusal.client: refusal.reason for refusal in outcome.refusals},
        "missing": list(outcome.missing),
    }


def _told(loss: float | None, rewards: bool) -> dict[str, float | None]:
    return {"loss": None, "reward": _negative(loss)} if rewards else {"loss": loss}


def _negative(loss: float | None) -> float | None:
    return None if loss is None else 0.0 - loss


def _sizes(contributions: Sequence[Contribution]) -> dict[str, float]:
    """How large what the cohort sent is: of scalars over all its steps, of changes the mean over its clients; what was cut."""
    sizes = {}
    scalars = [
        (c.sizes[PROJECTED_GRAD_RMS], c.num_steps - c.dropped_steps) for c in contributions if PROJECTED_GRAD_RMS in c.sizes
    ]
    if scalars:
        sizes[PROJECTED_GRAD_RMS] = math.sqrt(math.fsum(n * rms**2 for rms, n in scalars) / sum(n for _, n in scalars))
    if changes := [c.sizes[CHANGE_NORM] for c in contributions if CHANGE_NORM in c.sizes]:
        sizes[CHANGE_NORM] = math.fsum(changes) / len(changes)
    if any(CLIPPED_SCALARS in c.sizes for c in contributions):
        sizes[CLIPPED_SCALARS] = sum(c.sizes.get(CLIPPED_SCALARS, 0) for c in contributions)
    return sizes


def evaluation_event(server_round: int, result: EvalLoss, weight_bytes: int, seconds: float) -> dict[str, Any]:
    """The held-out loss after a round; round 0 is the base model. `weight_bytes` is what sending the weights would take."""
    return {
        "event": "evaluation",
        "server_round": server_round,
        "eval_loss": result.loss,
        **({} if result.reward is None else {"eval_reward": result.reward}),
        "num_examples": result.num_examples,
        "num_tokens": result.num_tokens,
        "weight_bytes": weight_bytes,
        "seconds": seconds,
    }


def summary(event: dict[str, Any], num_rounds: int) -> str:
    """One line for an event."""
    place = f"round {event['server_round']}/{num_rounds}"
    if event["event"] == "evaluation":
        reward = f", reward {event['eval_reward']:.4f}" if "eval_reward" in event else ""
        return f"{place}: held-out loss {event['eval_loss']:.4f}{reward}"
    what = "reward" if "train_reward" in event else "loss"
    value = event[f"train_{what}"]
    loss = f"{what} {'-' if value is None else f'{value:.4f}'}"
    dropped = f", {event['dropped_steps']} steps dropped" if event["dropped_steps"] else ""
    refused = f", {len(event['refused'])} replies refused" if event["refused"] else ""
    clipped = f", {event[CLIPPED_SCALARS]} scalars clipped" if event.get(CLIPPED_SCALARS) else ""
    return (
        f"{place}: {loss} at {event['num_replies']} clients, {event['bytes_down']:,.0f} bytes down and "
        f"{event['bytes_up']:,.0f} up each, {event['seconds']:.1f} s{dropped}{refused}{clipped}"
    )


def _counted(client: dict[str, Any]) -> str:
    return f", {100 * client[COUNTED]:.0f} % counted" if COUNTED in client else ""


def details(event: dict[str, Any]) -> list[str]:
    """What else an event says, for those who asked for everything."""
    lines = [
        f"  {client}: weight {one['weight']:.3f}, {_measured(one)}{_counted(one)}"
        for client, one in event.get("clients", {}).items()
        if "weight" in one
    ]
    if event.get("seconds_by"):
        lines.append("  seconds: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in event["seconds_by"].items()))
    if event.get("peak_bytes"):
        lines.append(f"  memory at most: {event['peak_bytes'] / 1e6:,.0f} MB")
    return lines


def _measured(client: dict[str, Any]) -> str:
    what = "reward" if "reward" in client else "loss"
    return f"{what} {'-' if client[what] is None else f'{client[what]:.4f}'}"
