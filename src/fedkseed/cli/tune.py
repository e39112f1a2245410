"""What `fedkseed tune` and `--lr auto` show: what was measured, and why it leads to these values."""

from __future__ import annotations

from fedkseed.cli.console import say, show_table
from fedkseed.kseed.calibration import Calibration
from fedkseed.runs.rates import Rate


def show(found: Calibration | Rate) -> None:
    """Print what was measured and why it leads to these values."""
    if isinstance(found, Rate):
        _show_rates(found)
    else:
        _show_calibration(found)


def _show_rates(found: Rate) -> None:
    best = min(found.attempts, key=lambda attempt: attempt.after)
    rows = [("base", f"{found.before:.4f}", "")]
    for attempt in found.attempts:
        note = "<- the best; a third of it is taken, for the rounds to come" if attempt is best else ""
        rows.append((f"{attempt.lr:.3g}", f"{attempt.after:.4f}", note))
    show_table(("lr", "loss after 3 rounds", ""), rows)
    say()
    say(f"{found.num_steps} local steps")


def _show_calibration(found: Calibration) -> None:
    rows = [
        (f"{one.eps:g}", f"{100 * one.disagreement:.2g} %", "<- taken" if one.eps == found.eps else "")
        for one in found.agreements
    ]
    show_table(("eps", "slopes differ from those at its neighbours by", ""), rows)
    say()
    say(
        f"slope along a direction: {found.slope:.3g}, of which other batches share {100 * found.shared:.0f} %; "
        f"curvature: {found.curvature:.3g}"
    )
    times = f"{found.clients} clients x " if found.clients > 1 else ""
    say(f"so the best first step is at {found.best_first_step:.2g} ({times}share / curvature); a quarter of it was tried:")
    say()
    trials = [(f"{trial.lr:.3g}", f"{trial.before:.4f}", f"{trial.after:.4f}") for trial in found.trials]
    show_table(("lr", "loss of 8 batches before", "after a short round"), trials)
    say()
    say(f"{found.num_forward_passes} forward passes")
