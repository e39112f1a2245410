"""What `fedkseed tune` and `--lr auto` do: calibrate on the clients' records, and show how it came out."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fedkseed.cli.display import PlainDisplay
from fedkseed.errors import ConfigError
from fedkseed.evaluation import mean_loss
from fedkseed.kseed.calibration import Calibration, calibrate
from fedkseed.runs.settings import SimulationConfig


def find(config: SimulationConfig) -> Calibration:
    """Calibrate for the settings of a run; its learning rate and eps are not looked at.

    Raises:
        FedKSeedError: the data or the model cannot be used, or no rate was found.
    """
    import torch

    from fedkseed.data import collate
    from fedkseed.kseed.server import seed_pool
    from fedkseed.models.loading import load_model
    from fedkseed.randomness import generator
    from fedkseed.runs.records import prepare
    from fedkseed.runs.task import bind_loaded

    if config.facts.measures != "two-point":
        raise ConfigError(
            f"--algorithm {config.algorithm} has no calibration, which is of zeroth-order steps; give --lr, "
            "or find it by a grid with fedkseed compare"
        )
    notes = PlainDisplay(config, Console())
    records = prepare(config, notes)
    pooled = [example for examples in records.clients.values() for example in examples]
    model = load_model(config.model, config.dtype, config.device)
    bound = bind_loaded(config.model, model, seed_pool(config)).bound
    notes.note("calibrating: a few hundred forward passes on batches of the clients' records")

    def loss(batch: int) -> float:
        draw = generator(config.seed, "calibration", batch)
        chosen = draw.choice(len(pooled), min(config.batch_size, len(pooled)), replace=False)
        with torch.inference_mode():
            return mean_loss(model, collate([pooled[i] for i in chosen], records.pad_id, model.device)).item()

    return calibrate(bound, loss, generator(config.seed, "calibration directions"))


def show(found: Calibration) -> None:
    """Print what was measured and why it leads to these values."""
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
