"""The small comparisons of dev/LOG.md: noise families, Pro against uniform, wire precisions, the shuffled control.

    python dev/experiments/stories.py DATA MODEL OUT          # DATA from dolly_subset.py --category all --max-tokens 160

Every run takes the same number of forward passes. Runs that are done are not repeated, cut ones are resumed.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

SEEDS = (1, 2, 3)
COMMON = (
    "--num-clients 20 --fraction-train 0.2 --num-rounds 6 --local-steps 25 --batch-size 4 --max-length 160 "
    "--lr 1e-4 --eps 1e-3 --num-seeds 1024 --eval-every 6"
)
VARIANTS = {
    "hadamard, uniform, float16 on the wire": "",
    "gaussian": "--noise gaussian",
    "fedkseed-pro": "--algorithm fedkseed-pro",
    "gaussian, fedkseed-pro": "--noise gaussian --algorithm fedkseed-pro",
    "float32 on the wire": "--wire float32",
    "control: responses shuffled": "--data {data}/shuffled.jsonl",
}


def main() -> None:
    data, model, out = sys.argv[1:]
    print("| variant | held-out loss, base | after, mean | seeds |\n| --- | --- | --- | --- |")
    for number, (name, flags) in enumerate(VARIANTS.items()):
        losses, before = [], 0.0
        for seed in SEEDS:
            run = Path(out) / f"stories-{number}-{seed}"
            fresh = f"--model {model} --data {data}/train.jsonl --eval-data {data}/held-out.jsonl {COMMON} --seed {seed}"
            fresh = f"{fresh} {flags.format(data=data)} --run {run}"
            arguments = f"--resume {run}" if (run / "config.toml").exists() else fresh
            command = [str(Path(sys.executable).parent / "fedkseed"), "simulate", *arguments.split()]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            evaluations = [event["eval_loss"] for event in events if event["event"] == "evaluation"]
            before = evaluations[0]
            losses.append(evaluations[-1])
        spread = f" +- {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        print(f"| {name} | {before:.4f} | {statistics.mean(losses):.4f}{spread} | {losses} |", flush=True)


if __name__ == "__main__":
    main()
