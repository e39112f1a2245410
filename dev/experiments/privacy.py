"""Held-out loss against epsilon, for records and for clients, beside FedIT: the table of docs/privacy.md.

    OMP_NUM_THREADS=1 python dev/experiments/privacy.py DATA MODEL OUT

DATA is databricks-dolly-15k.jsonl, MODEL the folder stories260k. Each row tries as many rates, by seed 0 at each epsilon; a
clip norm goes with its rate where changes do. Runs that are done are not repeated, cut ones are resumed. Settings and metrics
go to results/runs/stories-privacy.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from archive import RAW, pack, said
from comparisons import ROOT, cut_dolly

import fedkseed as fk
from fedkseed.runs.metrics import read_metrics

SEEDS, TUNING_SEED = (1, 2, 3), 0
EPSILONS = (1.0, 2.0, 6.0, None)
COMMON: dict[str, Any] = {
    "subsample": 0.2, "partition": "iid", "fraction_train": 1.0, "weighting": "equal", "template": "bare", "max_length": 64,
    "eval_limit": 64, "eval_every": 100,
}  # fmt: skip
RECORDS = {**COMMON, "dp": "record", "num_clients": 10, "num_rounds": 4, "local_steps": 2, "batch_size": 8}
CLIENTS = {**COMMON, "dp": "client", "num_clients": 100, "num_rounds": 3, "local_steps": 1, "batch_size": 4}
ROWS: dict[str, list[dict[str, Any]]] = {
    "records: FedKSeed-grad, K = 1,024": [
        {**RECORDS, "algorithm": "fedkseed-grad", "num_seeds": 1024, "lr": lr, "clip_norm": 15.0}
        for lr in (0.003, 0.01, 0.03)
    ],
    "records: FedKSeed, K = 1,024": [
        {**RECORDS, "algorithm": "fedkseed", "num_seeds": 1024, "eps": 1e-3, "lr": lr, "clip_norm": 30.0}
        for lr in (1e-5, 3e-5, 1e-4)
    ],
    "clients: FedKSeed-grad, K = 256": [
        {**CLIENTS, "algorithm": "fedkseed-grad", "num_seeds": 256, "lr": lr, "clip_norm": 10 * lr}
        for lr in (0.003, 0.01, 0.03)
    ],
    "clients: FedIT, rank 1": [
        {**CLIENTS, "algorithm": "fedit", "lora_rank": 1, "lora_alpha": 2.0, "lr": lr, "clip_norm": 28 * lr}
        for lr in (0.003, 0.01, 0.03)
    ],
}  # fmt: skip


def losses(out: Path, settings: dict[str, Any], name: str) -> tuple[float, float]:
    """The held-out loss before and after a run, which is done or gone on with."""
    run = out / "runs" / name
    found = read_metrics(run / "metrics.jsonl").losses
    if settings["num_rounds"] not in found:
        found = dict(fk.simulate(settings, run).history)
    return found[0], found[settings["num_rounds"]]


def main() -> None:
    source, model, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "dolly-held-out.jsonl").exists():
        cut_dolly(source, out)
    files = {"model": str(model), "data": str(out / "dolly-train.jsonl"), "eval_data": str(out / "dolly-held-out.jsonl")}
    lines = [
        "| row | " + " | ".join(f"epsilon {epsilon:g}" if epsilon else "no noise" for epsilon in EPSILONS) + " | base |",
        "| --- " * (len(EPSILONS) + 2) + "|",
    ]
    for row, rates in ROWS.items():
        cells, base = [], 0.0
        for epsilon in EPSILONS:
            noise = {"epsilon": epsilon} if epsilon else {"noise_multiplier": 0.0}
            word = f"{row.split(',')[0].replace(': ', '-').lower()}-{epsilon or 'inf'}"

            def after(settings: dict[str, Any], seed: int, noise: dict[str, Any] = noise, word: str = word) -> float:
                name = f"{word}-lr{settings['lr']:g}-seed{seed}"
                return losses(out, {**files, **settings, **noise, "seed": seed}, name)[1]

            chosen = min(rates, key=lambda settings: after(settings, TUNING_SEED))
            found = [after(chosen, seed) for seed in SEEDS]
            base = losses(out, {**files, **chosen, **noise, "seed": SEEDS[0]}, f"{word}-lr{chosen['lr']:g}-seed{SEEDS[0]}")[0]
            cells.append(f"{statistics.mean(found):.4f} ± {statistics.stdev(found):.4f} ({chosen['lr']:g})")
            print(word, cells[-1], flush=True)
        lines.append(f"| {row} | " + " | ".join(cells) + f" | {base:.4f} |")
    kept = ROOT / "results" / "runs" / "stories-privacy"
    kept.mkdir(parents=True, exist_ok=True)
    places = {str(out.resolve()) + "/": "", str(out) + "/": "", str(model.resolve()): model.name}
    archived = {}
    for path in sorted((out / "runs").rglob("*")):
        if path.name in ("config.toml", "metrics.jsonl"):
            text = path.read_text(encoding="utf-8")
            for place, name in places.items():
                text = text.replace(place, name)
            archived[path.relative_to(out).as_posix()] = text.encode()
    pack(archived, kept / RAW)
    text = "\n".join(lines) + "\n\nHeld-out loss, mean ± standard deviation over seeds 1, 2, 3; in brackets the rate.\n\n"
    (kept / "table.md").write_text(text + said(kept / RAW), encoding="utf-8")
    print(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
