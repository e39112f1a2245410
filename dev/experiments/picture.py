"""README's one picture: held-out loss against bytes, from the archived runs of results/.

    python dev/experiments/picture.py

writes docs/images/loss-by-bytes.png. What the runs were and what they do not show: docs/results.md.
"""

import tempfile
from pathlib import Path

from archive import RAW, unpack
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fedkseed.report.picture import LIGHT
from fedkseed.report.reading import read
from fedkseed.report.summary import spent
from fedkseed.report.units import size

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "loss-by-bytes.png"
OURS, PAPER, REST = LIGHT.orange, LIGHT.blue, LIGHT.grey
Methods = dict[str, tuple[list[str], str]]
"""Label to the runs of its seeds and a colour."""
SMALL: Methods = {
    "FedKSeed (the paper)": ([f"runs/fedkseed-seed{seed}" for seed in (1, 2, 3)], PAPER),
    "gradients in\nK numbers\n(ours)": ([f"runs/fedkseed-grad-adam-seed{seed}" for seed in (1, 2, 3)], OURS),
    "FedIT": ([f"runs/fedit-seed{seed}" for seed in (1, 2, 3)], REST),
    "FedAvg": ([f"runs/fedavg-seed{seed}" for seed in (1, 2, 3)], REST),
}
LARGE: Methods = {
    "FedKSeed (the paper)": (["fedkseed-2e-5-s1"], PAPER),
    "two points, 8 directions\nover few tensors (ours)": (["v-1e-4-s1"], OURS),
    "gradients in K numbers\n(ours)": (["lora-8e-3-s1"], OURS),
    "FedIT": (["fedit-1e-2-s1"], REST),
}


def curve(folders: list[Path]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Bytes so far, and the mean, the least and the greatest loss over the seeds, at each evaluation after a round."""
    runs = [spent(read(folder))[1:] for folder in folders]
    points = list(zip(*runs, strict=True))
    losses = [[point.loss for point in at] for at in points]
    return (
        [sum(point.num_bytes for point in at) / len(at) for at in points],
        [sum(values) / len(values) for values in losses],
        [min(values) for values in losses],
        [max(values) for values in losses],
    )


def panel(axes: Axes, name: str, methods: Methods, title: str) -> None:
    """One model: a line for each method, and what it began with."""
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        unpack(ROOT / "results" / "runs" / name / RAW, folder)
        base = spent(read(folder / next(iter(methods.values()))[0][0]))[0].loss
        axes.axhline(base, color=LIGHT.muted, linewidth=1, linestyle=":")
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        axes.annotate("base model", (0.99, base), xytext=(0, -13), ha="right", color=LIGHT.muted, **place)
        for label, (runs, colour) in methods.items():
            x, mean, least, greatest = curve([folder / run for run in runs])
            axes.fill_between(x, least, greatest, color=colour, alpha=0.2, linewidth=0)
            axes.plot(x, mean, color=colour, marker="o", markersize=4, linewidth=2)
            # at the free end: the last method's points lie at the right edge
            at, gap, ha = (0, -8, "right") if label == "FedAvg" else (-1, 8, "left")
            weight = "bold" if colour == OURS else "normal"
            style = {"ha": ha, "va": "center", "color": colour, "fontweight": weight}
            axes.annotate(label, (x[at], mean[at]), xytext=(gap, 0), textcoords="offset points", **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title, loc="left", fontsize=11, color=LIGHT.ink)
    axes.set_xlabel("bytes in the whole run, all clients, both ways", color=LIGHT.muted)
    axes.grid(axis="y", color=LIGHT.grid, linewidth=0.8)
    axes.tick_params(colors=LIGHT.muted)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def main() -> None:
    """Draw both models beside each other."""
    figure = Figure(figsize=(10, 3.9), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    panel(left, "stories-gradients", SMALL, "260,000 parameters, three seeds")
    panel(right, "smollm2-lora", LARGE, "SmolLM2-135M, one seed")
    left.set_ylabel("held-out loss on Dolly", color=LIGHT.muted)
    figure.savefig(PICTURE, dpi=130, metadata={"Software": None})


if __name__ == "__main__":
    main()
