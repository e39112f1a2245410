"""What `fedkseed tune` and `--lr auto` show: what was measured, and why it leads to these values."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

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
    table = Table("lr", "loss after 3 rounds", box=None, pad_edge=False)
    table.add_row("base", f"{found.before:.4f}")
    for attempt in found.attempts:
        note = "  <- the best; a third of it is taken, for the rounds to come" if attempt is best else ""
        table.add_row(f"{attempt.lr:.3g}", f"{attempt.after:.4f}{note}")
    Console(soft_wrap=True).print(table)
    print(f"\n{found.num_steps} local steps")


def _show_calibration(found: Calibration) -> None:
    console = Console(soft_wrap=True)
    table = Table("eps", "slopes differ from those at its neighbours by", box=None, pad_edge=False)
    for agreement in found.agreements:
        chosen = "  <- taken" if agreement.eps == found.eps else ""
        table.add_row(f"{agreement.eps:g}", f"{100 * agreement.disagreement:.2g} %{chosen}")
    console.print(table)
    print(
        f"\nslope along a direction: {found.slope:.3g}, of which other batches share {100 * found.shared:.0f} %; "
        f"curvature: {found.curvature:.3g}\n"
        f"so the best first step is at {found.best_first_step:.2g} (share / curvature); a quarter of it was tried:\n"
    )
    table = Table("lr", "loss of 8 batches before", "after 40 steps", box=None, pad_edge=False)
    for trial in found.trials:
        table.add_row(f"{trial.lr:.3g}", f"{trial.before:.4f}", f"{trial.after:.4f}")
    console.print(table)
    print(f"\n{found.num_forward_passes} forward passes")
